"""llama.cpp's log: every line to standard error, errors kept until a load asks what went wrong."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Final

from paddock_server.worker import llama

DEBUG_VARIABLE: Final = "PADDOCK_WORKER_LOG_DEBUG"
"""Environment variable that lets debug lines through when it is set and not `0`."""

_STDERR: Final = 2
_KEPT_LINES: Final = 50


class NativeLog:
    """Sink of llama.cpp's log. Any thread."""

    def __init__(self) -> None:
        debug = os.environ.get(DEBUG_VARIABLE, "0") not in {"", "0"}
        self._lowest = llama.LOG_DEBUG if debug else llama.LOG_INFO
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()

    def install(self) -> None:
        """Take llama.cpp's log from now on."""
        llama.set_log_sink(self.write)

    def write(self, level: int, line: str) -> None:
        """Take a line."""
        if level < self._lowest or not line:
            return
        if level >= llama.LOG_ERROR:
            self._errors.append(line)
        data = line.encode("utf-8", "replace") + b"\n"
        with self._lock:
            while data:
                data = data[os.write(_STDERR, data) :]

    def take_errors(self) -> list[str]:
        """Return the error lines since the last call, oldest first."""
        errors = list(self._errors)
        self._errors.clear()
        return errors
