"""The benchmark runs and reports everything it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import PATHS, WORKLOADS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_short_benchmark_gives_every_row(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "-m", "bench", "--short", "--json", str(figures)], cwd=ROOT, check=True, timeout=570
    )

    result = json.loads(figures.read_text())
    rows = [(row["streams"], row["path"]) for row in result["speed"]]
    assert rows == [(streams, path) for streams in WORKLOADS for path in PATHS]
    assert all(row["tokens_per_second"] > 0 and row["ratio"] > 0 for row in result["speed"])
    assert all("client_us" in row for row in result["speed"] if row["path"] != "engine")
    assert result["memory"]["worker_weights_mib"] > 0
    assert {"gap_p99_ms_quiet", "gap_p99_ms_beside_prompt"} <= set(result["long_prompt"])
