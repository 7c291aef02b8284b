"""Tasks beside the callers: none is lost, and a bug in one is logged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from paddock.errors import PaddockError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()


class Tasks:
    """Those that run."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something to its end."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel(self) -> None:
        """Cancel all, and wait until they have ended."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PaddockError):
            log.critical("task_bug", task=task.get_name(), exc_info=error)
