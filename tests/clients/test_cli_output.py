from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console
from rich.progress import Progress

from paddock.cli import listing
from paddock.cli.facts import facts
from paddock.cli.output import (
    ago_text,
    bytes_text,
    count_text,
    plain,
    seconds_text,
    shortened,
    table,
    until_text,
)
from paddock.cli.progress import LABELS, BarView, LineView, Meter, load_view
from paddock.convert import model
from paddock.types import Failure, HuggingFaceSource, LoadProgress, ProgressKind, Stage
from paddock.v1 import model_pb2


@pytest.mark.parametrize(("total", "shown"), [(0, "-"), (512, "0 of 512 tokens")])
def test_a_kv_cache_nothing_was_heard_of_yet_has_no_numbers(total: int, shown: str) -> None:
    loaded = model(model_pb2.Model(id="tiny", worker=model_pb2.Worker(kv_cache_total_tokens=total)))

    assert dict(facts(loaded))["KV cache"] == shown


START = datetime(2026, 1, 1, tzinfo=UTC)


def event(kind: ProgressKind, seconds: float = 0, **fields: object) -> LoadProgress:
    return LoadProgress(
        stage=Stage.WEIGHTS,
        kind=kind,
        event_time=START + timedelta(seconds=seconds),
        **fields,  # pyright: ignore[reportArgumentType]
    )


def advanced(seconds: float, fraction: float | None, done: int = 0, total: int = 0) -> LoadProgress:
    return event(ProgressKind.ADVANCED, seconds, fraction=fraction, completed_bytes=done, total_bytes=total)


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def written(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (1_234_567_890, "1.2 GB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (124_000_000, "124M"), (7_615_616_512, "7.6B"), (2 * 10**12, "2.0T")],
)
def test_parameter_counts_read_as_on_model_cards(count: int, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.25, "250 ms"),
        (1.04, "1.0 s"),
        (59.94, "59.9 s"),
        (61, "1 min 1 s"),
        (3_660, "1 h 1 min"),
        (3 * 86_400, "3 days"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_times_are_told_as_ages() -> None:
    assert ago_text(None) == "-"
    assert ago_text(START, START + timedelta(seconds=90)) == "1 min 30 s ago"
    assert ago_text(START, START - timedelta(seconds=5)) == "0 ms ago"  # clocks differ


def test_times_to_come_are_told_as_waits() -> None:
    assert until_text(None) == "-"
    assert until_text(START, START - timedelta(seconds=90)) == "in 1 min 30 s"
    assert until_text(START, START + timedelta(seconds=5)) == "now"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tiny", "tiny"),
        ("sixteen-columns!", "sixteen-columns!"),
        ("qwen2.5-coder-7b-instruct-q4_k_m", "qwen2.5…t-q4_k_m"),
        ("模型模型模型模型模型", "模型模…模型模型"),
    ],
)
def test_a_long_name_loses_its_middle(name: str, shown: str) -> None:
    text = shortened(name, 16)

    assert str(text) == shown
    assert text.cell_len <= 16


def test_long_names_give_way_and_the_other_columns_stay_whole() -> None:
    out = console()  # 100 columns
    names = ["tiny", "a-model-with-a-name-that-never-seems-to-come-to-an-end-" * 3 + "q4_k_m"]
    models = [
        model(
            model_pb2.Model(
                id=name, state=model_pb2.MODEL_STATE_LOADED, worker=model_pb2.Worker(resident_bytes=5 * 10**7)
            )
        )
        for name in names
    ]
    out.print(table(listing.PS, listing.rows(models, listing.PS), width=out.width))

    header, first, second = written(out)
    assert header.split() == " ".join(listing.PS).split()
    assert all(len(line.rstrip()) <= 100 for line in (header, first, second))
    assert second.split()[1:] == first.split()[1:]
    assert second.split()[0].endswith("q4_k_m")


@pytest.mark.parametrize("columns", [listing.LS, listing.LS_WIDE, listing.PS, listing.PS_WIDE])
def test_every_column_has_something_to_show_for_a_model_of_which_nothing_is_known(
    columns: tuple[str, ...],
) -> None:
    bare = model(model_pb2.Model(id="bare", state=model_pb2.MODEL_STATE_UNLOADED))

    (row,) = listing.rows([bare], columns)
    shown = dict(zip(columns, map(str, row), strict=True))
    assert (shown.pop("MODEL"), shown.pop("STATE"), shown.pop("SIZE", "0 B")) == ("bare", "unloaded", "0 B")
    assert set(shown.values()) == {"-"}


