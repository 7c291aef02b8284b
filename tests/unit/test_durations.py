"""Durations as people write them."""

from __future__ import annotations

import math

import pytest

from paddock.durations import MAX_KEEP_ALIVE_SECONDS, keep_alive_seconds, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30s", 30),
        ("+5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (".5m", 30),
        ("250ms", 0.25),
        ("1m500us", 60.0005),
        ("2µs", 2e-6),
        ("-1m", -60),
    ],
)
def test_a_duration_is_read_as_go_reads_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "5", "5 m", "m", "-", "1d", "1h 30m", "1e3s", "٣s", "5m!", "inf"])
def test_what_is_no_duration_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration such as 30s, 5m or 1h, not"):
        parse_duration(text)


@pytest.mark.parametrize("value", [-1, -0.5, "-1s", float("-inf")])
def test_below_0_a_model_is_kept_for_as_long_as_can_be(value: float | str) -> None:
    assert keep_alive_seconds(value) == MAX_KEEP_ALIVE_SECONDS


@pytest.mark.parametrize("value", [MAX_KEEP_ALIVE_SECONDS + 1, math.inf, math.nan, "721h", "9" * 400 + "h"])
def test_a_keep_alive_beyond_30_days_is_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match="must be at most 2592000 seconds"):
        keep_alive_seconds(value)
