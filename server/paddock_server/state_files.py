"""Small files the server remembers things in: each has one writer, and is replaced as a whole."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()

ContentT = TypeVar("ContentT")

RETRY_SECONDS: Final = 5.0
"""Time until another attempt at a file that could not be written."""

WAIT_SECONDS: Final = 5.0
"""How long an answer waits for what it says to be on the disk; a disk takes milliseconds."""


CONSEQUENCE: Final = "Until it can be written, what is answered would not outlive this server."


class StateFileError(Exception):
    """A file is none of ours, or not whole."""


class StateFile:
    """Keeps a file as the state in memory is. Written in a thread, by one task, latest state only."""

    def __init__(self, path: Path | None, content: Callable[[], bytes]) -> None:
        """`path` is the file; None keeps nothing. `content` returns what is to be in it, in the event
        loop."""
        self._path = path
        self._content = content
        self._version = 0
        self._written: int = 0
        self._tried = 0
        self._wake = asyncio.Event()
        self._tries = asyncio.Condition()
        self._failing = False
        self._closing = False
        self._ended = False

    def changed(self) -> None:
        """Have the file written."""
        self._version += 1
        self._wake.set()

    async def caught_up(self) -> None:
        """Wait until all changes so far are on the disk.

        Not longer than for one attempt, whatever comes of it, and never longer than `WAIT_SECONDS`: what
        cannot be written is warned of, and holds nobody up.
        """
        version = self._version
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._tries:
                await self._tries.wait_for(lambda: self._tried >= version or self._ended)
        except TimeoutError:
            log.warning("state_file_slow", path=str(self._path), waited_seconds=WAIT_SECONDS)

    async def run(self) -> None:
        """Write the file whenever something has changed, and again while it cannot be, until `close`."""
        try:
            await self._remove_leftovers()
            while not self._ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS if self._tried != self._written else None):
                        await self._wake.wait()
                self._wake.clear()
                await self._write()
        finally:
            self._ended = True
            async with self._tries:
                self._tries.notify_all()

    async def _write(self) -> None:
        # All before the write: what changes while it goes on needs another.
        version, closing = self._version, self._closing
        if self._path is None:
            self._written = version
        elif version != self._written:
            try:
                await asyncio.to_thread(write_atomically, self._path, self._content())
            except OSError as error:
                log.warning(
                    "state_file_not_written", path=str(self._path), error=str(error), consequence=CONSEQUENCE
                )
                self._failing = True
            else:
                self._written = version
                if self._failing:
                    log.info("state_file_written_again", path=str(self._path))
                self._failing = False
        async with self._tries:
            self._tried = version
            self._ended = closing
            self._tries.notify_all()

    def close(self) -> None:
        """Have `run` write what is unwritten, and end."""
        self._closing = True
        self._wake.set()

    async def _remove_leftovers(self) -> None:
        if self._path is not None:
            try:
                await asyncio.to_thread(_remove_leftovers, self._path)
            except OSError as error:
                log.warning("state_file_leftovers", path=str(self._path), error=str(error))


async def read_or_set_aside(path: Path | None, read: Callable[[Path], ContentT]) -> ContentT | None:
    """Return what `read` makes of a file, in a thread; None without a path, and when it is no good.

    One that `read` refuses with a `StateFileError` is renamed to `NAME.corrupt`, with a warning, so that
    nothing is written over it. One that cannot be read, or not be renamed, is warned of and stays.
    """
    if path is None:
        return None
    try:
        return await asyncio.to_thread(_read_or_set_aside, path, read)
    except OSError as error:
        log.warning("state_file_unreadable", path=str(path), error=str(error))
    return None


def _read_or_set_aside(path: Path, read: Callable[[Path], ContentT]) -> ContentT | None:
    try:
        return read(path)
    except StateFileError as error:
        aside = path.with_name(path.name + ".corrupt")
        path.replace(aside)
        log.warning("state_file_corrupt", path=str(path), moved_to=str(aside), error=str(error))
        return None


def read_document(
    path: Path, parse: Callable[[Any], ContentT], *, version: int, max_bytes: int
) -> ContentT | None:
    """Return what `parse` makes of the JSON in a file; None when there is no file.

    `parse` may trip over whatever is not there or not of the right type, as Python's own errors have it, and
    may raise ValueError for what is wrong otherwise.

    Raises:
        StateFileError: it is not a file of this `version`, or is larger than `max_bytes`.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    if len(raw) > max_bytes:
        message = f"it is larger than {max_bytes} bytes"
        raise StateFileError(message)
    try:
        document: Any = json.loads(raw)
        if document["version"] != version:
            message = f"its version is {document['version']!r}; {version} is known"
            raise StateFileError(message)
        return parse(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"{type(error).__name__}: {error}"
        raise StateFileError(message) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole, and have it on the disk before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_directory(path: Path) -> None:
    """Make a directory for such files where there is none, and write to it.

    Raises:
        OSError: it cannot be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(b"0")
        file.flush()
        os.fsync(file.fileno())


def _remove_leftovers(path: Path) -> None:
    """Remove what a server that was killed while it wrote the file has left."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
