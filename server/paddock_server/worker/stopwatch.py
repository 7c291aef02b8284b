"""How long a thread has been at the piece of work it does now."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Stopwatch:
    """Runs while a piece of work is in progress. One thread starts and stops it; any thread reads it."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        """Make one that does not run. `clock` returns seconds."""
        self._clock = clock
        self._started_at: float | None = None

    def start(self) -> float:
        """Start anew and return the time by the clock, in seconds."""
        self._started_at = now = self._clock()
        return now

    def stop(self) -> None:
        """Stop; the work is done."""
        self._started_at = None

    @property
    def milliseconds(self) -> int:
        """Since the start, while it runs; else 0."""
        started_at = self._started_at
        return 0 if started_at is None else int((self._clock() - started_at) * 1000)
