"""Watch: one numbered history of changes over all models, and those who follow it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final

from paddock.errors import InvalidFieldError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from paddock.v1 import model_pb2

HISTORY_LENGTH: Final = 1024
"""Changes a watcher can come back to."""

BACKLOG_LENGTH: Final = 512
"""Changes a watcher may be behind."""

SYNCED_SECONDS: Final = 30.0
"""Most time between two `synced`."""


class _Watcher:
    """One follower. `backlog` is filled by the log of changes and emptied by the watch."""

    def __init__(self, models: Iterable[str]) -> None:
        self.models = frozenset(models)
        self.backlog: deque[pb.WatchResponse] = deque()
        self.changed = asyncio.Event()
        self.lost = False

    def wants(self, response: pb.WatchResponse) -> bool:
        return not self.models or _model_of(response) in self.models

    def offer(self, response: pb.WatchResponse) -> None:
        if self.lost or not self.wants(response):
            return
        if len(self.backlog) >= BACKLOG_LENGTH:
            self.lost = True
            self.backlog.clear()
        else:
            self.backlog.append(response)
        self.changed.set()

    async def wait(self, until: float) -> None:
        """Wait for something to do, at most until that time of the event loop's clock."""
        self.changed.clear()
        if self.backlog or self.lost:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self.changed.wait()


class ChangeLog:
    """The history. Changes are published by the actors; everything happens in one event loop."""

    def __init__(self, instance_id: str, current: Callable[[], Iterable[model_pb2.Model]]) -> None:
        """`current` gives every model as it is now, ordered by id."""
        self._instance_id = instance_id
        self._current = current
        self._history: deque[pb.WatchResponse] = deque(maxlen=HISTORY_LENGTH)
        self._watchers: set[_Watcher] = set()
        self.revision = 0
        """Number of the latest change."""

    @property
    def watcher_count(self) -> int:
        """Watches that are open."""
        return len(self._watchers)

    def changed(self, model: model_pb2.Model, previous_state: model_pb2.ModelState.ValueType) -> None:
        """Publish a model that appeared or changed."""
        self._publish(pb.WatchResponse(changed=pb.ModelChanged(model=model, previous_state=previous_state)))

    def deleted(self, model: str) -> None:
        """Publish that a model is gone."""
        self._publish(pb.WatchResponse(deleted=pb.ModelDeleted(model=model)))

    def _publish(self, response: pb.WatchResponse) -> None:
        self.revision += 1
        response.revision = self.revision
        self._history.append(response)
        for watcher in self._watchers:
            watcher.offer(response)

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Send what a request asks for, then changes until closed.

        Raises:
            PaddockError: REVISION_GONE when the history does not reach back, or is another's; WATCH_TOO_SLOW.
        """
        watcher = _Watcher(request.models)
        first = [response for response in self._first(request) if watcher.wants(response)]
        revision = self.revision
        self._watchers.add(watcher)
        loop = asyncio.get_running_loop()
        try:
            for response in first:
                yield response
            yield _synced(revision)
            sync_at = loop.time() + SYNCED_SECONDS
            while True:
                await watcher.wait(sync_at)
                if watcher.lost:
                    raise _too_slow()
                if loop.time() >= sync_at:
                    backlog = watcher.backlog
                    yield _synced(backlog[0].revision - 1 if backlog else self.revision)
                    sync_at = loop.time() + SYNCED_SECONDS
                elif watcher.backlog:
                    yield watcher.backlog.popleft()
        finally:
            self._watchers.discard(watcher)

    def _first(self, request: pb.WatchRequest) -> list[pb.WatchResponse]:
        """Return what comes before the first `synced`."""
        start = request.start_revision
        if start < 0:
            msg = "start_revision"
            raise InvalidFieldError.of(msg, "must not be negative; 0 starts with the current state")
        if request.instance_id and request.instance_id != self._instance_id:
            raise _gone(start, "they are of a server that has restarted since", instance_id=self._instance_id)
        if start == 0:
            return [
                pb.WatchResponse(revision=self.revision, changed=pb.ModelChanged(model=model))
                for model in self._current()
            ]
        oldest = self.revision - len(self._history) + 1
        if start < oldest:
            raise _gone(start, f"the server remembers them from {oldest} on")
        if start > self.revision + 1:
            raise _gone(start, f"the server is at {self.revision}")
        return [response for response in self._history if response.revision >= start]


def _model_of(response: pb.WatchResponse) -> str:
    return response.changed.model.id or response.deleted.model


def _synced(revision: int) -> pb.WatchResponse:
    return pb.WatchResponse(revision=revision, synced=pb.Synced())


def _gone(start: int, why: str, **metadata: str) -> Exception:
    """Return the error; `metadata` has what a program wants to know beside the start."""
    return make_error(
        Reason.REVISION_GONE,
        f"Changes cannot be sent from revision {start} on: {why}. Start over with start_revision 0.",
        metadata={"start_revision": str(start), **metadata},
    )


def _too_slow() -> Exception:
    return make_error(
        Reason.WATCH_TOO_SLOW,
        f"The watch fell more than {BACKLOG_LENGTH} changes behind. Start over with start_revision 0.",
        metadata={"backlog": str(BACKLOG_LENGTH)},
    )
