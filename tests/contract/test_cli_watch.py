"""`paddock watch` and `paddock logs -f` on a real server with fake workers, over a network that breaks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from paddock.cli.watch import Event, Lost, StartedOver, follow
from paddock.client import Client
from paddock.types import ModelChanged, ModelState, Synced
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.fakes.relay import relay
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from paddock_server.app import RunningServer

WAY_OUT_SECONDS = 30
INTERRUPTED = (130, -signal.SIGINT)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_noise(tmp_path / "a.gguf")
    write_sidecar(tmp_path / "a.gguf", stderr_lines=("first words", "last words"))
    return tmp_path


def real_server(directory: Path, port: int = 0) -> AbstractAsyncContextManager[RunningServer]:
    config = ServerConfig.load(
        {"models_dir": (directory,), "grpc_port": port, "state_dir": None, "drain_seconds": 0}
    )
    return serving(config, launcher=fake_launcher())


async def until(
    events: AsyncGenerator[Event], wanted: Callable[[Event], bool], seen: list[Event] | None = None
) -> Event:
    """Read up to the event that is wanted, and return it. Adds all to `seen`."""
    async with asyncio.timeout(WAY_OUT_SECONDS):
        async for event in events:
            if seen is not None:
                seen.append(event)
            if wanted(event):
                return event
    raise AssertionError(seen)


def loaded(event: Event) -> bool:
    return isinstance(event, ModelChanged) and event.model.state is ModelState.LOADED


async def load(client: Client, model: str = "a") -> None:
    async with client.load(model) as stream:
        await stream.wait()


async def test_changes_made_while_the_connection_was_cut_are_not_missed(directory: Path) -> None:
    seen: list[Event] = []
    async with (
        real_server(directory) as server,
        relay(server.grpc_address) as network,
        Client.connect(server.grpc_address) as direct,
        Client.connect(network.address) as client,
        aclosing(follow(client, reconnect_seconds=WAY_OUT_SECONDS)) as events,
    ):
        await until(events, lambda event: isinstance(event, Synced))
        network.cut()
        await load(direct)
        await until(events, loaded, seen)

    states = [event.model.state for event in seen if isinstance(event, ModelChanged)]
    assert states == [ModelState.LOADING, ModelState.LOADED]
    assert [type(event) for event in seen if not isinstance(event, ModelChanged | Synced)] == [Lost]


async def test_a_restarted_server_is_watched_from_its_start_and_the_watch_says_so(directory: Path) -> None:
    seen: list[Event] = []
    async with AsyncExitStack() as life:
        first = await life.enter_async_context(real_server(directory))
        port = int(first.grpc_address.rpartition(":")[2])
        async with (
            Client.connect(first.grpc_address) as client,
            aclosing(follow(client, reconnect_seconds=WAY_OUT_SECONDS)) as events,
        ):
            await until(events, lambda event: isinstance(event, Synced))
            await life.aclose()
            async with real_server(directory, port):
                await until(events, lambda event: isinstance(event, StartedOver), seen)
                await until(events, lambda event: isinstance(event, Synced), seen)
                await load(client)
                await until(events, loaded, seen)

    assert [type(event) for event in seen if isinstance(event, Lost | StartedOver)] == [Lost, StartedOver]


@asynccontextmanager
async def command(server: RunningServer, *arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", "-m", "paddock", *arguments),
        env={**os.environ, "PADDOCK_SERVER": server.grpc_address},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(WAY_OUT_SECONDS):
        return (await process.stdout.readline()).decode()


async def interrupt(process: asyncio.subprocess.Process) -> int:
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(WAY_OUT_SECONDS):
        return await process.wait()


async def test_watch_writes_one_event_of_json_a_line_until_ctrl_c(directory: Path) -> None:
    async with (
        real_server(directory) as server,
        Client.connect(server.grpc_address) as client,
        command(server, "watch", "--json") as watching,
    ):
        first: list[dict[str, Any]] = [json.loads(await read_line(watching)) for _ in range(2)]
        await load(client)
        then: list[dict[str, Any]] = [json.loads(await read_line(watching)) for _ in range(2)]
        code = await interrupt(watching)

    assert [event["event"] for event in first + then] == ["changed", "synced", "changed", "changed"]
    assert [event["model"]["state"] for event in then] == ["loading", "loaded"]
    assert [event["previous_state"] for event in then] == ["unloaded", "loading"]
    assert code in INTERRUPTED


async def test_watch_writes_a_line_a_change_for_a_person(directory: Path) -> None:
    make_noise(directory / "other.gguf")
    async with (
        real_server(directory) as server,
        Client.connect(server.grpc_address) as client,
        command(server, "watch", "a") as watching,
    ):
        assert (await read_line(watching)).split()[1:] == ["a", "unloaded"]
        await load(client, "other")
        await load(client)
        assert (await read_line(watching)).split()[1:] == ["a", "unloaded", "->", "loading"]
        assert (await read_line(watching)).split()[1:] == ["a", "loading", "->", "loaded"]
        (directory / "a.gguf").unlink()
        await client.unload("a")
        assert (await read_line(watching)).split()[1:] == ["a", "loaded", "->", "unloading"]
        assert await interrupt(watching) in INTERRUPTED


async def test_logs_follow_a_model_over_its_workers_until_ctrl_c(directory: Path) -> None:
    async with (
        real_server(directory) as server,
        Client.connect(server.grpc_address) as client,
        command(server, "logs", "-f", "-t", "a") as following,
    ):
        lines: list[str] = []
        for count in (2, 5):
            await load(client)
            while len(lines) < count:
                lines.append(await read_line(following))
            await client.unload("a")
        code = await interrupt(following)
        assert following.stderr is not None
        notes = (await following.stderr.read()).decode()

    assert code in INTERRUPTED
    worker = ["first words", "last words", "shutdown"]
    assert [line.split("  ", 1)[1].rstrip() for line in lines] == [*worker, *worker[:2]]
    assert notes.count("--- worker ") == 1, "a second worker is told from the first"


async def test_logs_of_a_model_that_goes_end_by_themselves(directory: Path) -> None:
    async with (
        real_server(directory) as server,
        Client.connect(server.grpc_address) as client,
        client.logs("a", follow=True) as stream,
    ):
        await load(client)
        assert (await anext(stream)).text == "first words"
        (directory / "a.gguf").unlink()
        await client.unload("a")
        with pytest.raises(Exception, match="nobody"):
            await client.get("nobody")
        async with asyncio.timeout(WAY_OUT_SECONDS):
            rest = [line.text async for line in stream]

    assert rest[0] == "last words"


async def test_watch_says_why_a_model_changed(directory: Path) -> None:
    async with (
        real_server(directory) as server,
        Client.connect(server.grpc_address) as client,
        command(server, "watch", "a") as watching,
    ):
        await read_line(watching)
        await load(client)
        for _ in range(2):
            await read_line(watching)
        worker = (await client.get("a")).worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        line = (await read_line(watching)).rstrip()
        assert line.endswith("  a  loaded -> loading: The worker of model 'a' was ended by SIGKILL.")


async def test_watch_of_a_model_that_is_not_there_says_so(directory: Path) -> None:
    async with real_server(directory) as server, command(server, "watch", "nope") as watching:
        assert watching.stderr is not None
        async with asyncio.timeout(WAY_OUT_SECONDS):
            words = (await watching.stderr.read()).decode()
            assert await watching.wait() == 3
    assert "There is no model named 'nope'" in words
