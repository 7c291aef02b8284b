"""Ctrl-C in the first moments of a program, when there is nothing yet that would have to end in order."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED: Final = 130
"""The exit code of a program that Ctrl-C has ended, as shells have it."""


def leave_quietly() -> None:
    """Have Ctrl-C end the process on the spot. To be called first of all, before what is long to import: an
    import that is interrupted prints a page of traceback. Only for the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, for a reason
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, if `leave_quietly` has changed that."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(INTERRUPTED)
