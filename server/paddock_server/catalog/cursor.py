"""Bounded forward reads from the start of a GGUF file."""

from __future__ import annotations

import os
from struct import Struct
from typing import BinaryIO, NoReturn

_CHUNK_BYTES = 256 * 1024
_QUOTED_CHARACTERS = 80

U32 = Struct("<I")
U64 = Struct("<Q")


class GgufError(Exception):
    """A GGUF file that cannot be used.

    Attributes:
        path: the file.
        what: what is wrong with it, a clause without the file's name.
        offset: where it is wrong, in bytes from the start of the file.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, offset: int) -> None:
        self.path = os.fspath(path)
        self.what = what
        self.offset = offset
        super().__init__(path, what, offset)

    def __str__(self) -> str:
        return f"{displayed(self.path)}: {self.what} (at byte {self.offset})"


class UnsupportedGgufError(GgufError):
    """A sound GGUF file of a kind that is not read here, such as a big-endian one."""


def displayed(path: str | os.PathLike[str]) -> str:
    """A path as text that can travel in UTF-8, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def quoted(text: str) -> str:
    """Text from a file for use in a message: escaped, and shortened, since a message must stay small."""
    if len(text) <= _QUOTED_CHARACTERS:
        return repr(text)
    return f"{text[:_QUOTED_CHARACTERS]!r}..."


class Cursor:
    """Reads forward through the first `limit` bytes of a file of `size` bytes.

    Holds one chunk at a time. Set `subject` to what is being read, so that an error can say so.
    Every method raises GgufError where the file ends too early or the limit is passed.
    """

    def __init__(self, file: BinaryIO, path: str, size: int, limit: int) -> None:
        self.subject = "the magic number"
        self._file = file
        self._path = path
        self.size = size
        self._end = min(size, limit)
        self._buffer = b""
        self._buffer_offset = 0
        self._at = 0

    @property
    def offset(self) -> int:
        """Position of the next byte, from the start of the file."""
        return self._buffer_offset + self._at

    def fail(self, what: str, offset: int | None = None) -> NoReturn:
        """Raises GgufError for this file, at `offset` or at the current position."""
        raise GgufError(self._path, what, self.offset if offset is None else offset)

    def fail_unsupported(self, what: str, offset: int) -> NoReturn:
        """Raises UnsupportedGgufError for this file."""
        raise UnsupportedGgufError(self._path, what, offset)

    def take(self, count: int) -> bytes:
        """The next `count` bytes. The caller bounds `count`."""
        self._check(count, self.offset)
        stop = self._at + count
        if stop > len(self._buffer):
            self._fill(count)
            stop = count
        data = self._buffer[self._at : stop]
        self._at = stop
        return data

    def u32(self) -> int:
        """The next unsigned 32-bit number."""
        return U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        """The next unsigned 64-bit number."""
        return U64.unpack(self.take(8))[0]

    def skip(self, count: int) -> None:
        """Passes over `count` bytes without reading them."""
        start = self.offset
        self._check(count, start)
        self._move_to(start + count)

    def skip_strings(self, count: int) -> None:
        """Passes over `count` strings, each preceded by its length in bytes."""
        self._check(count * U64.size, self.offset)
        unpack_from = U64.unpack_from
        while count:
            if len(self._buffer) - self._at < U64.size:
                self._check(U64.size, self.offset)
                self._fill(U64.size)
            buffer, at, start = self._buffer, self._at, self._at
            last = len(buffer) - U64.size
            while count and at <= last:
                start = at
                at += U64.size + unpack_from(buffer, at)[0]
                count -= 1
            start += self._buffer_offset
            self._check(self._buffer_offset + at - start, start)
            self._move_to(self._buffer_offset + at)

    def _check(self, count: int, start: int) -> None:
        if count <= self._end - start:
            return
        if self._end < self.size:
            self.fail(f"the header goes on past {self._end} bytes, in {self.subject}", start)
        self.fail(f"the file ends in {self.subject}", start)

    def _fill(self, count: int) -> None:
        rest = self._buffer[self._at :]
        self._buffer_offset += self._at
        self._at = 0
        self._buffer = rest + self._file.read(max(_CHUNK_BYTES, count) - len(rest))
        if len(self._buffer) < count:
            self.fail(f"the file became shorter while it was read, in {self.subject}")

    def _move_to(self, offset: int) -> None:
        at = offset - self._buffer_offset
        if at <= len(self._buffer):
            self._at = at
            return
        self._file.seek(offset)
        self._buffer, self._buffer_offset, self._at = b"", offset, 0
