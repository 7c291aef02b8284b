from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paddock_server.worker import llama
from paddock_server.worker.errors import WorkerError
from paddock_server.worker.loading import Progress, classify, read_ahead, shards_of
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("lines", "reason", "cause"),
    [
        (
            ["gguf_init_from_reader: invalid magic characters: 'This', expected 'GGUF'", "x: failed to load"],
            "MODEL_CORRUPT",
            "invalid magic characters: 'This', expected 'GGUF'",
        ),
        (
            ["llama_model_load: error loading model: unknown model architecture: 'llamb'"],
            "UNSUPPORTED_MODEL",
            "unknown model architecture: 'llamb'",
        ),
        (
            ["alloc: tried 9 bytes", "llama_init_from_model: failed to allocate buffer for kv cache"],
            "INSUFFICIENT_MEMORY",
            "failed to allocate buffer for kv cache",
        ),
        ([], "MODEL_CORRUPT", "llama.cpp gave no reason"),
    ],
    ids=["corrupt", "unsupported", "memory", "silent"],
)
def test_the_log_of_llama_cpp_says_why_a_load_failed(lines: list[str], reason: str, cause: str) -> None:
    error = classify("/models/a.gguf", lines)
    assert (error.reason, error.metadata) == (reason, {"file": "/models/a.gguf", "what": cause})
    assert cause in error.message


def test_a_file_is_read_to_its_end_with_progress_to_1(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x" * 9_000_000)
    seen: list[float] = []
    read_ahead([str(path) for path in paths], lambda fraction: seen.append(fraction) is None)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) >= 4


def test_reading_stops_when_the_load_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 20_000_000)
    seen: list[float] = []

    def advance(fraction: float) -> bool:
        seen.append(fraction)
        return False

    read_ahead([str(path)], advance)
    assert len(seen) == 1


def test_all_shards_are_found_from_the_first() -> None:
    assert shards_of("/m/a-00001-of-00003.gguf") == [f"/m/a-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    assert shards_of("/m/a.gguf") == ["/m/a.gguf"]


def test_progress_begins_at_0_ends_at_1_and_never_goes_back() -> None:
    seen: list[float] = []
    progress = Progress(lambda _stage, fraction: seen.append(fraction), lambda: False)
    progress.begin(worker_pb2.LOAD_STAGE_WEIGHTS)
    for fraction in (0.5, 0.2, 1.0, 1.0, 0.9):
        assert progress.advance(fraction)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen.count(1.0) == 1


def test_a_load_given_up_stops_at_the_next_chance() -> None:
    progress = Progress(lambda _stage, _fraction: None, lambda: True)
    assert not progress.advance(0.5)
    with pytest.raises(WorkerError) as caught:
        progress.begin(worker_pb2.LOAD_STAGE_WARMUP)
    assert caught.value.reason == "LOAD_ABORTED"


def test_pieces_of_a_log_line_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[int, str]] = []
    calls: list[Callable[[int, bytes, None], None]] = []

    def log_set(callback: Callable[[int, bytes, None], None], _user_data: None) -> None:
        calls.append(callback)

    monkeypatch.setattr(llama.bindings, "llama_log_set", log_set)
    monkeypatch.setattr(llama, "_log_callback", None)
    llama.set_log_sink(lambda level, line: lines.append((level, line)))
    pieces = [(2, b"one\n"), (4, b"two, "), (5, b"going on, "), (5, b"done\nthree"), (2, b"four\n")]
    for level, text in pieces:
        calls[0](level, text, None)
    assert lines == [(2, "one"), (4, "two, going on, done"), (4, "three"), (2, "four")]
