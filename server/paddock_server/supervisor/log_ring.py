"""What workers wrote to their standard error: one bounded ring per model, which outlives its workers.

Lines have consecutive numbers from 0. A follower is a number, the next line it wants, so that a slow one
costs no memory and holds nobody up: it finds out what it missed when it comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LINE_CHARACTERS: Final = 4096
"""A longer line is cut."""

MAX_BATCH_LINES: Final = 500
"""Most lines a follower is given at once."""

MAX_BATCH_BYTES: Final = 512 * 1024
"""Most text a follower is given at once: far under gRPC's 4 MiB."""

_LINE_OVERHEAD_BYTES: Final = 160
_MAX_CHARACTER_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line a worker wrote."""

    read_time: float
    """When the server read it, in seconds since the epoch."""

    load_id: str
    """Load the worker belonged to."""

    pid: int
    """Process id of the worker."""

    text: str
    """The line without its end, at most `MAX_LINE_CHARACTERS`."""

    @property
    def size_bytes(self) -> int:
        """Roughly what the line costs in memory."""
        return len(self.text) + _LINE_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class LogBatch:
    """What a follower reads at once."""

    lines: tuple[LogLine, ...]
    """Lines, oldest first."""

    dropped_line_count: int
    """Lines that came before the first of `lines` and after those read earlier, and are gone."""


class LogRing:
    """The newest lines of a model's workers, bounded by lines and by bytes. For one event loop."""

    def __init__(self, *, max_lines: int = 5000, max_bytes: int = 1024 * 1024) -> None:
        self._lines: deque[LogLine] = deque()
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._bytes = 0
        self._end = 0
        self._closed = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def end(self) -> int:
        """Number the next line will have."""
        return self._end

    @property
    def first(self) -> int:
        """Number of the oldest line still held; `end` when there is none."""
        return self._end - len(self._lines)

    def extend(self, lines: Iterable[LogLine]) -> None:
        """Add lines; the oldest make room."""
        for line in lines:
            self._lines.append(line)
            self._bytes += line.size_bytes
            self._end += 1
        while len(self._lines) > self._max_lines or self._bytes > self._max_bytes:
            self._bytes -= self._lines.popleft().size_bytes
        self._wake()

    def close(self) -> None:
        """Have followers end once they have read what there is: the model is gone, nobody will write more."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def tail(self, count: int, *, pid: int | None = None) -> tuple[str, ...]:
        """Return the text of the newest `count` lines, oldest first; with `pid`, of that worker's lines
        only."""
        newest = (line.text for line in reversed(self._lines) if pid is None or line.pid == pid)
        return tuple(islice(newest, count))[::-1]

    def read(self, start: int) -> LogBatch:
        """Return the lines from number `start` on, as many as fit in a batch, and how many of them are
        gone."""
        first = max(start, self.first)
        lines: list[LogLine] = []
        size = 0
        for line in islice(self._lines, first - self.first, first - self.first + MAX_BATCH_LINES):
            size += len(line.text) * _MAX_CHARACTER_BYTES
            if lines and size > MAX_BATCH_BYTES:
                break
            lines.append(line)
        return LogBatch(tuple(lines), first - start)

    def subscribe(self, *, tail_line_count: int = 0, follow: bool = True) -> LogFollower:
        """Read batches from the newest `tail_line_count` lines on; 0 begins with the first line there ever
        was.

        With `follow` it ends when the ring is closed; otherwise when every line has been read.
        """
        start = max(0, self._end - tail_line_count) if tail_line_count else 0
        return LogFollower(self, start, follow=follow)

    async def wait_for(self, number: int) -> None:
        """Wait until the line with that number has been written, or the ring is closed."""
        while self._end <= number and not self._closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)


class LogFollower:
    """An async iterator of batches. Holds no lines of its own: what the ring drops meanwhile, it counts."""

    def __init__(self, ring: LogRing, start: int, *, follow: bool) -> None:
        self._ring = ring
        self._next = start
        self._follow = follow

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LogBatch:
        if self._next >= self._ring.end:
            if not self._follow:
                raise StopAsyncIteration
            await self._ring.wait_for(self._next)
            if self._next >= self._ring.end:
                raise StopAsyncIteration
        batch = self._ring.read(self._next)
        self._next += batch.dropped_line_count + len(batch.lines)
        return batch


class LineSplitter:
    """Turns the bytes of one worker's pipe into lines. Holds at most one unfinished line, cut to its
    limit."""

    def __init__(self, *, load_id: str, pid: int) -> None:
        self.load_id = load_id
        """Load that lines from now on belong to."""
        self._pid = pid
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[LogLine]:
        """Take the next bytes and return the lines they complete."""
        head, *rest = data.split(b"\n")
        self._keep(head)
        if not rest:
            return []
        now = time.time()
        lines = [self._line(bytes(self._partial), now)]
        lines += [self._line(raw, now) for raw in rest[:-1]]
        self._partial.clear()
        self._keep(rest[-1])
        return lines

    def finish(self) -> list[LogLine]:
        """Return the line that was never ended, if there is one."""
        if not self._partial:
            return []
        line = self._line(bytes(self._partial), time.time())
        self._partial.clear()
        return [line]

    def _keep(self, piece: bytes) -> None:
        room = MAX_LINE_CHARACTERS * _MAX_CHARACTER_BYTES - len(self._partial)
        self._partial += piece[:room]

    def _line(self, raw: bytes, now: float) -> LogLine:
        text = raw[: MAX_LINE_CHARACTERS * _MAX_CHARACTER_BYTES].decode("utf-8", "replace")
        return LogLine(now, self.load_id, self._pid, text.removesuffix("\r")[:MAX_LINE_CHARACTERS])
