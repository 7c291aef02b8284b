"""What steps made, on its way to the server.

What is urgent leaves with its step. A token that follows others may wait for those of the next steps, so that
a model that makes hundreds of tokens a second does not spend its cores on handing on each by itself
(ADR 0017).
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final

from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_GAP_SECONDS: Final = 0.016
"""Tokens wait only for a step that is expected to end within this time after the last frame, and only where
two steps fit into it. A screen shows a picture in that time."""


class News:
    """Gathers updates, one per generation, until they leave together in a frame. For the engine's thread."""

    def __init__(
        self,
        send: Callable[[worker_pb2.WorkerFrame], None],
        *,
        longest_gap_seconds: float = LONGEST_GAP_SECONDS,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Make an empty one. With a gap of 0 nothing waits; `clock` returns seconds."""
        self._send = send
        self._longest_gap = longest_gap_seconds
        self._clock = clock
        self._frame = worker_pb2.WorkerFrame()
        self._updates: dict[int, worker_pb2.GenerationUpdate] = {}
        self.urgent = False
        """Whether there is something that cannot wait."""

        self._sent_at = clock()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        return not self._updates

    def of(self, number: int, *, urgent: bool = True) -> worker_pb2.GenerationUpdate:
        """Return the update of a generation, to be added to. Once urgent, nothing in the frame waits."""
        self.urgent = self.urgent or urgent
        update = self._updates.get(number)
        if update is None:
            update = self._updates[number] = self._frame.step.updates.add(generation=number)
        return update

    def can_wait(self, step_seconds: float) -> bool:
        """Whether further tokens can leave with the next step, which is expected to take so long."""
        next_at = self._clock() + step_seconds
        return 2 * step_seconds <= self._longest_gap and next_at <= self._sent_at + self._longest_gap

    def send(self) -> None:
        """Send what there is."""
        if self._updates:
            self._send(self._frame)
            self._frame = worker_pb2.WorkerFrame()
            self._updates = {}
            self.urgent = False
            self._sent_at = self._clock()
