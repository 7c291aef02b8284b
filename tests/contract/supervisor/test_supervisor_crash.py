"""The end of a worker that nobody asked for: who waits is told at once, and told why."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import pytest
import structlog

from paddock.errors import Code, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.supervisor import WorkerCrashedError
from paddock_server.worker.v1 import worker_pb2
from tests.contract.supervisor.streams import (
    ENDLESS,
    Reader,
    ask,
    expected_text,
    grandchild_of,
    is_alive,
    running_readers,
)
from tests.fakes.launching import QUICK
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from paddock_server.supervisor import LogRing
    from tests.contract.supervisor.conftest import StartWorker

ROOT: Final = Path(__file__).resolve().parents[3]
PATIENT: Final = dataclasses.replace(QUICK, hang=3600.0)
"""Where only the event under test may end the wait."""


async def crash_of(reader: Reader) -> WorkerCrashedError:
    with pytest.raises(WorkerCrashedError) as caught:
        await reader.task
    return caught.value


async def test_a_kill_ends_eight_streams_each_with_the_signal(start_loaded: StartWorker) -> None:
    worker = await start_loaded(timeouts=PATIENT, tokens_per_second=100)
    readers = await running_readers(worker, 8)

    os.kill(worker.pid, signal.SIGKILL)

    errors = [await crash_of(reader) for reader in readers]
    for error in errors:
        assert (error.reason, error.code) == (Reason.WORKER_CRASHED, Code.UNAVAILABLE)
        assert error.metadata == {"model": "m", "signal": "SIGKILL"}
        assert error.retry_after_seconds is not None
        assert error.exit == worker.exited.result()
        assert str(error) == "The worker of model 'm' was ended by SIGKILL."
    assert len(set(map(id, errors))) == 8, "an exception shared by tasks would gather all their tracebacks"
    assert not worker.exited.result().intended
    assert worker.resident_bytes() == 0


async def test_an_exit_carries_its_code_and_the_last_lines(start_loaded: StartWorker) -> None:
    worker = await start_loaded(crash_after_tokens=3, exit_code=70, stderr_lines=("first", "second"))
    reader = Reader(worker)

    error = await crash_of(reader)

    assert reader.text == "tok0 tok1 tok2", "what came before the crash is not lost"
    assert error.metadata == {"model": "m", "exit_code": "70"}
    assert error.exit.log_tail == ("first", "second", "the fake was told to crash")


async def test_an_exit_with_code_0_that_nobody_asked_for_is_a_crash(start_loaded: StartWorker) -> None:
    worker = await start_loaded(crash_after_tokens=1, exit_code=0)

    error = await crash_of(Reader(worker))

    assert error.exit.exit_code == 0
    assert not error.exit.intended


async def test_a_crash_is_one_warning_in_the_log(start_loaded: StartWorker) -> None:
    worker = await start_loaded(crash_after_tokens=1, crash_signal="SIGSEGV")

    with structlog.testing.capture_logs() as entries:
        await crash_of(Reader(worker))

    assert entries == [
        {
            "event": "worker_crashed",
            "log_level": "warning",
            "model": "m",
            "load_id": "load-1",
            "pid": worker.pid,
            "signal": "SIGSEGV",
        }
    ]


async def test_what_comes_after_a_crash_is_refused_with_its_reason(start_loaded: StartWorker) -> None:
    worker = await start_loaded(crash_after_tokens=1, exit_code=9)
    await crash_of(Reader(worker))

    with pytest.raises(WorkerCrashedError, match="exited with code 9"):
        async with worker.generate(ask(ENDLESS)):
            pass
    with pytest.raises(WorkerCrashedError, match="exited with code 9"):
        await worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="a")))
    assert (await worker.stop(grace_seconds=0)).exit_code == 9


async def test_a_call_ends_with_the_worker(start_loaded: StartWorker) -> None:
    worker = await start_loaded(timeouts=PATIENT)
    os.kill(worker.pid, signal.SIGSTOP)
    asking = asyncio.create_task(worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="a"))))
    await asyncio.sleep(0)

    os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        await asking


async def test_a_frozen_worker_is_killed_and_the_message_says_why(start_loaded: StartWorker) -> None:
    timeouts = dataclasses.replace(QUICK, hang=0.4)
    worker = await start_loaded(timeouts=timeouts, heartbeat_seconds=0.02, tokens_per_second=50)
    readers = await running_readers(worker, 2)

    with structlog.testing.capture_logs() as entries:
        os.kill(worker.pid, signal.SIGSTOP)
        errors = [await crash_of(reader) for reader in readers]

    assert str(errors[0]) == "The worker of model 'm' was killed because it sent nothing for 0.4 s."
    assert errors[0].metadata == {"model": "m", "signal": "SIGKILL", "cause": "it sent nothing for 0.4 s"}
    assert not errors[0].exit.intended
    assert [(one["event"], one["log_level"]) for one in entries] == [
        ("worker_killed", "warning"),
        ("worker_crashed", "warning"),
    ]


async def test_an_exit_is_noticed_where_there_is_no_pidfd(
    start_loaded: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pidfd_open(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), pid, flags)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    worker = await start_loaded(timeouts=PATIENT, fork_grandchild="group", tokens_per_second=100)
    (reader,) = await running_readers(worker, 1)

    os.kill(worker.pid, signal.SIGKILL)

    assert (await crash_of(reader)).exit.signal == "SIGKILL"


async def test_a_silent_worker_whose_heart_beats_lives(start_loaded: StartWorker) -> None:
    worker = await start_loaded(timeouts=dataclasses.replace(QUICK, hang=0.4), heartbeat_seconds=0.05)

    await asyncio.wait({worker.exited}, timeout=1.0)

    assert not worker.exited.done()


@pytest.mark.parametrize(
    ("busy", "cause"),
    [
        ({"step_milliseconds": 600_001}, "one step took longer than 600 s"),
        ({"preparation_milliseconds": 60_001}, "it prepared one request for longer than 60 s"),
    ],
    ids=["step", "preparation"],
)
async def test_a_worker_at_work_that_does_not_end_is_killed_although_its_heart_beats(
    start_loaded: StartWorker, busy: dict[str, int], cause: str
) -> None:
    timeouts = dataclasses.replace(QUICK, hang=1.0)
    worker = await start_loaded(timeouts=timeouts, heartbeat_seconds=0.02, tokens_per_second=50, **busy)
    readers = await running_readers(worker, 2)

    errors = [await crash_of(reader) for reader in readers]

    for error in errors:
        assert (error.reason, error.code) == (Reason.WORKER_CRASHED, Code.UNAVAILABLE)
        assert str(error) == f"The worker of model 'm' was killed because {cause}."
        assert error.metadata == {"model": "m", "signal": "SIGKILL", "cause": cause}
        assert not error.exit.intended


async def test_work_that_takes_as_long_as_it_may_is_no_fault(start_loaded: StartWorker) -> None:
    timeouts = dataclasses.replace(QUICK, hang=0.4)
    busy = {"step_milliseconds": 600_000, "preparation_milliseconds": 60_000}
    worker = await start_loaded(timeouts=timeouts, heartbeat_seconds=0.02, tokens_per_second=50, **busy)
    await running_readers(worker, 1)

    await asyncio.wait({worker.exited}, timeout=0.5)

    assert not worker.exited.done()


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("garbage", "it broke the framing: a frame announces 67108865 bytes"),
        ("not_a_message", "it sent a frame that is not a message"),
        ("empty_frame", "it sent an empty frame"),
        ("second_hello", "it sent a second hello"),
        ("unknown_generation", "it spoke of generation 1099511627776, which there never was"),
        ("unknown_call", "it spoke of call 1099511627776, which there never was"),
        ("close_connection", "it closed its connection and did not exit"),
    ],
)
async def test_a_worker_that_breaks_the_protocol_is_killed(
    start_loaded: StartWorker, fault: str, cause: str
) -> None:
    worker = await start_loaded(timeouts=PATIENT, fault=fault, fault_after_tokens=2)
    reader = Reader(worker)

    error = await crash_of(reader)

    assert expected_text(2).startswith(reader.text)  # what came with garbage in one piece may go with it
    assert str(error).startswith(f"The worker of model 'm' was killed because {cause}")
    assert error.metadata["cause"].startswith(cause)
    assert (error.exit.signal, error.exit.intended) == ("SIGKILL", False)


@pytest.mark.parametrize("fault", ["ready", "load_progress"])
async def test_news_of_a_load_that_is_over_break_the_protocol(start_loaded: StartWorker, fault: str) -> None:
    worker = await start_loaded(timeouts=PATIENT, fault=fault)

    error = await crash_of(Reader(worker))

    assert error.exit.cause == f"it sent {fault} without a load in progress"


async def test_silence_while_a_stream_runs_ends_it(start_loaded: StartWorker) -> None:
    worker = await start_loaded(
        timeouts=dataclasses.replace(QUICK, hang=0.4), fault="silence", fault_after_tokens=2
    )

    assert (await crash_of(Reader(worker))).exit.cause == "it sent nothing for 0.4 s"


@pytest.mark.parametrize("kind", ["group", "session"])
async def test_a_grandchild_that_holds_pipe_and_socket_does_not_hide_the_crash(
    start_loaded: StartWorker, ring: LogRing, kind: str
) -> None:
    worker = await start_loaded(timeouts=PATIENT, fork_grandchild=kind, tokens_per_second=100)
    readers = await running_readers(worker, 8)
    grandchild = await grandchild_of(ring)

    os.kill(worker.pid, signal.SIGKILL)

    try:
        for reader in readers:
            assert (await crash_of(reader)).exit.signal == "SIGKILL"
        if kind == "session":
            assert is_alive(grandchild), "out of the group, out of reach"
    finally:
        if kind == "session":
            grandchild.kill()


async def test_no_worker_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    """Whatever kills the server: the kernel ends its workers, or they see the end of their socket."""
    with (tmp_path / "log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.fakes.lone_server",
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    try:
        assert server.stdout is not None
        workers = [psutil.Process(pid) for pid in json.loads(await server.stdout.readline())]
        assert [is_alive(worker) for worker in workers] == [True, True]
    finally:
        server.kill()
        await server.communicate()

    await eventually(lambda: not any(is_alive(worker) for worker in workers))
