from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from paddock.cli import listing
from paddock.cli.facts import facts
from paddock.cli.output import (
    ago_text,
    brief_text,
    count_text,
    fitting,
    grid,
    plain,
    seconds_text,
    table,
)
from paddock.cli.progress import LABELS, BarView, LineView, Meter, load_view
from paddock.convert import model
from paddock.types import Failure, HuggingFaceSource, LoadProgress, ProgressKind, Stage
from paddock.v1 import model_pb2


@pytest.mark.parametrize(("total", "shown"), [(0, "-"), (512, "0 of 512 tokens")])
def test_a_kv_cache_of_unknown_size_has_no_numbers(total: int, shown: str) -> None:
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (59.4, "59s"),
        (59.6, "1m"),
        (240, "4m"),
        (3_570, "1h"),
        (47 * 3600, "47h"),
        (48 * 3600, "2d"),
        (30 * 86_400, "30d"),
    ],
)
def test_durations_in_columns_have_one_unit(seconds: float, text: str) -> None:
    assert brief_text(seconds) == text


@pytest.mark.parametrize("width", [20, 80, 100])
def test_names_are_never_cut_and_other_columns_give_way_from_the_last(width: int) -> None:
    names = ["qwen2.5-7b-instruct-abliterated", "qwen2.5-7b-instruct-obliterated", "name-" * 12 + "q4_k_m"]
    shown = [model(model_pb2.Model(id=name, state=model_pb2.MODEL_STATE_LOADED)) for name in names]

    cells = listing.rows(shown, listing.LS)
    count = fitting(listing.LS, cells, width)
    header, *lines = str(table(listing.LS[:count], [row[:count] for row in cells])).splitlines()

    assert [line.split()[:2] for line in lines] == [[name, "loaded"] for name in names]
    assert header.split() == list(listing.LS[:count])


@pytest.mark.parametrize("columns", [listing.LS, listing.LS_WIDE, listing.PS, listing.PS_WIDE])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_table_is_no_wider_than_the_terminal_and_leaves_out_its_last_columns(
    columns: tuple[str, ...], width: int
) -> None:
    cells = listing.rows([BUSY], columns)
    count = fitting(columns, cells, width)

    assert all(len(line) <= width for line in str(table(columns[:count], [cells[0][:count]])).splitlines())
    assert count == len(columns) or len(str(table(columns[: count + 1], [cells[0][: count + 1]]))) > width


def test_values_go_on_below_each_other_and_end_at_the_width_of_the_terminal() -> None:
    rows = [("Name", "one two three"), ("", ""), ("Log", Text("first\n\nlast", style="red"))]

    assert str(grid(rows, width=15)).splitlines() == [
        "Name   one two",
        "       three",
        "",
        "Log    first",
        "",
        "       last",
    ]
    assert str(grid(rows)).splitlines()[0] == "Name   one two three"
    assert [str(span.style) for span in grid(rows).spans if span.style == "red"] == ["red"] * 2


BUSY = model(
    model_pb2.Model(
        id="a-model-of-the-usual-length-q4_k_m",
        state=model_pb2.MODEL_STATE_LOADED,
        size_bytes=99 * 10**8,
        memory=model_pb2.MemoryCharge(
            phase=model_pb2.MEMORY_PHASE_MEASURED, bytes={"RAM": 10**9, "CUDA0": 98 * 10**8}
        ),
        lease_count=12,
        worker=model_pb2.Worker(queued_request_count=3),
        runtime_options=model_pb2.RuntimeOptions(sleep_timeout=Duration(seconds=300)),
        expire_time=Timestamp(seconds=int(START.timestamp()) + 240),
        last_use_time=Timestamp(seconds=int(START.timestamp()) - 60),
    )
)


def cells(shown: model_pb2.Model) -> dict[str, str]:
    columns = listing.PS_WIDE
    (row,) = listing.rows([model(shown)], columns, START)
    return dict(zip(columns, map(str, row), strict=True))


@pytest.mark.parametrize(
    ("phase", "resident", "shown"),
    [
        (model_pb2.MEMORY_PHASE_PREDICTED, 0, "2.5 GiB predicted"),
        (model_pb2.MEMORY_PHASE_MEASURED, 0, "2.5 GiB"),
        (model_pb2.MEMORY_PHASE_RELEASING, 0, "2.5 GiB releasing"),
    ],
)
def test_memory_is_what_a_model_is_charged_with_over_all_devices(
    phase: model_pb2.MemoryPhase.ValueType, resident: int, shown: str
) -> None:
    charge = model_pb2.MemoryCharge(phase=phase, bytes={"RAM": 2**29, "CUDA0": 2 * 2**30})

    assert cells(model_pb2.Model(id="m", memory=charge))["MEMORY"] == shown


def test_memory_is_what_the_process_has_where_no_bytes_are_kept_account_of() -> None:
    charge = model_pb2.MemoryCharge(phase=model_pb2.MEMORY_PHASE_RELEASING)
    shown = model_pb2.Model(id="m", memory=charge, worker=model_pb2.Worker(resident_bytes=2**30))

    assert cells(shown)["MEMORY"] == "1.0 GiB releasing"


