"""From the bytes of tokens to text that may leave: whole characters, no piece of a stop string. Pure."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_UTF8: Final = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a token made visible."""

    text: str
    """Text that may leave; often empty while something is held back."""

    stop_sequence: str = ""
    """The stop sequence that ended the text; nothing follows it."""


class TextStream:
    """The text of one choice. Its output does not depend on how the bytes are cut into tokens.

    A stop sequence counts as soon as its last character is there; of two that are complete at once the longer
    wins.
    """

    __slots__ = ("_decoder", "_held", "_stops")

    def __init__(self, stop_sequences: Sequence[str] = ()) -> None:
        self._decoder = _UTF8(errors="replace")
        self._stops = tuple(stop_sequences)
        self._held = ""

    def push(self, piece: bytes) -> Emitted:
        """Take the bytes of the next token."""
        return self._take(self._decoder.decode(piece), final=False)

    def finish(self) -> Emitted:
        """Let go what was held back: bytes that form no character become U+FFFD."""
        return self._take(self._decoder.decode(b"", final=True), final=True)

    def _take(self, new: str, *, final: bool) -> Emitted:
        if not self._stops:
            return Emitted(new)
        text = self._held + new
        found = self._find_stop(text)
        if found is not None:
            start, stop = found
            self._held = ""
            return Emitted(text[:start], stop)
        held = 0 if final else self._held_length(text)
        cut = len(text) - held
        self._held = text[cut:]
        return Emitted(text[:cut])

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Return where the stop sequence that completes first begins, and the sequence."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                if best is None or candidate < best:
                    best = candidate
        return None if best is None else (best[1], best[2])

    def _held_length(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop sequence begins with."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
