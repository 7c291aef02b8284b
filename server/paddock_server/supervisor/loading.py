"""Waiting for a load: news, the last sign of progress, the ceiling and the abort, in one place."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paddock.errors import PaddockError, Reason, make_error
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from paddock_server.supervisor.timeouts import SupervisorTimeouts

_STAGES: Final = {worker_pb2.LOAD_STAGE_WEIGHTS: "weights", worker_pb2.LOAD_STAGE_WARMUP: "warmup"}


@dataclass(slots=True)
class LoadInbox:
    """What came of the load in progress. Filled by the connection, emptied by `follow_load`."""

    model_id: str
    progress: list[worker_pb2.LoadProgress] = field(default_factory=list[worker_pb2.LoadProgress])
    outcome: worker_pb2.Ready | PaddockError | None = None
    answered: bool = False
    """Whether the outcome is the worker's own word."""
    aborted: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, outcome: worker_pb2.Ready | PaddockError) -> None:
        """Note the end of the load; the first one counts."""
        if self.outcome is None:
            self.outcome = outcome
            self.changed.set()


async def follow_load(
    inbox: LoadInbox,
    *,
    size_bytes: int,
    timeouts: SupervisorTimeouts,
    on_progress: Callable[[worker_pb2.LoadProgress], None],
) -> worker_pb2.Ready:
    """Hand progress on until the load has ended.

    Raises:
        PaddockError: What the worker, its death or the stop made of the load; LOAD_STALLED when it goes
            without progress for too long or over its ceiling, LOAD_ABORTED when an abort is not answered. In
            the last two cases the worker is still at it.
    """
    loop = asyncio.get_running_loop()
    start = last_news = loop.time()
    last = worker_pb2.LoadProgress(stage=worker_pb2.LOAD_STAGE_WEIGHTS)
    ceiling = start + timeouts.load_ceiling(size_bytes)
    abort_deadline: float | None = None
    while True:
        inbox.changed.clear()
        news, inbox.progress = inbox.progress, []
        for last in news:
            last_news = loop.time()
            on_progress(last)
        if isinstance(inbox.outcome, PaddockError):
            raise inbox.outcome
        if inbox.outcome is not None:
            return inbox.outcome
        if inbox.aborted and abort_deadline is None:
            abort_deadline = loop.time() + timeouts.abort
        stall = _stall_limit(last, size_bytes, timeouts)
        deadline = min(last_news + stall, ceiling) if abort_deadline is None else abort_deadline
        try:
            async with asyncio.timeout_at(deadline):
                await inbox.changed.wait()
        except TimeoutError:
            if inbox.changed.is_set():
                continue
            if abort_deadline is not None:
                raise _not_aborted(inbox.model_id, timeouts.abort) from None
            limit, seconds = (
                ("load_stall", stall) if last_news + stall < ceiling else ("load_ceiling", ceiling - start)
            )
            raise _stalled(inbox.model_id, last, limit, seconds) from None


def stage_name(stage: worker_pb2.LoadStage.ValueType) -> str:
    """Return the name of a stage in messages and metadata."""
    return _STAGES.get(stage, "unknown")


def _stall_limit(last: worker_pb2.LoadProgress, size_bytes: int, timeouts: SupervisorTimeouts) -> float:
    if last.stage == worker_pb2.LOAD_STAGE_WARMUP:
        return timeouts.load_stall_in_warmup(size_bytes)
    return timeouts.load_stall


def _stalled(model_id: str, last: worker_pb2.LoadProgress, limit: str, seconds: float) -> PaddockError:
    stage = stage_name(last.stage)
    where = f"stage {stage}, {last.fraction:.0%}"
    what = (
        f"made no progress for {seconds:g} s"
        if limit == "load_stall"
        else f"took more than {seconds:g} s, the limit for its size"
    )
    message = f"The load of model {model_id!r} {what} ({where})."
    metadata = {"model": model_id, "stage": stage, "fraction": f"{last.fraction:.3f}"}
    metadata |= {"limit": limit, "limit_seconds": f"{seconds:g}"}
    return make_error(Reason.LOAD_STALLED, message, metadata=metadata)


def _not_aborted(model_id: str, seconds: float) -> PaddockError:
    message = f"The load of model {model_id!r} was aborted; its worker did not answer within {seconds:g} s."
    return make_error(Reason.LOAD_ABORTED, message, metadata={"model": model_id})
