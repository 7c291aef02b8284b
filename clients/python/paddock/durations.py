"""Durations as people write them, and how long a request may have a model kept. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

MAX_KEEP_ALIVE_SECONDS: Final = 30 * 24 * 3600
"""The longest a request may have an idle model kept."""

_UNITS: Final[Mapping[str, float]] = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_NUMBER: Final = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_UNIT: Final = "|".join(sorted(_UNITS, key=len, reverse=True))
_DURATION: Final = re.compile(rf"([+-]?)((?:{_NUMBER}(?:{_UNIT}))+|0)")
_PART: Final = re.compile(rf"({_NUMBER})({_UNIT})")


def parse_duration(text: str) -> float:
    """Return the seconds a text like `30s`, `5m`, `1h30m` or `-1m` means, as Go and Ollama read it.

    Raises:
        ValueError: it is no duration; a number needs a unit.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        message = f"must be a duration such as 30s, 5m or 1h, not {text[:40]!r}"
        raise ValueError(message)
    sign, parts = found.groups()
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(parts))
    return -seconds if sign == "-" else seconds


def keep_alive_seconds(value: float | str) -> float:
    """Return for how many seconds a model is to be kept: those of a number or of a duration.

    0 is no wish; less than 0 is as long as can be.

    Raises:
        ValueError: it is no duration, or too long; the message says what would be right.
    """
    seconds = parse_duration(value) if isinstance(value, str) else float(value)
    if seconds < 0:
        return MAX_KEEP_ALIVE_SECONDS
    if not math.isfinite(seconds) or seconds > MAX_KEEP_ALIVE_SECONDS:
        message = f"must be at most {MAX_KEEP_ALIVE_SECONDS} seconds (30 days); below 0 means as much"
        raise ValueError(message)
    return seconds
