"""Work that goes on to its end when its caller goes: half of it would leave others waiting, or files without
their model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class Unattended:
    """Does such work, each piece in a task of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, ResultT], name: str) -> asyncio.Task[ResultT]:
        """Begin something that nobody need wait for."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, work: Coroutine[Any, Any, ResultT], name: str) -> ResultT:
        """Do something and return what comes of it. Cancelling leaves it running."""
        return await asyncio.shield(self.begin(work, name))

    async def ended(self, seconds: float) -> None:
        """Wait until nothing is left running, at most that long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
