"""From the start of a process to its hello."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from typing import TYPE_CHECKING

import pytest

from paddock.errors import PaddockError, Reason
from paddock_server.supervisor import LocalLauncher, LogRing, WorkerCrashedError, WorkerSpec
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import QUICK, fake_launcher
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from tests.contract.supervisor.conftest import StartWorker

PATIENT = dataclasses.replace(QUICK, handshake=3600.0)
"""A test with these ends by what it is about, or not at all."""

SHOW_SURROUNDINGS = """
import os, sys
print(sorted(os.environ))
print("stdin", os.readlink("/proc/self/fd/0"))
print("stdout is stderr", os.fstat(1).st_ino == os.fstat(2).st_ino)
print("leads its session", os.getsid(0) == os.getpgid(0) == os.getpid())
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False
print("open", [fd for fd in range(256) if is_open(fd)], "passed", sys.argv[2])
"""


async def test_a_worker_introduces_itself(start: StartWorker) -> None:
    before = time.time()
    worker = await start()

    assert worker.pid > 0
    assert worker.instance_id
    assert before <= worker.start_time <= time.time()
    assert worker.resident_bytes() > 1_000_000
    assert not worker.exited.done()


async def test_two_workers_have_different_instance_ids(start: StartWorker) -> None:
    first, second = await asyncio.gather(start(), start())

    assert first.instance_id != second.instance_id


async def test_a_death_in_the_handshake_ends_the_wait_at_once(ring: LogRing) -> None:
    launcher = fake_launcher(Behaviour(die_in_handshake=True, exit_code=7), timeouts=PATIENT)

    with pytest.raises(WorkerCrashedError, match="exited with code 7 before its hello") as caught:
        await launcher.start(WorkerSpec("m", "load", ring))

    assert caught.value.reason == Reason.WORKER_CRASHED
    assert caught.value.metadata == {"model": "m", "exit_code": "7"}
    assert caught.value.retry_after_seconds is not None
    assert caught.value.exit.exit_code == 7
    assert not caught.value.exit.intended
    assert caught.value.exit.log_tail == ("the fake was told to crash",)


async def test_a_signal_in_the_handshake_is_named(ring: LogRing) -> None:
    launcher = fake_launcher(Behaviour(die_in_handshake=True, crash_signal="SIGSEGV"), timeouts=PATIENT)

    with pytest.raises(WorkerCrashedError, match="SIGSEGV") as caught:
        await launcher.start(WorkerSpec("m", "load", ring))

    assert caught.value.metadata["signal"] == "SIGSEGV"
    assert caught.value.exit.exit_code is None


async def test_a_hello_that_does_not_come_is_a_stalled_spawn(ring: LogRing) -> None:
    timeouts = dataclasses.replace(QUICK, handshake=0.5)
    launcher = fake_launcher(Behaviour(hang_in_handshake=True), timeouts=timeouts)

    with pytest.raises(PaddockError, match=r"did not say hello within 0\.5 s") as caught:
        await launcher.start(WorkerSpec("m", "load", ring))

    assert caught.value.reason == Reason.LOAD_STALLED
    assert caught.value.metadata["stage"] == "spawn"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(wrong_version=True), "was killed because it speaks version 2 of the protocol, not 1"),
        (Behaviour(wrong_instance_id=True), "was killed because it calls itself 'somebody else'"),
    ],
    ids=["version", "instance id"],
)
async def test_a_wrong_hello_is_refused(ring: LogRing, behaviour: Behaviour, message: str) -> None:
    with pytest.raises(WorkerCrashedError, match=message):
        await fake_launcher(behaviour, timeouts=PATIENT).start(WorkerSpec("m", "load", ring))


async def test_a_command_that_does_not_exist_is_a_clear_error(ring: LogRing) -> None:
    launcher = LocalLauncher(("/nowhere/worker",), QUICK)

    with pytest.raises(PaddockError, match=r"could not be started: .*No such file") as caught:
        await launcher.start(WorkerSpec("m", "load", ring))

    assert caught.value.reason == Reason.WORKER_CRASHED


async def test_a_start_that_is_cancelled_leaves_no_process(ring: LogRing) -> None:
    launcher = fake_launcher(Behaviour(hang_in_handshake=True, fork_grandchild="group"), timeouts=PATIENT)
    starting = asyncio.create_task(launcher.start(WorkerSpec("m", "load", ring)))
    await eventually(lambda: ring.end > 0)  # the grandchild has spoken: both processes are there

    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_worker_gets_its_socket_and_nothing_else(
    ring: LogRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PADDOCK_API_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launcher = LocalLauncher((sys.executable, "-c", SHOW_SURROUNDINGS), QUICK)

    with pytest.raises(WorkerCrashedError, match="exited with code 0") as caught:
        await launcher.start(WorkerSpec("m", "load", ring))

    names, stdin, outputs, session, descriptors = caught.value.exit.log_tail
    assert "'GGML_NO_BACKTRACE'" in names
    assert "'OMP_NUM_THREADS'" in names
    assert "TOKEN" not in names
    assert "KEY" not in names
    assert stdin == "stdin /dev/null"
    assert outputs == "stdout is stderr True"
    assert session == "leads its session True"
    passed = descriptors.rpartition(" ")[2]
    assert descriptors == f"open [0, 1, 2, {passed}] passed {passed}"
