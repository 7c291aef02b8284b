"""Streams and processes as the tests of the supervisor look at them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import psutil

from paddock.v1 import model_manager_pb2 as pb
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from paddock_server.supervisor import Generation, LogRing, Worker

ENDLESS: Final = 1_000_000
"""More tokens than any test waits for."""


def ask(max_tokens: int, *, prompt: str = "hi") -> pb.GenerateRequest:
    """Make a request for so many tokens."""
    request = pb.GenerateRequest(prompt=prompt)
    request.stop.max_tokens = max_tokens
    return request


def expected_text(token_count: int) -> str:
    """Return what the fake worker says in so many tokens."""
    return " ".join(f"tok{index}" for index in range(token_count))


async def read_text(generation: Generation) -> str:
    """Read a generation to its end."""
    return "".join([delta.text async for update in generation for delta in update.deltas.deltas])


class Reader:
    """A stream read in a task of its own, to its end."""

    def __init__(self, worker: Worker, max_tokens: int = ENDLESS) -> None:
        self.text = ""
        self.task = asyncio.create_task(self._read(worker, max_tokens))

    async def _read(self, worker: Worker, max_tokens: int) -> None:
        async with worker.generate(ask(max_tokens)) as generation:
            async for update in generation:
                self.text += "".join(delta.text for delta in update.deltas.deltas)


async def running_readers(worker: Worker, count: int) -> list[Reader]:
    """Start endless streams and wait until each has text."""
    readers = [Reader(worker) for _ in range(count)]
    await eventually(lambda: all(reader.text for reader in readers))
    return readers


async def grandchild_of(ring: LogRing) -> psutil.Process:
    """Return the process that a fake worker left, once it has said its name."""
    await eventually(lambda: ring.end > 0)
    return psutil.Process(int(ring.read(0).lines[0].text.removeprefix("grandchild ")))


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process runs. A zombie does not, and an orphaned one is for init to reap."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
