"""Calls on their way to the thread that answers them.

The main thread puts them in and takes back what was cancelled; the answer thread takes them out, one at a
time, and says when it is done with one. Where a call is when its cancel comes decides who drops it, so one
lock is held over every change.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddock_server.worker.v1 import worker_pb2


class WaitingCalls:
    """Calls that wait, by number, and the one that is being answered. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, worker_pb2.Call] = {}  # in the order they came
        self._current: int | None = None
        self._current_cancelled = False
        self._closed = False

    def __len__(self) -> int:
        """Calls that wait, without the one being answered."""
        return len(self._waiting)

    def put(self, call: worker_pb2.Call) -> None:
        """Let a call wait behind the others."""
        with self._changed:
            self._waiting[call.call] = call
            self._changed.notify()

    def close(self) -> None:
        """Have `take` return None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> worker_pb2.Call | None:
        """Return the call that has waited longest, which is being answered from now on; None after `close`.

        Waits for one without a bound: a worker without calls is idle for as long as it lives.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._current = next(iter(self._waiting))
            self._current_cancelled = False
            return self._waiting.pop(self._current)

    def finish(self) -> bool:
        """Say that the call taken last is done with; False when it was cancelled since."""
        with self._changed:
            self._current = None
            return not self._current_cancelled

    def cancel(self, number: int) -> bool:
        """Drop a call; False when there is none of this number, or none any more.

        One that is being answered stays until `finish`, which says that it was cancelled.
        """
        with self._changed:
            if number == self._current:
                self._current_cancelled = True
                return True
            return self._waiting.pop(number, None) is not None
