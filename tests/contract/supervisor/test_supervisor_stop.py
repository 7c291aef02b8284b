"""The stop ladder against workers that obey, that do not, and that cannot."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from paddock.errors import PaddockError, Reason
from tests.contract.supervisor.streams import Reader, grandchild_of, is_alive, running_readers
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from paddock_server.supervisor import LogRing
    from tests.contract.supervisor.conftest import StartWorker

Entries = list["MutableMapping[str, Any]"]


def steps(entries: Entries) -> list[tuple[str, str]]:
    return [(entry["event"], entry["log_level"]) for entry in entries]


async def test_a_worker_that_obeys_is_asked_once(start_loaded: StartWorker) -> None:
    worker = await start_loaded()

    with structlog.testing.capture_logs() as entries:
        ended = await worker.stop(grace_seconds=10)

    assert (ended.exit_code, ended.signal, ended.intended) == (0, "", True)
    assert worker.exited.result() == ended
    assert steps(entries) == [("worker_shutdown_sent", "info"), ("worker_exited", "info")]
    assert all(entry["model"] == "m" and entry["pid"] == worker.pid for entry in entries)


async def test_a_worker_deaf_to_the_frame_is_terminated(start_loaded: StartWorker) -> None:
    worker = await start_loaded(hang_on_shutdown=True)

    with structlog.testing.capture_logs() as entries:
        ended = await worker.stop(grace_seconds=0.1)

    assert (ended.exit_code, ended.intended) == (0, True)
    assert steps(entries) == [
        ("worker_shutdown_sent", "info"),
        ("worker_terminated", "info"),
        ("worker_exited", "info"),
    ]


async def test_a_worker_deaf_to_sigterm_is_killed_with_a_warning(start_loaded: StartWorker) -> None:
    worker = await start_loaded(hang_on_shutdown=True, ignore_sigterm=True)

    with structlog.testing.capture_logs() as entries:
        ended = await worker.stop(grace_seconds=0.1)

    assert (ended.exit_code, ended.signal, ended.intended) == (None, "SIGKILL", True)
    assert not ended.oom_killed
    assert steps(entries) == [
        ("worker_shutdown_sent", "info"),
        ("worker_terminated", "info"),
        ("worker_killed", "warning"),
        ("worker_exited", "info"),
    ]


async def test_a_frozen_worker_is_killed(start_loaded: StartWorker) -> None:
    worker = await start_loaded()
    os.kill(worker.pid, signal.SIGSTOP)

    ended = await worker.stop(grace_seconds=0.1)

    assert (ended.signal, ended.intended) == ("SIGKILL", True)


async def test_a_worker_that_has_not_loaded_stops_too(start: StartWorker) -> None:
    worker = await start()

    assert (await worker.stop(grace_seconds=10)).exit_code == 0


@pytest.mark.parametrize("reason", [Reason.MODEL_UNLOADED, Reason.SHUTTING_DOWN])
async def test_what_runs_ends_with_the_reason_of_the_stop(start_loaded: StartWorker, reason: Reason) -> None:
    worker = await start_loaded(tokens_per_second=100)
    readers = await running_readers(worker, 3)

    ended = await worker.stop(grace_seconds=10, reason=reason)

    assert ended.intended
    for reader in readers:
        with pytest.raises(PaddockError) as caught:
            await reader.task
        assert caught.value.reason == reason
        assert caught.value.metadata["model"] == "m"
    with pytest.raises(PaddockError) as caught:
        await Reader(worker).task
    assert caught.value.reason == Reason.MODEL_UNLOADED


async def test_stops_at_once_are_one_stop(start_loaded: StartWorker) -> None:
    worker = await start_loaded()

    with structlog.testing.capture_logs() as entries:
        results = await asyncio.gather(*(worker.stop(grace_seconds=10) for _ in range(3)))
        results.append(await worker.stop(grace_seconds=10))

    assert len(set(results)) == 1
    assert steps(entries) == [("worker_shutdown_sent", "info"), ("worker_exited", "info")]


async def test_a_caller_that_goes_away_does_not_cancel_the_stop(start_loaded: StartWorker) -> None:
    worker = await start_loaded()
    stopping = asyncio.create_task(worker.stop(grace_seconds=10))
    await asyncio.sleep(0)

    stopping.cancel()
    await asyncio.wait({stopping})

    assert stopping.cancelled()
    assert (await asyncio.shield(worker.exited)).exit_code == 0


async def test_a_grandchild_in_the_group_goes_with_the_worker(
    start_loaded: StartWorker, ring: LogRing
) -> None:
    worker = await start_loaded(fork_grandchild="group")
    grandchild = await grandchild_of(ring)

    ended = await worker.stop(grace_seconds=10)

    assert ended.exit_code == 0
    await eventually(lambda: not is_alive(grandchild))


async def test_a_grandchild_that_left_the_group_and_holds_the_pipe_does_not_hold_up_the_stop(
    start_loaded: StartWorker, ring: LogRing
) -> None:
    worker = await start_loaded(fork_grandchild="session")
    grandchild = await grandchild_of(ring)

    try:
        ended = await worker.stop(grace_seconds=10)

        assert (ended.exit_code, ended.intended) == (0, True)
        assert is_alive(grandchild)
    finally:
        grandchild.kill()


async def test_a_crash_before_the_stop_stays_a_crash(start_loaded: StartWorker) -> None:
    worker = await start_loaded(crash_after_tokens=1, exit_code=5)
    with pytest.raises(PaddockError):
        await Reader(worker).task

    ended = await worker.stop(grace_seconds=10)

    assert (ended.exit_code, ended.intended) == (5, False)
