"""What loads were measured to take is kept over a restart, within bounds, and never stands in the way."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from paddock_server import state_files
from paddock_server.manager import measured
from paddock_server.manager.measured import LoadKey, Measurements, read_measurements
from paddock_server.memory import LoadOptions
from paddock_server.state_files import StateFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MIB = 1 << 20
LOAD = LoadKey("/models/a.gguf", 1000, 1_700_000_000_123_456_789, LoadOptions(4096, 4, 512), "1 CUDA0")
OTHER = replace(LOAD, options=LoadOptions(4096, 2, 512, cache_type_k="q8_0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "measured.json"


def run(path: Path | None, *learned: tuple[LoadKey, int]) -> Measurements:
    """Return what a server that starts knows, and has learned since."""

    async def served() -> Measurements:
        measurements = Measurements(path)
        async with measurements.kept():
            for load, size in learned:
                measurements.learn(load, size)
        return measurements

    return asyncio.run(served())


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_what_was_measured_is_known_after_a_restart(path: Path) -> None:
    run(path, (LOAD, 77 * MIB), (OTHER, 60 * MIB))
    after = run(path)
    assert (after.of(LOAD), after.of(OTHER)) == (77 * MIB, 60 * MIB)
    assert after.of(replace(LOAD, size_bytes=1001)) is None
    assert after.of(replace(LOAD, computed_by="2 CUDA0")) is None


def test_the_most_there_was_counts_in_whole_steps(path: Path) -> None:
    run(path, (LOAD, 77 * MIB - 5), (LOAD, 3 * MIB))
    assert run(path, (LOAD, 0), (OTHER, 0)).of(LOAD) == 77 * MIB
    assert list(read_measurements(path)) == [LOAD]


def test_it_is_on_disk_while_the_server_runs_and_not_written_for_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []

    def write(_: Path, data: bytes) -> None:
        writes.append(data)

    async def served() -> None:
        measurements = Measurements(path)
        async with measurements.kept():
            for size in (5 * MIB, 4 * MIB, 5 * MIB - 1, 5 * MIB):
                measurements.learn(LOAD, size)
                await measurements._file.caught_up()

    monkeypatch.setattr(state_files, "write_atomically", write)
    asyncio.run(served())
    assert len(writes) == 1


def test_loads_of_a_file_that_has_changed_go(path: Path) -> None:
    elsewhere = replace(LOAD, path="/models/b.gguf", size_bytes=7)
    run(path, (LOAD, 5 * MIB), (OTHER, 6 * MIB), (elsewhere, 7 * MIB))
    changed = replace(LOAD, modified_ns=LOAD.modified_ns + 1)
    run(path, (changed, 5 * MIB))
    assert list(read_measurements(path)) == [elsewhere, changed]


def test_those_that_were_loaded_longest_ago_go_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MAX_LOADS", 3)
    one, two, three, four = (replace(LOAD, path=f"/models/{name}.gguf") for name in "abcd")
    run(path, (one, MIB), (two, MIB), (three, MIB), (one, MIB), (four, MIB))
    assert list(read_measurements(path)) == [three, one, four]
    monkeypatch.setattr(measured, "MAX_LOADS", 2)
    assert list(read_measurements(path)) == [one, four]


def test_as_many_as_are_kept_can_be_read_again_however_long_their_names(path: Path) -> None:
    folder = "\udcff" * 4090  # A byte that is no UTF-8 takes six in the file.
    loads = [(replace(LOAD, path=f"{folder}{index}"), MIB) for index in range(measured.MAX_LOADS)]
    run(path, *loads)
    assert len(read_measurements(path)) == measured.MAX_LOADS


def entry(**changes: Any) -> dict[str, Any]:
    options = {
        "context_size_tokens": 4096,
        "slot_count": 4,
        "batch_size_tokens": 512,
        "gpu_layer_count": -1,
        "cache_type_k": "f16",
        "cache_type_v": "f16",
        "keeps_whole_windows": True,
    }
    fields = {"path": "/a", "size_bytes": 1, "modified_ns": 2, "computed_by": "1", "resident_bytes": MIB}
    return {**fields, "options": options, **changes}


def write(path: Path, *entries: Mapping[str, Any], version: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"version": version, "loads": entries}))


@pytest.mark.parametrize(
    "changes",
    [
        {"path": 3},
        {"size_bytes": "1"},
        {"modified_ns": 2.5},
        {"resident_bytes": 0},
        {"resident_bytes": True},
        {"options": None},
        {"options": {**entry()["options"], "slot_count": "4"}},
    ],
)
def test_a_corrupt_file_is_set_aside_and_the_server_starts(
    path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, entry(**changes))
    with pytest.raises(StateFileError):
        read_measurements(path)
    run(path, (LOAD, MIB))
    assert "state_file_corrupt" in capsys.readouterr().out
    assert names(path) == ["measured.json", "measured.json.corrupt"]
    assert list(read_measurements(path)) == [LOAD]


def test_loads_with_options_this_release_does_not_know_are_left_out(path: Path) -> None:
    write(path, entry(), entry(options={**entry()["options"], "new": 1}), entry(options={"slot_count": 4}))
    assert len(read_measurements(path)) == 1


def test_without_a_path_nothing_is_kept(path: Path) -> None:
    assert run(None, (LOAD, MIB)).of(LOAD) == MIB
    assert not path.parent.exists()


def test_a_server_that_loads_nothing_writes_nothing(path: Path) -> None:
    run(path)
    assert not path.parent.exists()