def test_every_column_is_in_a_list() -> None:
    assert set(listing.COLUMNS) == {*listing.LS_WIDE, *listing.PS_WIDE}


def test_json_has_no_types_of_ours() -> None:
    source = HuggingFaceSource(repo_id="a/b", file_pattern="*")

    assert plain({"at": START, "stage": Stage.SPAWN, "source": (source,), "piece": b"\xc3a"}) == {
        "at": "2026-01-01T00:00:00+00:00",
        "stage": "spawn",
        "source": [{"repo_id": "a/b", "file_pattern": "*", "revision": ""}],
        "piece": "\ufffda",
    }


def test_every_stage_has_a_label() -> None:
    assert set(LABELS) == set(Stage)


def test_the_rate_comes_from_the_times_of_the_server() -> None:
    meter = Meter()
    meter.start(event(ProgressKind.STARTED))
    meter.advance(advanced(2, 0.5, 500_000_000, 1_000_000_000))

    assert meter.text() == "500 MB of 1.0 GB, 250 MB/s"


def test_a_stage_that_moves_no_bytes_tells_none() -> None:
    meter = Meter()
    meter.advance(advanced(1, 0.5))

    assert meter.text() == ""


def test_without_a_terminal_a_line_is_written_at_every_tenth() -> None:
    out = console()
    view = LineView(out)
    view.show(event(ProgressKind.STARTED, message="Reading [x].gguf."))
    for percent in range(1, 101):
        view.show(advanced(percent / 10, percent / 100, percent * 10, 1000))
    view.show(event(ProgressKind.FINISHED, stage_seconds=10.0))

    assert written(out) == [
        "Reading weights: Reading [x].gguf.",
        *[
            f"Reading weights: {percent}% ({percent * 10} B of 1.0 kB, 100 B/s)"
            for percent in range(10, 100, 10)
        ],
        "Reading weights: 1.0 kB in 10.0 s",
    ]


def test_progress_of_unknown_size_writes_no_lines() -> None:
    out = console()
    LineView(out).show(advanced(1, None, 500))

    assert written(out) == []


def test_a_stage_with_nothing_to_do_says_so() -> None:
    out = console()
    LineView(out).show(event(ProgressKind.FINISHED, cached=True))

    assert written(out) == ["Reading weights: nothing to do"]


def test_a_warning_is_shown_with_its_message() -> None:
    out = console()
    failure = Failure(
        reason="WORKER_CRASHED",
        message="Died [once].",
        metadata={},
        failure_time=None,
        log_tail=(),
        exit_code=None,
        signal="",
    )
    LineView(out).show(event(ProgressKind.WARNING, warning=failure))

    assert written(out) == ["Reading weights: warning: Died [once]."]


def test_bars_are_for_terminals_only() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    dumb = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "dumb"})

    with load_view(terminal) as view:
        assert isinstance(view, BarView)
    for other in (console(), dumb):
        with load_view(other) as view:
            assert isinstance(view, LineView)


def test_a_stage_has_a_bar_while_it_runs_and_a_line_when_it_has_ended() -> None:
    bars = Progress(console=console(), auto_refresh=False)
    view = BarView(bars)

    view.show(event(ProgressKind.STARTED, message="Reading x.gguf."))
    assert [(task.total, task.fields["detail"]) for task in bars.tasks] == [(None, "Reading x.gguf.")]

    view.show(advanced(2, 0.5, 500, 1000))
    assert [(task.percentage, task.fields["detail"]) for task in bars.tasks] == [
        (50.0, " 50%  500 B of 1.0 kB, 250 B/s")
    ]

    view.show(event(ProgressKind.FINISHED, stage_seconds=2.0))
    assert bars.tasks == []
    assert written(bars.console) == ["✓ Reading weights    1.0 kB in 2.0 s"]


def test_a_load_that_is_joined_in_the_middle_of_a_stage_has_its_bar() -> None:
    bars = Progress(console=console(), auto_refresh=False)

    BarView(bars).show(advanced(1, None, 500))

    assert [(task.total, task.fields["detail"]) for task in bars.tasks] == [(None, "500 B")]
