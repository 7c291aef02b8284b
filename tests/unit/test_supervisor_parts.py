"""The parts of the supervisor that need no process: exits, merging, the ladder's last step, environments."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest
import structlog

from paddock.errors import Reason, make_error
from paddock.v1 import generation_pb2
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.supervisor import SupervisorTimeouts, WorkerCrashedError, WorkerExit
from paddock_server.supervisor.exit import OomWatch, oom_counter_files, split_return_code
from paddock_server.supervisor.failures import error_of_failure
from paddock_server.supervisor.generation import MAX_MERGED_BYTES, Generation
from paddock_server.supervisor.launcher import worker_environment
from paddock_server.supervisor.loading import LoadInbox, follow_load
from paddock_server.supervisor.stop import descend
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def exit_of(
    *, exit_code: int | None = None, signal_name: str = "", cause: str = "", oom_killed: bool = False
) -> WorkerExit:
    return WorkerExit(exit_code, signal_name, False, (), cause, oom_killed)


# Exits


@pytest.mark.parametrize(
    ("ended", "sentence", "metadata"),
    [
        (exit_of(exit_code=3), "exited with code 3", {"exit_code": "3"}),
        (exit_of(signal_name="SIGSEGV"), "was ended by SIGSEGV", {"signal": "SIGSEGV"}),
        (
            exit_of(signal_name="SIGKILL", oom_killed=True),
            "was ended by SIGKILL, most likely by the kernel's out-of-memory killer",
            {"signal": "SIGKILL", "oom_killed": "true"},
        ),
        (
            exit_of(signal_name="SIGKILL", cause="it sent an empty frame"),
            "was killed because it sent an empty frame",
            {"signal": "SIGKILL", "cause": "it sent an empty frame"},
        ),
        (exit_of(), "has not exited", {}),
    ],
)
def test_a_crash_is_told_in_words_and_in_metadata(
    ended: WorkerExit, sentence: str, metadata: dict[str, str]
) -> None:
    error = WorkerCrashedError.of("m", ended)

    assert str(error) == f"The worker of model 'm' {sentence}."
    assert error.metadata == {"model": "m", **metadata}
    assert error.reason == Reason.WORKER_CRASHED


@pytest.mark.parametrize(
    ("return_code", "expected"),
    [
        (0, (0, "")),
        (70, (70, "")),
        (-9, (None, "SIGKILL")),
        (-11, (None, "SIGSEGV")),
        (-40, (None, "signal 40")),
    ],
)
def test_a_return_code_is_an_exit_code_or_a_signal(
    return_code: int, expected: tuple[int | None, str]
) -> None:
    assert split_return_code(return_code) == expected


def test_the_oom_killer_is_seen_within_the_window_only(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 1\noom_kill 2\noom_group_kill 0\n")
    watch = OomWatch([tmp_path / "missing", events])
    assert not watch.has_struck()

    events.write_text("low 0\noom 2\noom_kill 3\n")
    assert watch.has_struck()

    for _ in range(3):
        watch.sample()
    assert not watch.has_struck()


def test_without_a_counter_nothing_is_blamed_on_the_oom_killer(tmp_path: Path) -> None:
    assert not OomWatch([tmp_path / "missing"]).has_struck()
    assert not OomWatch([]).has_struck()


def test_the_counter_of_this_machine_is_found() -> None:
    files = oom_counter_files()

    assert files
    assert any(file.is_file() for file in files)


def test_a_reported_failure_keeps_its_reason_even_an_unknown_one() -> None:
    failure = worker_pb2.Failure(reason="NEW_REASON", message="what", metadata={"a": "b"})

    error = error_of_failure(failure, model_id="m")

    assert (error.reason, error.message, error.metadata) == ("NEW_REASON", "what", {"model": "m", "a": "b"})


def test_a_failure_without_a_word_is_internal() -> None:
    error = error_of_failure(worker_pb2.Failure(), model_id="m")

    assert error.reason == Reason.INTERNAL
    assert "'m'" in error.message


# Time-outs


def test_the_ceiling_of_a_load_grows_with_the_size() -> None:
    timeouts = SupervisorTimeouts()

    assert timeouts.load_ceiling(0) == 300
    assert timeouts.load_ceiling(10 * GIB) == 500
    assert timeouts.load_stall_in_warmup(10 * GIB) == 260


async def test_the_warm_up_of_a_large_file_may_be_silent_for_longer() -> None:
    timeouts = SupervisorTimeouts(load_stall=0.0, load_base=3600.0, load_per_gib=3600.0)
    inbox = LoadInbox("m")
    inbox.progress.append(worker_pb2.LoadProgress(stage=worker_pb2.LOAD_STAGE_WARMUP))
    load = asyncio.ensure_future(
        follow_load(inbox, size_bytes=GIB, timeouts=timeouts, on_progress=lambda _: None)
    )
    await asyncio.sleep(0.01)
    assert not load.done()

    inbox.end(worker_pb2.Ready(slot_count=1))

    assert (await load).slot_count == 1


# Merging


class Host:
    """A connection that only counts."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def start_generation(self, generation: Generation) -> int:
        del generation
        return 1

    def leave_generation(self, number: int) -> None:
        self.left.append(number)


