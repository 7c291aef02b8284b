"""Showing a load to those who called for it: everyone sees the same, nobody holds anybody up.

A view belongs to one load and is written by its actor only. A subscription belongs to one caller. What
happened is kept for a caller until it is read, except that an `advanced` nobody has read is replaced by the
next one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from paddock.v1 import model_manager_pb2 as pb
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paddock_server.manager.failure import Failure

ADVANCE_SECONDS: Final = 0.25
"""Least time between two `advanced` of one stage: four a second."""


class Subscription:
    """What one caller of Load has still to read."""

    def __init__(self) -> None:
        self._events: deque[pb.LoadResponse] = deque()
        self._failure: Failure | None = None
        self._ended = False
        self._changed = asyncio.Event()
        self.closed = False
        """Whether the caller has gone."""

    def push(self, event: pb.LoadResponse) -> None:
        """Add an event; it takes the place of an unread `advanced` of the same stage."""
        if self._events and _is_advance(event) and _is_advance(self._events[-1]):
            self._events[-1] = event
        else:
            self._events.append(event)
        self._changed.set()

    def finish(self, response: pb.LoadResponse) -> None:
        """Add the last event, unless there has been one."""
        if self._ended:
            return
        self._events.append(response)
        self._ended = True
        self._changed.set()

    def fail(self, failure: Failure) -> None:
        """End with an error, after the events that are still unread, unless it has ended."""
        if self._ended:
            return
        self._failure = failure
        self._ended = True
        self._changed.set()

    async def next(self) -> pb.LoadResponse | None:
        """Return the next event; None after the last one.

        Raises:
            PaddockError: the load failed.
        """
        while not self._events:
            if self._failure is not None:
                raise self._failure.error()
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


def nobody() -> Subscription:
    """Return the subscriber of a load that no call asks for."""
    subscription = Subscription()
    subscription.closed = True
    return subscription


class LoadView:
    """One load as it is shown. A caller who joins late is told the stage the load is at, and goes on from
    there."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._subscriptions: list[Subscription] = []
        self._stage: pb.Stage.ValueType = pb.STAGE_UNSPECIFIED
        self._stage_began = 0.0
        self._started: pb.LoadResponse | None = None
        self._advanced: pb.LoadResponse | None = None
        self._advanced_at = 0.0

    @property
    def stage(self) -> pb.Stage.ValueType:
        """The stage the load is at; unspecified between stages."""
        return self._stage

    @property
    def stage_name(self) -> str:
        """The stage in messages and metadata, for example `weights`."""
        return pb.Stage.Name(self._stage).removeprefix("STAGE_").lower()

    def attach(self, subscription: Subscription) -> None:
        """Add a caller."""
        self._subscriptions = [old for old in self._subscriptions if not old.closed]
        self._subscriptions.append(subscription)
        for event in (self._started, self._advanced):
            if event is not None:
                subscription.push(event)

    def begin(self, stage: pb.Stage.ValueType, message: str) -> None:
        """Begin a stage; the one before ends with it."""
        self.end_stage()
        self._stage = stage
        self._stage_began = self._clock()
        self._advanced_at = 0.0
        event = self._event()
        event.started.message = message
        self._started = pb.LoadResponse(progress=event)
        self._show(self._started)

    def advance(self, stage: pb.Stage.ValueType, fraction: float, total_bytes: int) -> None:
        """Tell how far the stage is; too much news in too little time is left out."""
        now = self._clock()
        if stage != self._stage or (self._advanced is not None and now - self._advanced_at < ADVANCE_SECONDS):
            return
        event = self._event()
        event.advanced.fraction = fraction
        event.advanced.total_bytes = total_bytes
        event.advanced.completed_bytes = round(fraction * total_bytes)
        self._advanced = pb.LoadResponse(progress=event)
        self._advanced_at = now
        self._show(self._advanced)

    def end_stage(self, *, cached: bool = False) -> None:
        """End the stage, if one has begun."""
        if self._stage == pb.STAGE_UNSPECIFIED:
            return
        event = self._event()
        event.finished.cached = cached
        event.finished.stage_duration.FromNanoseconds(int((self._clock() - self._stage_began) * 1e9))
        self._clear_stage()
        self._show(pb.LoadResponse(progress=event))

    def warn(self, failure: Failure) -> None:
        """Tell of something that did not end the load but broke its stage off."""
        event = self._event()
        event.warning.failure.CopyFrom(failure.to_proto(self._wall()))
        self._clear_stage()
        self._show(pb.LoadResponse(progress=event))

    def end(self, response: pb.LoadResponse) -> None:
        """End the load well, with the same message for everyone."""
        self.end_stage()
        for subscription in self._subscriptions:
            subscription.finish(response)

    def fail(self, failure: Failure) -> None:
        """End the load with the same failure for everyone."""
        for subscription in self._subscriptions:
            subscription.fail(failure)

    def _clear_stage(self) -> None:
        self._stage = pb.STAGE_UNSPECIFIED
        self._started = None
        self._advanced = None

    def _event(self) -> pb.ProgressEvent:
        event = pb.ProgressEvent(stage=self._stage)
        event.event_time.FromNanoseconds(int(self._wall() * 1e9))
        return event

    def _show(self, event: pb.LoadResponse) -> None:
        for subscription in self._subscriptions:
            if not subscription.closed:
                subscription.push(event)


class ShownLoad:
    """The load of an actor as it is shown: one view from the first thing to show to the load's end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._view: LoadView | None = None

    @property
    def view(self) -> LoadView:
        """The view of the load under way, or of the one that is to come."""
        if self._view is None:
            self._view = LoadView(self._clock)
        return self._view

    @property
    def stage_name(self) -> str:
        """The stage the load is at; empty while nothing is shown."""
        return self._view.stage_name if self._view is not None else ""

    def begin_stage(self, worker_stage: worker_pb2.LoadStage.ValueType) -> pb.Stage.ValueType:
        """Show that a worker is at a stage of its own, unless it is; return what the stage is called here."""
        stage, message = _WORKER_STAGES[worker_stage]
        if self.view.stage < stage:
            self.view.begin(stage, message)
        return stage

    def advance(self, worker_stage: worker_pb2.LoadStage.ValueType, fraction: float, size_bytes: int) -> None:
        """Show how far a worker is; `size_bytes` is the size of the file. Unknown stages are left out."""
        if worker_stage in _WORKER_STAGES:
            stage = self.begin_stage(worker_stage)
            self.view.advance(stage, fraction, size_bytes if stage == pb.STAGE_WEIGHTS else 0)

    def end(self) -> LoadView | None:
        """Take away the view of the load that ends; None when there is none."""
        view, self._view = self._view, None
        return view


_WORKER_STAGES: Final[Mapping[worker_pb2.LoadStage.ValueType, tuple[pb.Stage.ValueType, str]]] = {
    worker_pb2.LOAD_STAGE_WEIGHTS: (pb.STAGE_WEIGHTS, "Reading the weights."),
    worker_pb2.LOAD_STAGE_WARMUP: (pb.STAGE_WARMUP, "Allocating the KV cache and running the first batch."),
}


def _is_advance(response: pb.LoadResponse) -> bool:
    return response.HasField("progress") and response.progress.HasField("advanced")
