"""The stop ladder: ask, tell, kill. Each step is a log event, and a kill is always a warning."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Protocol

from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.supervisor.timeouts import SupervisorTimeouts


class Stoppable(Protocol):
    """What the ladder needs of a process."""

    @property
    def exited(self) -> asyncio.Future[int]:
        """Resolves once the process has been reaped."""
        ...

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and whatever it started."""
        ...


class FrameSink(Protocol):
    """What the ladder needs of a connection."""

    def send(self, frame: worker_pb2.ServerFrame) -> None:
        """Send a frame."""
        ...


async def descend(
    process: Stoppable,
    connection: FrameSink,
    *,
    grace_seconds: float,
    hurried: asyncio.Event,
    timeouts: SupervisorTimeouts,
    log: FilteringBoundLogger,
) -> bool:
    """End a process, each step harder than the one before, and say whether it is gone.

    `hurried` ends the grace when it is set. Takes at most `grace_seconds` and the two time-outs `terminate`
    and `kill`.
    """
    log.info("worker_shutdown_sent", grace_seconds=grace_seconds)
    connection.send(worker_pb2.ServerFrame(shutdown=worker_pb2.Shutdown()))
    hurry = asyncio.create_task(hurried.wait())
    try:
        await asyncio.wait(
            {process.exited, hurry}, timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        hurry.cancel()
    if process.exited.done():
        return True
    log.info("worker_terminated", signal="SIGTERM", waited_seconds=grace_seconds)
    process.signal_group(signal.SIGTERM)
    if await is_gone(process, timeouts.terminate):
        return True
    log.warning("worker_killed", signal="SIGKILL", cause="it did not stop", waited_seconds=timeouts.terminate)
    process.signal_group(signal.SIGKILL)
    if await is_gone(process, timeouts.kill):
        return True
    log.error("worker_unkillable", waited_seconds=timeouts.kill)
    return False


async def is_gone(process: Stoppable, seconds: float) -> bool:
    """Wait at most so long for a process to be reaped, and say whether it has been."""
    await asyncio.wait({process.exited}, timeout=seconds)
    return process.exited.done()
