"""Real processes on both event loops; and after every test nothing may be left of them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import pytest
import uvloop

from paddock_server.supervisor import LogRing, SupervisorTimeouts, Worker, WorkerSpec
from paddock_server.worker.v1 import worker_pb2
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import QUICK, fake_launcher
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test here on asyncio's own loop and on uvloop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def open_descriptors() -> Counter[str]:
    """Count what this process has open, by kind or path. Not by number: uvloop makes its own sockets anew."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[str(entry.readlink()).partition(":[")[0]] += 1
        except FileNotFoundError:  # the listing's own
            continue
    del found["/dev/null"]  # libuv keeps one in reserve from its first pipe on
    return found


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def workers_left(others: set[psutil.Process]) -> list[str]:
    """Return the command lines of this process' workers and of what they left behind, apart from `others`."""
    left: list[str] = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if f"--parent-pid {os.getpid()}" in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            left.append(command)
    return [*left, *(f"child {child.pid}" for child in descendants() - others)]


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """Fail a test that leaves a process or an open descriptor."""
    before = open_descriptors()
    others = descendants()  # a server that other tests share
    yield
    await eventually(lambda: not workers_left(others), lambda: workers_left(others))
    await eventually(lambda: open_descriptors() <= before, lambda: open_descriptors() - before)


@pytest.fixture
def ring() -> LogRing:
    """The log of the model under test."""
    return LogRing()


class StartWorker(Protocol):
    """Starts a fake worker that behaves as told; see `Behaviour`."""

    async def __call__(self, *, timeouts: SupervisorTimeouts = QUICK, **behaviour: Any) -> Worker: ...


@pytest.fixture
async def start(ring: LogRing) -> AsyncIterator[StartWorker]:
    """Start workers, which are stopped after the test."""
    started: list[Worker] = []

    async def start_worker(*, timeouts: SupervisorTimeouts = QUICK, **behaviour: Any) -> Worker:
        launcher = fake_launcher(Behaviour(**behaviour), timeouts=timeouts)
        worker = await launcher.start(WorkerSpec("m", f"load-{len(started) + 1}", ring))
        started.append(worker)
        return worker

    yield start_worker
    for worker in started:
        await worker.stop(grace_seconds=0)


@pytest.fixture
async def start_loaded(start: StartWorker) -> StartWorker:
    """Start workers that have loaded their model."""

    async def start_worker(*, timeouts: SupervisorTimeouts = QUICK, **behaviour: Any) -> Worker:
        worker = await start(timeouts=timeouts, **behaviour)
        await worker.load(LOAD, lambda _: None, size_bytes=0)
        return worker

    return start_worker


LOAD = worker_pb2.Load(model_path="/nowhere/m.gguf", slot_count=8, queue_limit=8)
