"""`paddock pull` and `paddock rm`, and downloads as other commands show them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import ExitCode
from paddock.cli.output import download_text
from paddock.cli.progress import Meter
from paddock.errors import Reason, make_error
from paddock.types import Download, Failure, LoadProgress, ProgressKind, Stage
from paddock.v1 import model_manager_pb2 as pb
from tests.clients.terminal import terminal

if TYPE_CHECKING:
    from tests.clients.fake_server import FakeServer
    from tests.clients.invoke import Paddock

NAME = "hf:org/repo:Q4_K_M"


def test_pull_shows_how_far_it_is_and_what_is_there_then(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("pull", NAME)

    assert result.exit_code == ExitCode.OK
    assert result.stdout == ""
    assert "Downloading: 70% (700 B of 1000 B)" in result.stderr
    assert "Downloaded org/repo:Q4_K_M" in result.stderr
    assert server.manager.requests("Download") == [pb.DownloadRequest(model=NAME)]


def test_pull_as_json_writes_one_event_a_line(paddock: Paddock) -> None:
    events = [json.loads(line) for line in paddock("pull", NAME, "--json").stdout.splitlines()]

    assert [event["event"] for event in events] == ["progress", "progress", "downloaded"]
    assert events[0]["completed_bytes"] == 700
    assert events[-1]["model"]["id"] == "org/repo:Q4_K_M"


@pytest.mark.parametrize(
    ("flag", "mode", "told"),
    [
        ("--pause", pb.STOP_DOWNLOAD_MODE_PAUSE, "Paused"),
        ("--cancel", pb.STOP_DOWNLOAD_MODE_CANCEL, "Cancelled"),
    ],
)
def test_pull_can_stop_a_download(
    paddock: Paddock,
    server: FakeServer,
    flag: str,
    mode: pb.StopDownloadMode.ValueType,
    told: str,
) -> None:
    result = paddock("pull", NAME, flag)

    assert result.exit_code == ExitCode.OK
    assert told in result.stderr
    assert server.manager.requests("StopDownload") == [pb.StopDownloadRequest(model=NAME, mode=mode)]


def test_pause_and_cancel_exclude_each_other(paddock: Paddock) -> None:
    assert paddock("pull", NAME, "--pause", "--cancel").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.HUB_FILE_NOT_FOUND, ExitCode.NOT_FOUND),
        (Reason.HUB_ACCESS_DENIED, ExitCode.FAILED),
        (Reason.HUB_UNREACHABLE, ExitCode.UNAVAILABLE),
        (Reason.DISK_FULL, ExitCode.CANNOT_LOAD),
    ],
)
def test_the_reason_of_a_failed_pull_is_its_exit_code(
    paddock: Paddock, server: FakeServer, reason: Reason, code: ExitCode
) -> None:
    server.manager.errors["Download"] = make_error(reason, "No such luck.")

    result = paddock("pull", NAME)

    assert result.exit_code == code
    assert "No such luck." in result.stderr


def test_ctrl_c_leaves_a_download_running_and_says_how_to_stop_it(server: FakeServer) -> None:
    with terminal(server.target, "pull", "hf:org/stuck") as pull:
        pull.read_until("80%")
        pull.interrupt()
        text = pull.read_to_end()
        assert pull.exit_code() == ExitCode.INTERRUPTED

    assert "The download goes on." in text
    assert "`paddock pull hf:org/stuck --pause`" in " ".join(text.split())


def test_rm_tells_what_is_free_again(paddock: Paddock, server: FakeServer) -> None:
    assert "1000 B are free again" in paddock("rm", "org/repo:Q4_K_M").stderr
    assert json.loads(paddock("rm", "x", "--if-exists", "--json").stdout) == {"model": "x", "freed_bytes": 0}
    assert server.manager.requests("Delete")[-1] == pb.DeleteRequest(model="x", allow_missing=True)


def test_a_download_is_shown_by_how_it_is() -> None:
    download = Download(completed_bytes=1, total_bytes=4, bytes_per_second=0, paused=False, failure=None)
    failure = Failure(
        reason="DISK_FULL",
        message="",
        metadata={},
        failure_time=None,
        log_tail=(),
        exit_code=None,
        signal="",
    )

    assert download_text(download).plain == "downloading 25%"
    assert download_text(_with(download, paused=True)).plain == "paused 25%"
    assert download_text(_with(download, failure=failure)).plain == "download failed (DISK_FULL)"


def _with(download: Download, *, paused: bool = False, failure: Failure | None = None) -> Download:
    return Download(
        completed_bytes=download.completed_bytes,
        total_bytes=download.total_bytes,
        bytes_per_second=download.bytes_per_second,
        paused=paused,
        failure=failure,
    )


def test_the_rate_of_a_download_that_goes_on_counts_what_arrives_now() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    meter = Meter()
    meter.start(LoadProgress(stage=Stage.DOWNLOAD, kind=ProgressKind.STARTED, event_time=began))
    for seconds, completed in ((0, 900), (2, 1000)):
        meter.advance(
            LoadProgress(
                stage=Stage.DOWNLOAD,
                kind=ProgressKind.ADVANCED,
                event_time=began + timedelta(seconds=seconds),
                completed_bytes=completed,
                total_bytes=1000,
            )
        )

    assert meter.bytes_per_second == 50
