"""Sizes as people read them."""

from __future__ import annotations

import pytest

from paddock.sizes import size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_348, "99.9 KiB"),
        (102_349, "100 KiB"),
        (1_048_063, "1023 KiB"),
        (1_048_064, "1.0 MiB"),
        (1_234_567_890, "1.1 GiB"),
        (24 * 2**30, "24.0 GiB"),
        (2 * 2**40, "2.0 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert size_text(count) == text
