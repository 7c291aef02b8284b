"""The clocks an actor has running, one of each kind at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from paddock_server.manager.messages import SetTimer, Timer, TimerFired

if TYPE_CHECKING:
    from collections.abc import Iterable


class Timers:
    """Those that run. One that runs out is reported by message, and may be cleared before that is read."""

    def __init__(self, tell: Callable[[TimerFired], None]) -> None:
        """`tell` takes the message of a timer that has run out."""
        self._tell = tell
        self._running: dict[Timer, tuple[asyncio.TimerHandle, int]] = {}
        self._serial = 0

    def set(self, effect: SetTimer) -> None:
        """Start a timer; one that runs already starts over."""
        self.clear((effect.timer,))
        self._serial += 1
        message = TimerFired(effect.timer, self._serial)
        handle = asyncio.get_running_loop().call_later(effect.seconds, self._tell, message)
        self._running[effect.timer] = (handle, self._serial)

    def clear(self, timers: Iterable[Timer]) -> None:
        """Stop timers; those that do not run are none the worse for it."""
        for timer in timers:
            running = self._running.pop(timer, None)
            if running is not None:
                running[0].cancel()

    def clear_all(self) -> None:
        """Stop all."""
        self.clear(tuple(Timer))

    def is_due(self, message: TimerFired) -> bool:
        """Say whether a message is of a timer that nobody has cleared or set anew since; it runs no more."""
        running = self._running.get(message.timer)
        if running is None or running[1] != message.serial:
            return False
        del self._running[message.timer]
        return True
