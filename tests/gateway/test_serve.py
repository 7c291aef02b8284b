"""The gateway as a guest in an event loop: listening, draining, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import TYPE_CHECKING

import httpx
import pytest

from paddock_gateway import serve as serving
from paddock_gateway.serve import ListenError, serve
from tests.gateway.clients import CHAT, CHAT_PATH, connect, post, request_bytes, served
from tests.gateway.fake_api import FakeApi, deltas, end, generated, hanging, started, text

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock.v1 import model_manager_pb2 as pb
    from tests.gateway.clients import RawConnection

STREAM = {**CHAT, "stream": True}
WAY_OUT_SECONDS = 20


@contextlib.asynccontextmanager
async def stopped_at_once(api: FakeApi, asked: asyncio.Event) -> AsyncGenerator[RawConnection]:
    """Give a client whose request for the models ran, `asked` says since when, as its gateway was stopped."""
    at_once = asyncio.Event()
    async with asyncio.timeout(WAY_OUT_SECONDS):
        async with serve(api, port=0, drain_seconds=1000, at_once=at_once) as gateway:
            raw = await connect(gateway)
            await raw.send(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await asked.wait()
            at_once.set()
        yield raw
    await raw.close()


async def test_the_real_port_is_known_when_a_free_one_was_asked_for() -> None:
    async with served(FakeApi()) as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert gateway.port != 0
    assert response.status_code == 200


async def test_a_taken_port_is_one_clear_error() -> None:
    async with served(FakeApi()) as gateway:
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{gateway.port}: another program has the port"):
            async with serve(FakeApi(), port=gateway.port):
                pass


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 0), ("a..b", 0), ("127.0.0.1", 65536)])
async def test_an_address_that_cannot_be_listened_on_is_one_clear_error(host: str, port: int) -> None:
    with pytest.raises(ListenError, match=f"Cannot listen for HTTP on {host}:{port}: ."):
        async with serve(FakeApi(), host, port):
            pass


async def test_the_signals_stay_with_the_host() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async with served(FakeApi()):
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    assert during == before


async def test_on_loopback_only_loopback_names_are_answered() -> None:
    async with served(FakeApi()) as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        named = await client.get("/health", headers={"host": f"localhost:{gateway.port}"})
        rebound = await client.get("/health", headers={"host": f"evil.example:{gateway.port}"})

    assert (named.status_code, rebound.status_code) == (200, 403)


async def test_on_other_addresses_any_name_is_answered() -> None:
    async with (
        serve(FakeApi(), "0.0.0.0", 0) as gateway,  # noqa: S104 - what the test is about
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as client,
    ):
        response = await client.get("/health", headers={"host": "box.lan"})

    assert response.status_code == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_ipv6_addresses_work() -> None:
    async with (
        serve(FakeApi(), "::1", 0) as gateway,
        httpx.AsyncClient(base_url=gateway.url) as client,
    ):
        response = await client.get("/health")

    assert gateway.url == f"http://[::1]:{gateway.port}"
    assert response.status_code == 200


async def test_running_streams_finish_while_the_gateway_drains_and_nothing_new_is_accepted() -> None:
    go = asyncio.Event()

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        yield started()
        await go.wait()
        yield deltas(text("the end"))
        yield deltas(end())
        yield generated()

    api = FakeApi(behave)
    leaving = asyncio.Event()

    async def host() -> None:
        async with serve(api, port=0, drain_seconds=10) as gateway:
            ports.append(gateway.port)
            up.set()
            await leaving.wait()

    ports: list[int] = []
    up = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(host())
        await up.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
        writer.write(request_bytes(CHAT_PATH, STREAM))
        await reader.readuntil(b"\r\n\r\n")
        leaving.set()
        await _until_refused(ports[0])
        go.set()
        rest = await reader.read()
        writer.close()
        await writer.wait_closed()

    assert b"the end" in rest
    assert b"data: [DONE]" in rest
    assert api.cancelled == 0


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_what_still_runs_at_the_end_of_the_drain_is_told_so(body: dict[str, object]) -> None:
    api = FakeApi(hanging(started(), deltas(text("a"))))

    async with served(api, drain_seconds=0.3) as gateway:
        raw = await connect(gateway)
        await raw.send(request_bytes(CHAT_PATH, body))
        await api.until(lambda: api.running == 1)
    answer = await raw.read_rest()
    await raw.close()

    assert b'"code":"shutting_down"' in answer
    assert b"[DONE]" not in answer
    assert api.cancelled == 1
    assert answer.startswith(b"HTTP/1.1 200" if "stream" in body else b"HTTP/1.1 503")


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_stopping_at_once_does_not_wait_for_the_drain(body: dict[str, object]) -> None:
    api = FakeApi(hanging(started(), deltas(text("a"))))
    at_once = asyncio.Event()

    async with asyncio.timeout(WAY_OUT_SECONDS):
        async with serve(api, port=0, drain_seconds=1000, at_once=at_once) as gateway:
            raw = await connect(gateway)
            await raw.send(request_bytes(CHAT_PATH, body))
            await api.until(lambda: api.running == 1)
            asyncio.get_running_loop().call_later(0.2, at_once.set)
        answer = await raw.read_rest()
    await raw.close()

    assert b'"code":"shutting_down"' in answer
    assert answer.startswith(b"HTTP/1.1 200" if "stream" in body else b"HTTP/1.1 503")


async def test_a_request_that_only_asks_is_told_too_and_nothing_is_logged_as_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = FakeApi()
    asked = asyncio.Event()

    async def never(request: object) -> None:
        del request
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(api, "list", never)
    async with stopped_at_once(api, asked) as raw:
        answer = await raw.read_rest()

    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"shutting_down"' in answer
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


async def test_a_request_that_does_not_end_when_it_is_told_to_is_cut_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "AT_ONCE_SECONDS", 0.2)
    monkeypatch.setattr(serving, "CUT_SECONDS", 0.5)
    api = FakeApi()
    asked = asyncio.Event()

    async def stubborn(request: object) -> None:
        del request
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    monkeypatch.setattr(api, "list", stubborn)
    async with stopped_at_once(api, asked) as raw:
        with contextlib.suppress(ConnectionError):
            assert await raw.read_rest() == b""

    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []
    assert [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_stopping_does_not_wait_for_idle_connections() -> None:
    async with served(FakeApi(), drain_seconds=1000) as gateway:
        raw = await connect(gateway)
        await raw.send(request_bytes(CHAT_PATH, CHAT))
        await raw.read_until(b"}")

    await raw.read_rest()
    await raw.close()


async def test_an_error_of_the_host_still_stops_the_gateway() -> None:
    ports: list[int] = []

    async def host() -> None:
        async with served(FakeApi()) as gateway:
            ports.append(gateway.port)
            message = "the host fails"
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="the host fails"):
        await host()
    await _until_refused(ports[0])


async def _until_refused(port: int) -> None:
    """Wait until nothing accepts connections at a port any more."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.01)
