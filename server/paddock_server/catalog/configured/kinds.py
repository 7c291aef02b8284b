"""Kinds of values in configuration files: how each is written in an INI file, and what it may be. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from paddock_server.catalog.hub_names import HubNameError, parse_hub_name

MAX_TEXT_CHARACTERS = 64 * 1024
MAX_NAME_CHARACTERS = 512
MAX_NAMES = 64

_TRUE = frozenset({"on", "enabled", "true", "1"})
_FALSE = frozenset({"off", "disabled", "false", "0"})


class Kind(Protocol):
    """What a value may be. Both methods raise ValueError, whose text completes `KEY: ...`."""

    def parsed(self, text: str) -> object:
        """The value that a text in an INI file stands for, not checked yet."""
        ...

    def checked(self, value: object) -> object:
        """The value in its one form."""
        ...


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number, both ends included. `words` are those that stand for a number in an INI file."""

    low: int
    high: int
    words: tuple[tuple[str, int], ...] = ()

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        number = dict(self.words).get(text)
        if number is not None:
            return number
        try:
            return int(text)
        except ValueError:
            return text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            message = f"must be a whole number from {self.low} to {self.high}, not {shown(value)}"
            raise ValueError(message)
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        return text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        if value not in self.words:
            message = f"must be one of {', '.join(self.words)}, not {shown(value)}"
            raise ValueError(message)
        return value


@dataclass(frozen=True, slots=True)
class Number:
    """A number, both ends included unless `low_open`."""

    low: float
    high: float
    low_open: bool = False

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        try:
            return float(text)
        except ValueError:
            return text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        # NaN fails both comparisons.
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and not (self.low_open and value == self.low)
        ):
            return float(value)
        low = f"more than {self.low:g}" if self.low_open else f"at least {self.low:g}"
        message = f"must be a number, {low} and at most {self.high:g}, not {shown(value)}"
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        return True if text in _TRUE else False if text in _FALSE else text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        if not isinstance(value, bool):
            message = f"must be true or false, not {shown(value)}"
            raise ValueError(message)  # noqa: TRY004  # ValueError is what every kind raises
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is not empty, and with `in_line` has no control characters."""

    max_characters: int = MAX_TEXT_CHARACTERS
    in_line: bool = False

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        return text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        if not isinstance(value, str) or not 1 <= len(value) <= self.max_characters:
            message = f"must be a text of 1 to {self.max_characters} characters, not {shown(value)}"
            raise ValueError(message)
        if self.in_line and not value.isprintable():
            message = f"must have no control characters, unlike {shown(value)}"
            raise ValueError(message)
        return value


@dataclass(frozen=True, slots=True)
class HubName:
    """The name of a model of the hub, with `hf:` before it or without."""

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        return text

    def checked(self, value: object) -> object:
        """See `Kind`."""
        try:
            parse_hub_name(checked_name(value))
        except HubNameError as error:
            message = f"must be ORG/REPO[@REVISION][:QUANT-OR-GLOB]; its {error.part} {error.message}"
            raise ValueError(message) from error
        return value


@dataclass(frozen=True, slots=True)
class Names:
    """Some names, none of them twice; in an INI file with commas between them."""

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        return [name for part in text.split(",") if (name := part.strip())]

    def checked(self, value: object) -> object:
        """See `Kind`."""
        if not isinstance(value, list) or len(cast("list[object]", value)) > MAX_NAMES:
            message = f"must be a list of at most {MAX_NAMES} texts, not {shown(cast('object', value))}"
            raise ValueError(message)
        return tuple(dict.fromkeys(checked_name(name) for name in cast("list[object]", value)))


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A table; in an INI file one JSON object."""

    def parsed(self, text: str) -> object:
        """See `Kind`."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            message = f"must be one JSON object: {error}"
            raise ValueError(message) from error

    def checked(self, value: object) -> object:
        """The object as JSON text, so that it can be compared and travels as it is."""
        if not isinstance(value, Mapping):
            message = f"must be a table, not {shown(value)}"
            raise ValueError(message)  # noqa: TRY004  # ValueError is what every kind raises
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            message = f"must hold only what JSON can say: {error}"
            raise ValueError(message) from error
        if len(text) > MAX_TEXT_CHARACTERS:
            message = f"must be at most {MAX_TEXT_CHARACTERS} characters long as JSON"
            raise ValueError(message)
        return text


def checked_name(value: object) -> str:
    """A name a request can ask for. Raises ValueError."""
    if (
        not isinstance(value, str)
        or not 1 <= len(value) <= MAX_NAME_CHARACTERS
        or not value.isprintable()
        or value != value.strip()
    ):
        message = (
            f"must be 1 to {MAX_NAME_CHARACTERS} printable characters without space around them, "
            f"not {shown(value)}"
        )
        raise ValueError(message)
    return value


def shown(value: object) -> str:
    """A value for a message, cut to a bearable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."  # a line's width