@pytest.mark.parametrize(
    ("sleep", "idle", "shown"),
    [(300, 0, "sleeps in 4m"), (300, 600, "sleeps in 4m"), (0, 300, "goes in 4m"), (600, 300, "goes in 4m")],
)
def test_a_model_whose_time_runs_says_what_will_become_of_it(sleep: int, idle: int, shown: str) -> None:
    options = model_pb2.RuntimeOptions(
        sleep_timeout=Duration(seconds=sleep), idle_timeout=Duration(seconds=idle)
    )
    expire = Timestamp(seconds=int(START.timestamp()) + 240)
    loaded = model_pb2.Model(id="m", runtime_options=options, expire_time=expire)

    assert cells(loaded)["EXPIRES"] == shown
    verb = shown.split()[0].capitalize()
    assert str(dict(facts(model(loaded), START))[verb]).startswith("in 4 min 0 s, at ")


def test_a_pinned_model_says_so_in_its_state_and_does_not_expire() -> None:
    shown = cells(model_pb2.Model(id="m", pinned=True, state=model_pb2.MODEL_STATE_LOADED))

    assert (shown["STATE"], shown["EXPIRES"]) == ("loaded, pinned", "-")


def test_who_waits_for_what_is_told_apart() -> None:
    shown = model_pb2.Model(
        id="m",
        lease_count=9,
        waiting_request_count=2,
        worker=model_pb2.Worker(active_request_count=6, queued_request_count=3),
    )

    assert (cells(shown)["REQUESTS"], cells(shown)["WAITING"]) == ("9", "2 load, 3 slot")
    assert dict(facts(model(shown)))["Requests"] == (
        "9 use it, 6 decoded now, 3 waiting for a slot, 2 waiting for the load"
    )


def test_a_model_that_is_being_downloaded_says_so_in_its_state() -> None:
    download = model_pb2.Download(completed_bytes=45, total_bytes=100)
    shown = model_pb2.Model(id="m", state=model_pb2.MODEL_STATE_UNLOADED, download=download)

    assert cells(shown)["STATE"] == "downloading 45%"


@pytest.mark.parametrize("columns", [listing.LS, listing.LS_WIDE, listing.PS, listing.PS_WIDE])
def test_every_column_has_something_to_show_for_a_model_of_which_nothing_is_known(
    columns: tuple[str, ...],
) -> None:
    bare = model(model_pb2.Model(id="bare", state=model_pb2.MODEL_STATE_UNLOADED))

    (row,) = listing.rows([bare], columns)
    shown = dict(zip(columns, map(str, row), strict=True))
    assert (shown.pop("MODEL"), shown.pop("STATE"), shown.pop("SIZE", "0 B")) == ("bare", "unloaded", "0 B")
    assert set(shown.values()) == {"-"}


@pytest.mark.parametrize(
    ("artifact", "has_facts", "shown"),
    [
        (model_pb2.ARTIFACT_STATE_ABSENT, False, "absent"),
        (model_pb2.ARTIFACT_STATE_DOWNLOADED, False, "broken"),
        (model_pb2.ARTIFACT_STATE_DOWNLOADED, True, "unloaded"),
    ],
)
def test_files_that_cannot_be_loaded_are_seen_before_anybody_loads_them(
    artifact: model_pb2.ArtifactState.ValueType, has_facts: bool, shown: str
) -> None:
    listed = model_pb2.Model(id="m", state=model_pb2.MODEL_STATE_UNLOADED, artifact_state=artifact)
    listed.source.local.path = "m.gguf"
    if has_facts:
        listed.info.architecture = "llama"

    assert cells(listed)["STATE"] == shown
    files = dict(facts(model(listed)))["Files"]
    assert files == ("m.gguf, 0 B" if has_facts else f"m.gguf, 0 B, {shown}")


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
    meter.advance(advanced(2, 0.5, 500 * 2**20, 2**30))

    assert meter.text() == "500 MiB of 1.0 GiB, 250 MiB/s"


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
            f"Reading weights: {percent}% ({percent * 10} B of 1000 B, 100 B/s)"
            for percent in range(10, 100, 10)
        ],
        "Reading weights: 1000 B in 10.0 s",
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
        (50.0, " 50%  500 B of 1000 B, 250 B/s")
    ]

    view.show(event(ProgressKind.FINISHED, stage_seconds=2.0))
    assert bars.tasks == []
    assert written(bars.console) == ["✓ Reading weights    1000 B in 2.0 s"]


def test_a_load_that_is_joined_in_the_middle_of_a_stage_has_its_bar() -> None:
    bars = Progress(console=console(), auto_refresh=False)

    BarView(bars).show(advanced(1, None, 500))

    assert [(task.total, task.fields["detail"]) for task in bars.tasks] == [(None, "500 B")]
