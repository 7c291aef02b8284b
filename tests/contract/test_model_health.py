"""Every model's health in `grpc.health.v1`, over the real server with fake workers."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paddock.errors import PaddockError
from paddock.transport import GrpcApi, connect
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from paddock_server.manager.events import BACKLOG_LENGTH
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from paddock.api import ModelManagerApi
    from paddock_server.app import RunningServer

# The stub packages know only the synchronous stubs.
HEALTH: Any = health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

WAY_OUT_SECONDS = 30


class Serving:
    """A server, its API and its health stub, over one channel."""

    def __init__(self, directory: Path, channel: grpc.aio.Channel) -> None:
        self.directory = directory
        self.api: ModelManagerApi = GrpcApi(channel)
        self.stub: Any = HEALTH.HealthStub(channel)

    def watch(self, service: str) -> Any:
        return self.stub.Watch(health_pb2.HealthCheckRequest(service=service))

    async def check(self, service: str) -> int:
        return (await self.stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def load(self, model: str) -> None:
        async with aclosing(self.api.load(pb.LoadRequest(model=model))) as responses:
            async for _ in responses:
                pass

    async def scan(self) -> None:
        """Have the server look at its directory: a name it does not know makes it."""
        with pytest.raises(PaddockError):
            await self.api.get(pb.GetRequest(model="nobody"))


def real_server(directory: Path) -> AbstractAsyncContextManager[RunningServer]:
    config = ServerConfig.load(
        {"models_dir": (directory,), "grpc_port": 0, "state_dir": None, "drain_seconds": 0}
    )
    return serving(config, launcher=fake_launcher())


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[Serving]:
    for name in ("a", "refuses"):
        make_noise(tmp_path / f"{name}.gguf")
    write_sidecar(tmp_path / "refuses.gguf", fail_load_reason="UNSUPPORTED_MODEL")
    async with real_server(tmp_path) as running, connect(running.grpc_address) as channel:
        yield Serving(tmp_path, channel)


async def read(watch: Any, until: int | None = None) -> list[int]:
    """Return statuses up to and with `until`, or one."""
    statuses: list[int] = []
    async with asyncio.timeout(WAY_OUT_SECONDS):
        while True:
            response = await watch.read()
            assert response is not grpc.aio.EOF, statuses
            statuses.append(response.status)
            if until in {None, response.status}:
                return statuses


async def test_a_model_serves_while_it_is_loaded_and_not_before_and_after(server: Serving) -> None:
    watch = server.watch("model/a")
    before = await read(watch)
    await server.load("a")
    loaded = await read(watch, until=SERVING)
    checked = await server.check("model/a")
    await server.api.unload(pb.UnloadRequest(model="a"))
    after = await read(watch)
    watch.cancel()

    assert (before, loaded[-1], after) == ([NOT_SERVING], SERVING, [NOT_SERVING])
    assert checked == SERVING
    assert await server.check("model/a") == NOT_SERVING


async def test_a_model_whose_load_failed_does_not_serve(server: Serving) -> None:
    with pytest.raises(PaddockError):
        await server.load("refuses")

    assert await server.check("model/refuses") == NOT_SERVING
    assert await server.check("") == SERVING, "the server itself is well"


async def test_the_health_of_a_model_begins_and_ends_with_its_file(server: Serving) -> None:
    watch = server.watch("model/late")
    unknown = await read(watch)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.check("model/late")

    shutil.copy(server.directory / "a.gguf", server.directory / "late.gguf")
    await server.scan()
    appeared = await read(watch)
    (server.directory / "late.gguf").unlink()
    await server.scan()
    gone = await read(watch)
    watch.cancel()

    assert (unknown, appeared, gone) == ([SERVICE_UNKNOWN], [NOT_SERVING], [SERVICE_UNKNOWN])
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_more_models_at_once_than_a_watch_may_be_behind_are_all_known_in_the_end(
    server: Serving,
) -> None:
    names = [f"m{number:04}" for number in range(BACKLOG_LENGTH + 100)]
    watch = server.watch(f"model/{names[-1]}")
    assert await read(watch) == [SERVICE_UNKNOWN]
    for name in names:
        (server.directory / f"{name}.gguf").hardlink_to(server.directory / "a.gguf")
    await server.scan()
    await read(watch, until=NOT_SERVING)
    watch.cancel()

    async with asyncio.timeout(WAY_OUT_SECONDS):
        assert {await server.check(f"model/{name}") for name in names} == {NOT_SERVING}


async def test_at_shutdown_a_loaded_model_stops_serving_like_the_rest(tmp_path: Path) -> None:
    make_noise(tmp_path / "a.gguf")
    async with AsyncExitStack() as life:
        running = await life.enter_async_context(real_server(tmp_path))
        async with connect(running.grpc_address) as channel:
            server = Serving(tmp_path, channel)
            await server.load("a")
            watches = [server.watch(service) for service in ("model/a", "")]
            before = [(await read(watch, until=SERVING))[-1] for watch in watches]
            stop = asyncio.create_task(life.aclose())
            after = [(await read(watch))[0] for watch in watches]
            await stop

    assert (before, after) == ([SERVING, SERVING], [NOT_SERVING, NOT_SERVING])
