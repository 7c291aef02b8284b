"""Running untrusted Python, such as a chat template, for a bounded time."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

_RETRY_SECONDS: Final = 0.05
_SET_ASYNC_EXC: Final = ctypes.pythonapi.PyThreadState_SetAsyncExc
_SET_ASYNC_EXC.argtypes = (ctypes.c_ulong, ctypes.py_object)
_SET_ASYNC_EXC.restype = ctypes.c_int


class TimeLimitExceededError(Exception):
    """The function ran for longer than it may."""


class StopThread(BaseException):
    """Raised inside the thread that took too long. Not an `Exception`, so that ordinary handlers let it pass.

    It may strike in the thread's last steps, outside any handler: a hook for uncaught exceptions should
    ignore it.
    """


def run_bounded(function: Callable[[], Result], *, seconds: float) -> Result:
    """Return `function()`, run in a thread of its own for at most `seconds`.

    A thread of its own because the exception that stops it is asynchronous: it may strike anywhere, also
    after the work is done, and must never strike the caller. It cannot interrupt a single call into C; such a
    thread is stopped when the call returns.

    Raises:
        TimeLimitExceededError: It was not done in time.
        Exception: Whatever `function` raised.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  handed to the caller, which is where it belongs
            errors.append(error)

    thread = threading.Thread(target=target, name="bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _stop(thread)
        text = f"not done within {seconds:g} seconds"
        raise TimeLimitExceededError(text)
    if errors:
        raise errors[0]
    return results[0]


def _stop(thread: threading.Thread) -> None:
    """Ask the thread to end until it does, for a second; one stuck inside C ends when that returns."""
    for _ in range(20):
        if thread.ident is None or not thread.is_alive():
            return
        _SET_ASYNC_EXC(thread.ident, StopThread)
        thread.join(_RETRY_SECONDS)
