"""Replicas with the real catalog and real processes: fake workers that speak the real protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import Catalog
from paddock_server.manager import ManagerConfig, ModelManager
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import fake_launcher
from tests.fakes.polling import eventually
from tests.listing import models_of
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

STREAMS = 8
SLOTS = 4


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Model `a`, of two replicas by `paddock.toml`."""
    make_noise(tmp_path / "a.gguf")
    (tmp_path / "paddock.toml").write_text('[models.a]\npath = "a.gguf"\nreplicas = 2\n')
    return tmp_path


@asynccontextmanager
async def serving(directory: Path, behaviour: Behaviour | None = None) -> AsyncGenerator[ModelManager]:
    """Run a manager; nothing of it is left afterwards."""
    others = set(psutil.Process().children())
    manager = ModelManager(
        catalog=Catalog([directory], config_file=directory / "paddock.toml"),
        launcher=fake_launcher(behaviour),
        config=ManagerConfig(stop_grace_seconds=1.0, slot_count=SLOTS),
    )
    await manager.start()
    try:
        yield manager
    finally:
        await manager.stop(drain_seconds=0)
    await eventually(lambda: set(psutil.Process().children()) <= others)


async def load(manager: ModelManager) -> model_pb2.Model:
    async with aclosing(manager.subscribe_load(pb.LoadRequest(model="a"))) as stream:
        return [event async for event in stream][-1].loaded.model


def now(manager: ModelManager) -> model_pb2.Model:
    return models_of(manager)[0]


async def generate(manager: ModelManager, max_tokens: int, begun: list[int]) -> int:
    """Generate as the service does; return the process that did it. Adds it to `begun` when it has begun."""
    lease = await manager.acquire("a")
    request = pb.GenerateRequest(model="a", prompt="hi", stop=gen.StopParams(max_tokens=max_tokens))
    async with lease, lease.worker.generate(request) as updates:
        async for update in updates:
            if update.HasField("started"):
                begun.append(lease.worker.pid)  # noqa: PERF401  # it is looked at as it goes
    return lease.worker.pid


async def test_kill_9_of_one_replica_ends_its_streams_alone_and_the_other_serves_on(directory: Path) -> None:
    async with serving(directory, Behaviour(tokens_per_second=100.0)) as manager:
        killed, other = [worker.pid for worker in (await load(manager)).workers]
        begun: list[int] = []
        streams = [asyncio.create_task(generate(manager, 200, begun)) for _ in range(STREAMS)]
        await eventually(lambda: len(begun) == STREAMS)
        assert (begun.count(killed), begun.count(other)) == (4, 4)
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: now(manager).lease_count == 4)
        assert await generate(manager, 3, begun) != killed
        ends = await asyncio.gather(*streams, return_exceptions=True)
        reasons = [end.reason for end in ends if isinstance(end, PaddockError)]
        assert reasons == [Reason.WORKER_CRASHED] * 4
        assert [end for end in ends if not isinstance(end, PaddockError)] == [other] * 4
        await eventually(lambda: len(now(manager).workers) == 2)
        model = now(manager)
        assert model.last_failure.signal == "SIGKILL"
        assert sorted(worker.restart_count for worker in model.workers) in ([0, 0], [0, 1])


async def test_while_one_replica_restarts_requests_are_served_by_the_other(directory: Path) -> None:
    async with serving(directory, Behaviour(load_seconds=0.5)) as manager:
        killed, other = [worker.pid for worker in (await load(manager)).workers]
        begun: list[int] = []
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: now(manager).last_failure.reason == Reason.WORKER_CRASHED)
        assert now(manager).state == model_pb2.MODEL_STATE_LOADED
        served = await asyncio.gather(*(generate(manager, 3, begun) for _ in range(SLOTS)))
        assert set(served) == {other}


async def test_every_replica_is_a_process_and_unload_ends_them_all(directory: Path) -> None:
    async with serving(directory) as manager:
        pids = [worker.pid for worker in (await load(manager)).workers]
        assert len(set(pids)) == 2
        await manager.unload(pb.UnloadRequest(model="a"))
        assert not any(psutil.pid_exists(pid) for pid in pids)
