"""Tasks beside the callers: none is lost, and a failure is told to the caller or logged, never both."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from paddock.errors import PaddockError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()

ResultT = TypeVar("ResultT")


class Tasks:
    """Those that run."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something that nobody waits for. It tells of a `PaddockError` itself."""
        task = self._begin(work, name)
        task.add_done_callback(_log_bug)
        return task

    async def finish(self, work: Coroutine[Any, Any, ResultT], name: str) -> ResultT:
        """Do something and return what comes of it.

        Cancelling leaves it running: half of it would leave others waiting, or files without their model.
        """
        task = self._begin(work, name)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def ended(self, seconds: float) -> None:
        """Wait until nothing is left running, at most that long."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def cancel(self) -> None:
        """Cancel all, and wait until they have ended."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, ResultT], name: str) -> asyncio.Task[ResultT]:
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


def _log_bug(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, PaddockError):
        log.critical("task_bug", task=task.get_name(), exc_info=error)


def _log_failure(task: asyncio.Task[Any]) -> None:
    """Log what the caller no longer hears."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, PaddockError):
        log.warning("task_failed", task=task.get_name(), reason=str(error.reason), error=error.message)
    else:
        _log_bug(task)
