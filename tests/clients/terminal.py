"""`paddock` in a terminal of its own, for tests of what a person sees."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from tests.clients.fake_server import WAY_OUT_SECONDS
from tests.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Generator

COMMAND = [sys.executable, "-m", "paddock"]


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self._process = process
        self._terminal = terminal
        self.text = ""

    def read_until(self, text: str) -> str:
        """Read until `text` has been written; return what was written since the last call."""
        return self._read(text)

    def read_to_end(self) -> str:
        """Read until the command has ended."""
        return self._read(None)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def interrupt(self) -> None:
        """Do what Ctrl-C does, once the command waits for something.

        Python's readline misses a signal between the echo of a key and its wait for the next one. No person
        is that fast; a test is.
        """
        wait_until(self._is_asleep, WAY_OUT_SECONDS)
        self._process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self._process.wait(WAY_OUT_SECONDS)

    def _is_asleep(self) -> bool:
        return psutil.Process(self._process.pid).status() == psutil.STATUS_SLEEPING

    def _read(self, until: str | None) -> str:
        deadline = time.monotonic() + WAY_OUT_SECONDS
        while until is None or until not in self.text:
            assert select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))[0], self.text
            try:
                data = os.read(self._terminal, 65_536)
            except OSError:  # how Linux tells that the other end is closed
                data = b""
            if not data:
                assert until is None, self.text
                break
            self.text += data.decode(errors="replace")
        seen, self.text = self.text, ""
        return seen


@contextmanager
def terminal(target: str, *arguments: str, **environment: str) -> Generator[Terminal]:
    """Run `paddock` with a terminal, on the server at `target`, until the block ends."""
    controller, follower = os.openpty()
    env = {**os.environ, "PADDOCK_SERVER": target, "TERM": "xterm-256color", "COLUMNS": "100"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*COMMAND, *arguments], stdin=follower, stdout=follower, stderr=follower, env={**env, **environment}
    ) as process:
        os.close(follower)
        try:
            yield Terminal(process, controller)
        finally:
            process.kill()
            os.close(controller)
