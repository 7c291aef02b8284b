"""What becomes of work that outlives its caller."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from paddock.errors import Reason, make_error
from paddock_server.manager.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence


async def fail(error: Exception, when: Awaitable[object] | None = None) -> None:
    if when is not None:
        await when
    raise error


def told(logs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(line["log_level"], line["event"], line["task"]) for line in logs]


BUG = ValueError("a bug")
REFUSED = make_error(Reason.MODEL_IN_USE, "It is busy.")


@pytest.mark.parametrize("error", [BUG, REFUSED])
async def test_who_waits_is_told_and_the_log_is_not(error: Exception) -> None:
    tasks = Tasks()
    with capture_logs() as logs:
        with pytest.raises(type(error)):
            await tasks.finish(fail(error), "delete-tiny")
        await tasks.ended(5)
    assert logs == []


@pytest.mark.parametrize(
    ("error", "line"),
    [(BUG, ("critical", "task_bug", "delete-tiny")), (REFUSED, ("warning", "task_failed", "delete-tiny"))],
)
async def test_what_fails_after_its_caller_has_gone_is_logged(
    error: Exception, line: tuple[str, str, str]
) -> None:
    tasks, gone = Tasks(), asyncio.Event()
    caller = asyncio.create_task(tasks.finish(fail(error, gone.wait()), "delete-tiny"))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    with capture_logs() as logs:
        gone.set()
        await tasks.ended(5)
        await asyncio.sleep(0)
    assert told(logs) == [line]


async def test_what_nobody_waits_for_logs_its_bugs_only() -> None:
    tasks = Tasks()
    with capture_logs() as logs:
        tasks.run(fail(BUG), "look")
        tasks.run(fail(REFUSED), "load-tiny")
        await tasks.ended(5)
        await asyncio.sleep(0)
    assert told(logs) == [("critical", "task_bug", "look")]


async def test_cancelled_work_has_failed_of_nothing() -> None:
    tasks = Tasks()
    task = tasks.run(fail(BUG, asyncio.Event().wait()), "look")
    await asyncio.sleep(0)
    with capture_logs() as logs:
        await tasks.cancel()
    assert task.cancelled()
    assert logs == []


async def test_waiting_for_the_end_is_bounded() -> None:
    tasks = Tasks()
    tasks.run(fail(BUG, asyncio.Event().wait()), "look")
    await tasks.ended(0.01)
    await tasks.cancel()
