"""Ctrl-C in scripts. Imported before what takes long to import: an interrupted import prints a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C has ended, as shells have it."""


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    os._exit(INTERRUPTED)


def raise_from_now_on() -> None:
    """Has Ctrl-C, and what else ends a script, raise KeyboardInterrupt: there is something to end now."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def leave() -> NoReturn:
    """Ends the script as an interrupted one."""
    sys.exit(INTERRUPTED)


def _is_script() -> bool:
    """Whether it is a script of this folder that runs; tests import them too."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    # Not pathlib, which would itself be long to import.
    return os.path.dirname(os.path.abspath(main)) == os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120


if _is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
