"""When a crashed model is started again, and when it is given up. Pure: no clock, no tasks.

A crash is an end of a worker that nobody asked for. The wait before the next start doubles: 0, 1, 2, 4 ...
seconds, at most a minute. Five healthy minutes forgive what came before. A model that keeps crashing is given
up (CRASH_LOOP) until an operator loads it again; a failure that the next attempt can only repeat (a bad file)
is never retried.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Restart:
    """What to do after a crash."""

    crash_count: int
    """Crashes in a row, this one included. To be handed to the next `after_crash`."""

    delay_seconds: float | None
    """Wait before the next start; None when the model is given up."""

    @property
    def gives_up(self) -> bool:
        """Whether the model is not started again by itself."""
        return self.delay_seconds is None


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient to be."""

    max_delay_seconds: float = 60.0
    """Longest wait before a start."""

    healthy_seconds: float = 300.0
    """Time loaded after which earlier crashes are forgotten."""

    max_crash_count: int = 5
    """Crashes in a row after which a model is given up."""

    def after_crash(self, crash_count: int, *, served_seconds: float) -> Restart:
        """Decide what follows a crash.

        Args:
            crash_count: Crashes in a row before this one.
            served_seconds: How long the worker had been loaded; 0 when it crashed while loading.
        """
        count = 1 if served_seconds >= self.healthy_seconds else crash_count + 1
        if count >= self.max_crash_count:
            return Restart(count, None)
        return Restart(count, self.delay_seconds(count))

    def delay_seconds(self, crash_count: int) -> float:
        """Return the wait after so many crashes in a row: 0, 1, 2, 4 ... up to the limit."""
        if crash_count <= 1:
            return 0.0
        # The exponent is bounded so that a long history cannot overflow a float.
        return min(self.max_delay_seconds, 2.0 ** min(crash_count - 2, 32))
