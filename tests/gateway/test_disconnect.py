"""A client that goes away stops its generation, and one that waits is kept in touch: on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from structlog.testing import capture_logs

from paddock_gateway.app import GatewayOptions, create_app
from tests.gateway.clients import (
    CHAT,
    CHAT_PATH,
    COMPLETION,
    COMPLETION_PATH,
    RawConnection,
    connection,
    request_bytes,
    sdk,
    served,
)
from tests.gateway.fake_api import FakeApi, deltas, end, generated, hanging, saying, started, text

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import Message

    from paddock.v1 import model_manager_pb2 as pb

STREAM = {**CHAT, "stream": True}


async def endless(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
    """Never stop talking."""
    del request
    yield started()
    while True:
        await asyncio.sleep(0)
        yield deltas(text("word " * 200))


async def send(raw: RawConnection, body: dict[str, Any], path: str = CHAT_PATH) -> None:
    await raw.send(request_bytes(path, body))


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_hanging_up_while_the_model_loads_stops_the_request(body: dict[str, Any]) -> None:
    api = FakeApi(hanging())

    with capture_logs() as logs:
        async with served(api) as gateway, connection(gateway) as raw:
            await send(raw, body)
            await api.until(lambda: api.running == 1)
            await raw.close()
            await api.until(lambda: api.running == 0)

    assert api.cancelled == 1
    (line,) = [entry for entry in logs if entry["event"] == "http_request"]
    assert (line["status"], line["reason"], line["model"]) == (499, "CLIENT_GONE", "tiny")


async def test_hanging_up_in_the_middle_of_a_document_stops_the_generation() -> None:
    api = FakeApi(hanging(started(), deltas(text("a"))))

    async with served(api) as gateway, connection(gateway) as raw:
        await send(raw, CHAT)
        await api.until(lambda: api.running == 1)
        await raw.close()
        await api.until(lambda: api.running == 0)

    assert api.cancelled == 1


async def test_hanging_up_in_the_middle_of_a_stream_stops_the_generation() -> None:
    api = FakeApi(endless)

    with capture_logs() as logs:
        async with served(api) as gateway, connection(gateway) as raw:
            await send(raw, STREAM)
            await raw.read_until(b"word word")
            await raw.close()
            await api.until(lambda: api.running == 0)

    assert api.cancelled == 1
    (line,) = [entry for entry in logs if entry["event"] == "http_request"]
    assert (line["status"], line["reason"]) == (200, "CLIENT_GONE")
    assert line["completion_tokens"] > 0


async def test_hanging_up_stops_every_generation_of_a_list_of_prompts() -> None:
    api = FakeApi(hanging(started()))

    async with served(api) as gateway, connection(gateway) as raw:
        await send(raw, {**COMPLETION, "prompt": ["a", "b", "c"]}, COMPLETION_PATH)
        await api.until(lambda: api.running == 3)
        await raw.close()
        await api.until(lambda: api.running == 0)

    assert api.cancelled == 3


async def test_leaving_the_sdks_stream_stops_the_generation() -> None:
    api = FakeApi(endless)

    async with sdk(api) as client:
        chunks = await client.chat.completions.create(**CHAT, stream=True)
        async with chunks:
            async for chunk in chunks:
                if chunk.choices[0].delta.content:
                    break
        await api.until(lambda: api.running == 0)

    assert api.cancelled == 1


async def test_hanging_up_during_the_body_is_no_error() -> None:
    api = FakeApi()

    with capture_logs() as logs:
        async with served(api) as gateway, connection(gateway) as raw:
            await raw.send(request_bytes(CHAT_PATH, CHAT)[:-5])
            await raw.close()

    assert api.requests == []
    (line,) = [entry for entry in logs if entry["event"] == "http_request"]
    assert (line["status"], line["reason"]) == (499, "CLIENT_GONE")


async def test_hanging_up_on_done_is_a_success() -> None:
    left = asyncio.Event()

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        yield started()
        yield deltas(end())
        yield generated()
        await left.wait()  # the server still tidies up when the client has gone

    api = FakeApi(behave)

    with capture_logs() as logs:
        async with served(api) as gateway, connection(gateway) as raw:
            await send(raw, STREAM)
            await raw.read_until(b"data: [DONE]\n\n")
            await raw.close()
            async with httpx.AsyncClient(base_url=gateway.url) as other:
                # By the time these are answered the gateway has seen the first connection end.
                for _ in range(3):
                    await other.get("/health")
            left.set()
            await api.until(lambda: api.running == 0)

    assert api.cancelled == 0
    (line,) = [entry for entry in logs if entry.get("route") == CHAT_PATH]
    assert line["status"] == 200
    assert "reason" not in line


async def test_a_silent_stream_is_kept_alive_with_comments_once_it_has_headers() -> None:
    slot = asyncio.Event()

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        await slot.wait()
        yield started()
        await asyncio.Event().wait()

    options = GatewayOptions(ping_interval_seconds=0.01)

    async with served(FakeApi(behave), options=options) as gateway, connection(gateway) as raw:
        await send(raw, STREAM)
        await asyncio.sleep(0.05)  # several intervals: nothing may be sent before there is a slot
        slot.set()
        head = await raw.read_until(b"\r\n\r\n")
        first = await raw.read_until(b"\n\n")
        second = await raw.read_until(b"\n\n")
        third = await raw.read_until(b"\n\n")

    assert head.startswith(b"HTTP/1.1 200")
    assert b'"role":"assistant"' in first
    assert second.endswith(b": ping\n\n")
    assert third.endswith(b": ping\n\n")


async def test_the_sdk_skips_the_comments() -> None:
    async def slow(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        yield started()
        await asyncio.sleep(0.05)
        yield deltas(text("a"))
        yield deltas(end())
        yield generated()

    async with sdk(FakeApi(slow), options=GatewayOptions(ping_interval_seconds=0.01)) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]

    assert [chunk.choices[0].delta.content for chunk in chunks] == [None, "a", None]


async def test_a_client_that_stops_reading_counts_as_gone() -> None:
    api = FakeApi(endless)
    options = GatewayOptions(ping_interval_seconds=0.01, stalled_client_seconds=0.05)

    async with served(api, options=options) as gateway, connection(gateway) as raw:
        await send(raw, STREAM)
        await raw.read_until(b"\r\n\r\n")
        await api.until(lambda: api.running == 0)

    assert api.cancelled == 1


def is_start(message: Message) -> bool:
    return message["type"] == "http.response.start"


def is_end(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body")


@pytest.mark.parametrize("stalls", [is_start, is_end], ids=["head", "end"])
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT_PATH, CHAT, 200),
        ("POST", CHAT_PATH, STREAM, 200),
        ("POST", COMPLETION_PATH, {**COMPLETION, "prompt": ["a", "b"], "stream": True}, 200),
        ("POST", CHAT_PATH, {"model": "tiny"}, 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/nowhere", None, 404),
    ],
    ids=["document", "stream", "streams", "error", "models", "no route"],
)
async def test_the_last_sends_wait_no_longer_for_a_client_than_those_of_a_stream(
    stalls: Callable[[Message], bool], method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    app = create_app(FakeApi(), GatewayOptions(stalled_client_seconds=0.01))
    requests: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Message:
        if not requests:
            await asyncio.Event().wait()
        return requests.pop()

    async def never_read(message: Message) -> None:
        if stalls(message):
            await asyncio.Event().wait()

    with capture_logs() as logs:
        async with asyncio.timeout(10):
            await app(
                {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""},
                receive,
                never_read,
            )

    (line,) = [entry for entry in logs if entry["event"] == "http_request"]
    assert (line["status"], line["reason"]) == (status, "CLIENT_GONE")


async def send_until_cut(raw: socket.socket) -> None:
    """Whoever sends to a connection that is gone is told so."""
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0.02)
            raw.sendall(b"x")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends such connections by itself")
async def test_the_connection_of_a_client_that_reads_nothing_is_cut() -> None:
    api = FakeApi(saying("x" * 16_000_000))  # more than the buffers of both sockets hold
    options = GatewayOptions(stalled_client_seconds=0.2)

    async with served(api, options=options) as gateway:
        with socket.create_connection((gateway.host, gateway.port)) as raw:
            # The second answer can only begin, and what waits for it only end, once the connection is gone.
            raw.sendall(request_bytes(CHAT_PATH, CHAT) * 2)
            with pytest.raises(ConnectionError):
                await send_until_cut(raw)


async def test_a_connection_serves_one_request_after_another() -> None:
    async with served(FakeApi()) as gateway, connection(gateway) as raw:
        for _ in range(3):
            await send(raw, STREAM)
            answer = await raw.read_until(b"0\r\n\r\n")

            assert answer.count(b"data: [DONE]") == 1
