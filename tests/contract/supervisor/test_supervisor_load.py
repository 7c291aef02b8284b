"""Loading: progress, failure, stall, abort, stop and death."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import LoadFailedError, PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.supervisor import WorkerCrashedError
from paddock_server.worker.v1 import worker_pb2
from tests.contract.supervisor.conftest import LOAD
from tests.fakes.launching import QUICK, write_sidecar
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from paddock_server.supervisor import LogRing, Worker
    from tests.contract.supervisor.conftest import StartWorker

# What depends on the event loop is the same as in the other files, which run on both.
pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

WEIGHTS = worker_pb2.LOAD_STAGE_WEIGHTS
WARMUP = worker_pb2.LOAD_STAGE_WARMUP


class Loading:
    """A load under way in a task of its own."""

    def __init__(self, worker: Worker) -> None:
        self.progress: list[worker_pb2.LoadProgress] = []
        self.task = asyncio.create_task(worker.load(LOAD, self.progress.append, size_bytes=0))

    async def until_half(self) -> None:
        """Wait until half of the weights have been reported."""
        await eventually(lambda: any(one.fraction >= 0.5 for one in self.progress))


async def test_progress_comes_in_order_and_then_ready(start: StartWorker) -> None:
    worker = await start(load_seconds=0.2, progress_steps=4)
    progress: list[worker_pb2.LoadProgress] = []

    ready = await worker.load(LOAD, progress.append, size_bytes=0)

    assert [(one.stage, one.fraction) for one in progress] == [
        (WEIGHTS, 0.25),
        (WEIGHTS, 0.5),
        (WEIGHTS, 0.75),
        (WEIGHTS, 1.0),
        (WARMUP, 1.0),
    ]
    assert ready.slot_count == LOAD.slot_count
    assert not worker.exited.done()


async def test_what_lies_beside_the_model_tells_the_fake_how_to_behave(
    start: StartWorker, tmp_path: Path
) -> None:
    write_sidecar(tmp_path / "m.gguf", slot_count=3)
    worker = await start()

    load = worker_pb2.Load(model_path=str(tmp_path / "m.gguf"))
    ready = await worker.load(load, lambda _: None, size_bytes=0)

    assert ready.slot_count == 3


async def test_a_failure_the_worker_reports_is_raised_as_it_is(start: StartWorker) -> None:
    worker = await start(
        fail_load_reason="MODEL_CORRUPT",
        fail_load_message="tensor 3 ends after the file",
        fail_load_metadata={"tensor": "3"},
        stderr_lines=("llama_model_load: error loading model",),
    )

    with pytest.raises(LoadFailedError, match="tensor 3 ends after the file") as caught:
        await worker.load(LOAD, lambda _: None, size_bytes=0)

    assert caught.value.reason == Reason.MODEL_CORRUPT
    assert caught.value.metadata == {"model": "m", "tensor": "3"}
    # The worker leaves by itself, and that is no crash.
    ended = worker.exited.result()
    assert (ended.exit_code, ended.signal, ended.intended) == (0, "", True)
    assert ended.log_tail == ("llama_model_load: error loading model",)


async def test_a_field_the_worker_blames_becomes_a_violation(start: StartWorker) -> None:
    worker = await start(
        fail_load_reason="INVALID_FIELD",
        fail_load_message="context_size_tokens: at most 128",
        fail_load_field="context_size_tokens",
    )

    with pytest.raises(PaddockError) as caught:
        await worker.load(LOAD, lambda _: None, size_bytes=0)

    violation = caught.value.violations[0]
    assert (violation.field, violation.description) == ("context_size_tokens", "at most 128")


@pytest.mark.parametrize(
    ("how", "exit_code", "signal_name"),
    [({"exit_code": 70}, 70, ""), ({"crash_signal": "SIGABRT"}, None, "SIGABRT")],
    ids=["exit code", "signal"],
)
async def test_a_death_in_the_load_says_how_it_died(
    start: StartWorker, how: dict[str, Any], exit_code: int | None, signal_name: str
) -> None:
    worker = await start(crash_at=0.5, stderr_lines=("GGML_ASSERT(false) failed",), **how)
    progress: list[worker_pb2.LoadProgress] = []

    with pytest.raises(WorkerCrashedError, match="while it loaded") as caught:
        await worker.load(LOAD, progress.append, size_bytes=0)

    assert [one.fraction for one in progress] == [0.25, 0.5]
    assert caught.value.exit is worker.exited.result()
    assert (caught.value.exit.exit_code, caught.value.exit.signal) == (exit_code, signal_name)
    assert not caught.value.exit.intended
    assert caught.value.exit.log_tail[0] == "GGML_ASSERT(false) failed"
    expected = {"signal": signal_name} if signal_name else {"exit_code": str(exit_code)}
    assert caught.value.metadata == {"model": "m", **expected}


async def test_a_load_without_progress_is_stalled_whatever_the_heart_does(start: StartWorker) -> None:
    timeouts = dataclasses.replace(QUICK, load_stall=0.5)
    worker = await start(timeouts=timeouts, hang_in_load=True, heartbeat_seconds=0.02)

    with pytest.raises(PaddockError, match=r"made no progress for 0\.5 s \(stage weights, 50%\)") as caught:
        await worker.load(LOAD, lambda _: None, size_bytes=0)

    assert caught.value.reason == Reason.LOAD_STALLED
    assert caught.value.metadata["stage"] == "weights"
    assert caught.value.metadata["limit"] == "load_stall"
    assert worker.heartbeat is not None
    ended = worker.exited.result()
    assert (ended.signal, ended.intended, ended.cause) == ("SIGKILL", False, "its load stalled")


async def test_steady_progress_does_not_outlast_the_ceiling_for_the_size(start: StartWorker) -> None:
    timeouts = dataclasses.replace(QUICK, load_base=0.5, load_per_gib=0.25)
    worker = await start(timeouts=timeouts, load_seconds=3600, progress_steps=360_000)

    with pytest.raises(PaddockError, match="took more than 1 s, the limit for its size") as caught:
        await worker.load(LOAD, lambda _: None, size_bytes=2 << 30)

    assert caught.value.reason == Reason.LOAD_STALLED
    assert caught.value.metadata["limit"] == "load_ceiling"
    assert caught.value.metadata["limit_seconds"] == "1"


async def test_an_aborted_load_ends_without_a_kill(start: StartWorker) -> None:
    worker = await start(hang_in_load=True)
    loading = Loading(worker)
    await loading.until_half()

    worker.abort_load()

    with pytest.raises(PaddockError) as caught:
        await loading.task
    assert caught.value.reason == Reason.LOAD_ABORTED
    ended = worker.exited.result()
    assert (ended.exit_code, ended.signal, ended.intended) == (0, "", True)


async def test_an_abort_that_is_not_answered_ends_the_worker(start: StartWorker) -> None:
    worker = await start(
        timeouts=dataclasses.replace(QUICK, abort=0.3),
        hang_in_load=True,
        ignore_abort=True,
        ignore_sigterm=True,
        hang_on_shutdown=True,
    )
    loading = Loading(worker)
    await loading.until_half()

    worker.abort_load()

    with pytest.raises(PaddockError, match="did not answer") as caught:
        await loading.task
    assert caught.value.reason == Reason.LOAD_ABORTED
    assert worker.exited.result().signal == "SIGKILL"
    assert worker.exited.result().intended


async def test_an_abort_without_a_load_is_nothing(start: StartWorker) -> None:
    worker = await start()

    worker.abort_load()
    ready = await worker.load(LOAD, lambda _: None, size_bytes=0)
    worker.abort_load()

    reply = await worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="a")))
    assert ready.can_generate
    assert reply.tokenize.token_ids == [97]


@pytest.mark.parametrize(
    ("given", "raised"),
    [(Reason.MODEL_UNLOADED, Reason.LOAD_ABORTED), (Reason.SHUTTING_DOWN, Reason.SHUTTING_DOWN)],
)
async def test_a_stop_ends_the_load(start: StartWorker, given: Reason, raised: Reason) -> None:
    worker = await start(hang_in_load=True)
    loading = Loading(worker)
    await loading.until_half()

    ended = await worker.stop(grace_seconds=10, reason=given)

    assert (ended.exit_code, ended.intended) == (0, True)
    with pytest.raises(PaddockError) as caught:
        await loading.task
    assert caught.value.reason == raised


async def test_a_kill_from_outside_ends_the_load(start: StartWorker) -> None:
    worker = await start(hang_in_load=True)
    loading = Loading(worker)
    await loading.until_half()

    os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(WorkerCrashedError, match="SIGKILL while it loaded"):
        await loading.task


async def test_a_worker_that_freezes_in_the_load_is_killed(start: StartWorker) -> None:
    timeouts = dataclasses.replace(QUICK, hang=0.4)
    worker = await start(timeouts=timeouts, hang_in_load=True, heartbeat_seconds=0.02)
    loading = Loading(worker)
    await loading.until_half()

    os.kill(worker.pid, signal.SIGSTOP)

    with pytest.raises(WorkerCrashedError, match=r"was killed because it sent nothing for 0\.4 s"):
        await loading.task


async def test_an_error_in_the_progress_callback_reaches_the_caller(start: StartWorker) -> None:
    worker = await start()

    def fail(progress: worker_pb2.LoadProgress) -> None:
        raise RuntimeError(str(progress.fraction))

    with pytest.raises(RuntimeError, match=r"0\.25"):
        await worker.load(LOAD, fail, size_bytes=0)

    assert (await worker.stop(grace_seconds=10)).exit_code == 0


async def test_a_flood_of_log_does_not_hold_up_the_load(start: StartWorker, ring: LogRing) -> None:
    worker = await start(flood_stderr_bytes=8_000_000, stderr_lines=("before the flood",))

    ready = await worker.load(LOAD, lambda _: None, size_bytes=0)

    assert ready.can_generate
    assert ring.end > 70_000
    assert ring.first > 0, "the oldest lines made room"
    lines = ring.read(ring.first).lines
    assert lines[0].text == "\ufffd" + "x" * 98
    assert lines[0].pid == worker.pid
    assert lines[0].load_id == "load-1"


async def test_a_flood_without_a_line_end_is_one_line_cut_short(start: StartWorker, ring: LogRing) -> None:
    worker = await start(flood_stderr_bytes=2_000_000, flood_line_bytes=0)

    await worker.load(LOAD, lambda _: None, size_bytes=0)
    await worker.stop(grace_seconds=10)

    text = ring.read(0).lines[0].text
    assert text == "x" * 4096
