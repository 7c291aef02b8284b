"""A server with workers and nothing else, to be killed: prints the ids of its workers and waits."""

from __future__ import annotations

import asyncio
import json
import sys

import structlog

from paddock_server.supervisor import LogRing, WorkerSpec
from paddock_server.worker.v1 import worker_pb2
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import fake_launcher


async def run() -> None:
    """Start one worker that serves and one that is stuck in its load, neither of which obeys SIGTERM."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    launcher = fake_launcher(Behaviour(ignore_sigterm=True, hang_in_load=True))
    first = await launcher.start(WorkerSpec("first", "1", LogRing()))
    second = await launcher.start(WorkerSpec("second", "2", LogRing()))
    half = asyncio.Event()

    def on_progress(progress: worker_pb2.LoadProgress) -> None:
        if progress.fraction >= 0.5:
            half.set()

    load = worker_pb2.Load(model_path="/nowhere")
    loading = asyncio.create_task(second.load(load, on_progress, size_bytes=0))
    await half.wait()
    sys.stdout.write(json.dumps([first.pid, second.pid]) + "\n")
    sys.stdout.flush()
    await loading


if __name__ == "__main__":
    asyncio.run(run())