def update_of(*texts: str, choice: int = 0) -> worker_pb2.GenerationUpdate:
    deltas = [generation_pb2.Delta(choice_index=choice, text=text, token_count=1) for text in texts]
    return worker_pb2.GenerationUpdate(generation=1, deltas=pb.Deltas(deltas=deltas))


async def test_updates_that_pile_up_are_one_and_in_order() -> None:
    async with Generation(Host(), pb.GenerateRequest()) as generation:
        generation.push(
            worker_pb2.GenerationUpdate(generation=1, started=worker_pb2.GenerationStarted(prompt_tokens=3))
        )
        generation.push(update_of("a", "b"))
        generation.push(update_of("c", choice=1))
        first = await anext(generation)
        generation.push(update_of("d"))
        second = await anext(generation)

    assert first.started.prompt_tokens == 3
    assert [(delta.choice_index, delta.text) for delta in first.deltas.deltas] == [
        (0, "a"),
        (0, "b"),
        (1, "c"),
    ]
    assert [delta.text for delta in second.deltas.deltas] == ["d"]


async def test_a_pile_is_cut_into_updates_that_a_message_can_carry() -> None:
    piece = "x" * (MAX_MERGED_BYTES // 4)
    async with Generation(Host(), pb.GenerateRequest()) as generation:
        for _ in range(20):
            generation.push(update_of(piece))
        generation.push(
            worker_pb2.GenerationUpdate(generation=1, finished=worker_pb2.GenerationFinished(seed=1))
        )
        updates = [update async for update in generation]

    assert all(update.ByteSize() < 2 * MAX_MERGED_BYTES for update in updates)
    assert sum(len(delta.text) for update in updates for delta in update.deltas.deltas) == 20 * len(piece)
    assert [update.HasField("finished") for update in updates] == [False] * (len(updates) - 1) + [True]


async def test_text_that_arrived_comes_before_the_error() -> None:
    async with Generation(Host(), pb.GenerateRequest()) as generation:
        generation.push(update_of("a"))
        generation.fail(make_error(Reason.MODEL_UNLOADED, "gone"))
        generation.fail(make_error(Reason.INTERNAL, "later"))

        assert (await anext(generation)).deltas.deltas[0].text == "a"
        with pytest.raises(Exception, match="gone"):
            await anext(generation)


async def test_leaving_is_told_to_the_connection() -> None:
    host = Host()
    with pytest.raises(ZeroDivisionError):
        async with Generation(host, pb.GenerateRequest()):
            raise ZeroDivisionError

    assert host.left == [1]


# The ladder


class Immortal:
    """A process that no signal ends."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.received: list[signal.Signals] = []

    def signal_group(self, number: signal.Signals) -> None:
        self.received.append(number)


class Sink:
    """A connection that nobody reads."""

    def __init__(self) -> None:
        self.sent: list[str | None] = []

    def send(self, frame: worker_pb2.ServerFrame) -> None:
        self.sent.append(frame.WhichOneof("frame"))


async def test_a_process_that_cannot_be_killed_ends_the_ladder_too() -> None:
    process, sink = Immortal(), Sink()
    timeouts = SupervisorTimeouts(terminate=0.0, kill=0.0)

    with structlog.testing.capture_logs() as entries:
        gone = await descend(
            process,
            sink,
            grace_seconds=0.0,
            hurried=asyncio.Event(),
            timeouts=timeouts,
            log=structlog.get_logger().bind(model="m"),
        )

    assert not gone
    assert sink.sent == ["shutdown"]
    assert process.received == [signal.SIGTERM, signal.SIGKILL]
    assert [(entry["event"], entry["log_level"]) for entry in entries] == [
        ("worker_shutdown_sent", "info"),
        ("worker_terminated", "info"),
        ("worker_killed", "warning"),
        ("worker_unkillable", "error"),
    ]


async def test_a_hurry_ends_the_grace_of_a_stop_under_way() -> None:
    process, sink, hurried = Immortal(), Sink(), asyncio.Event()
    timeouts = SupervisorTimeouts(terminate=0.0, kill=0.0)
    log = structlog.get_logger().bind(model="m")

    asyncio.get_running_loop().call_soon(hurried.set)
    async with asyncio.timeout(10):
        await descend(process, sink, grace_seconds=1000, hurried=hurried, timeouts=timeouts, log=log)

    assert process.received == [signal.SIGTERM, signal.SIGKILL]


# Environments


def test_a_worker_sees_settings_and_no_secrets() -> None:
    environment = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "HF_TOKEN": "secret",
        "PADDOCK_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "LLAMA_API_KEY": "secret",
    }

    passed = worker_environment(environment, {"EXTRA": "1"})

    assert passed == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "GGML_NO_BACKTRACE": "1",
        "EXTRA": "1",
    }
