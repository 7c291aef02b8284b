"""Sizes for people: files, memory and disks alike, everywhere. Programs are given bytes."""

from __future__ import annotations

_NEXT_UNIT = 1023.5
"""What rounds to 1024 is one of the next unit."""


def size_text(count: int) -> str:
    """Return a number of bytes in the largest of B, KiB, MiB, GiB and TiB that it has one of: `1.5 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < _NEXT_UNIT:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
