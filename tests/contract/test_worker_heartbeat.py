"""A worker that stops beating, as the manager sees it: killed, said aloud, and replaced."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from contextlib import aclosing
from typing import TYPE_CHECKING

import psutil
import pytest
import structlog

from paddock.errors import PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import Catalog
from paddock_server.manager import ManagerConfig, ModelManager
from paddock_server.supervisor import RestartPolicy
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import QUICK, fake_launcher
from tests.fakes.polling import eventually
from tests.listing import models_of
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

BEATING = Behaviour(heartbeat_seconds=0.05, tokens_per_second=50.0)
HANG_SECONDS = 1.0


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncGenerator[ModelManager]:
    make_noise(tmp_path / "a.gguf")
    manager = ModelManager(
        catalog=Catalog([tmp_path]),
        launcher=fake_launcher(BEATING, timeouts=dataclasses.replace(QUICK, hang=HANG_SECONDS)),
        config=ManagerConfig(stop_grace_seconds=1.0, restart=RestartPolicy(max_delay_seconds=0.05)),
    )
    await manager.start()
    async with aclosing(manager.subscribe_load(pb.LoadRequest(model="a"))) as events:
        async for _ in events:
            pass
    yield manager
    await manager.stop(drain_seconds=0)


def now(manager: ModelManager) -> model_pb2.Model:
    (model,) = models_of(manager)
    return model


async def restarted(manager: ModelManager, frozen: int) -> model_pb2.Model:
    """Wait for a worker in place of the frozen one, and return the model."""
    await eventually(
        lambda: (
            now(manager).state == model_pb2.MODEL_STATE_LOADED and now(manager).worker.pid not in {0, frozen}
        ),
        lambda: now(manager),
    )
    return now(manager)


async def test_an_idle_worker_that_stops_beating_is_killed_and_replaced_loudly(manager: ModelManager) -> None:
    frozen = now(manager).worker.pid
    with structlog.testing.capture_logs() as entries:
        os.kill(frozen, signal.SIGSTOP)
        model = await restarted(manager, frozen)

    assert not psutil.pid_exists(frozen)
    assert model.worker.restart_count == 1
    assert model.last_failure.reason == Reason.WORKER_CRASHED
    assert "it sent nothing for 1 s" in model.last_failure.message
    loud = [entry["event"] for entry in entries if entry["log_level"] == "warning"]
    assert loud[:2] == ["worker_killed", "worker_crashed"]


async def test_a_request_on_a_worker_that_stops_beating_ends_and_the_next_one_is_served(
    manager: ModelManager,
) -> None:
    async def generate(max_tokens: int) -> int:
        request = pb.GenerateRequest(model="a", prompt="hi")
        request.stop.max_tokens = max_tokens
        tokens = 0
        lease = await manager.acquire("a")
        async with lease, lease.worker.generate(request) as updates:
            async for update in updates:
                tokens += sum(delta.token_count for delta in update.deltas.deltas)
                begun.set()
        return tokens

    begun = asyncio.Event()
    frozen = now(manager).worker.pid
    running = asyncio.create_task(generate(100_000))
    await begun.wait()
    os.kill(frozen, signal.SIGSTOP)

    with pytest.raises(PaddockError) as caught:
        await running
    assert caught.value.reason == Reason.WORKER_CRASHED
    assert caught.value.retry_after_seconds is not None
    assert await generate(3) == 3
