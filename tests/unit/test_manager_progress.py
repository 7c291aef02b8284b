"""A load as its callers see it: stages, late callers, slow callers."""

from __future__ import annotations

import asyncio
import contextlib
import weakref

import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.manager.failure import Failure
from paddock_server.manager.progress import LoadView, Subscription

LOADED = pb.LoadResponse(loaded=pb.Loaded(already_loaded=False))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> LoadView:
    return LoadView(clock)


async def rest(subscription: Subscription) -> list[pb.LoadResponse]:
    events: list[pb.LoadResponse] = []
    while (event := await subscription.next()) is not None:
        events.append(event)
    return events


async def unread(subscription: Subscription) -> list[pb.LoadResponse]:
    """Read what there is without waiting for more."""
    events: list[pb.LoadResponse] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            while (event := await subscription.next()) is not None:
                events.append(event)
    return events


def kinds(events: list[pb.LoadResponse]) -> list[str | None]:
    return [
        event.progress.WhichOneof("detail") if event.HasField("progress") else event.WhichOneof("event")
        for event in events
    ]


async def test_at_most_four_advances_a_second_are_shown(view: LoadView, clock: Clock) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.begin(pb.STAGE_WEIGHTS, "reading")
    shown: list[float] = []
    for step in range(100):
        view.advance(pb.STAGE_WEIGHTS, step / 100, 1000)
        clock.now += 0.02
        shown += [
            event.progress.advanced.fraction
            for event in await unread(subscription)
            if event.progress.HasField("advanced")
        ]
    assert 7 <= len(shown) <= 8, "two seconds of progress"
    assert shown == sorted(shown)


async def test_a_slow_caller_loses_only_advances(view: LoadView, clock: Clock) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.begin(pb.STAGE_WEIGHTS, "reading")
    for step in range(1000):
        clock.now += 1
        view.advance(pb.STAGE_WEIGHTS, step / 1000, 0)
    view.begin(pb.STAGE_WARMUP, "warming up")
    view.end(LOADED)
    events = await rest(subscription)
    assert kinds(events) == ["started", "advanced", "finished", "started", "finished", "loaded"]
    assert events[1].progress.advanced.fraction == pytest.approx(0.999)


async def test_a_late_caller_gets_the_current_stage_and_where_it_is(view: LoadView, clock: Clock) -> None:
    view.begin(pb.STAGE_SPAWN, "starting")
    view.begin(pb.STAGE_WEIGHTS, "reading")
    view.advance(pb.STAGE_WEIGHTS, 0.25, 400)
    clock.now += 1
    subscription = Subscription()
    view.attach(subscription)
    view.end(LOADED)
    events = await rest(subscription)
    assert kinds(events) == ["started", "advanced", "finished", "loaded"]
    assert events[1].progress.advanced.completed_bytes == 100


async def test_everyone_gets_the_same_end(view: LoadView) -> None:
    subscriptions = [Subscription() for _ in range(3)]
    for subscription in subscriptions:
        view.attach(subscription)
    view.end(LOADED)
    assert [await rest(subscription) for subscription in subscriptions] == [[LOADED]] * 3


async def test_a_failure_comes_after_what_is_unread(view: LoadView) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.begin(pb.STAGE_SPAWN, "starting")
    view.fail(Failure(Reason.LOAD_ABORTED, "aborted"))
    assert kinds([event for event in [await subscription.next()] if event]) == ["started"]
    with pytest.raises(PaddockError) as caught:
        await subscription.next()
    assert caught.value.reason == Reason.LOAD_ABORTED


async def test_a_warning_breaks_its_stage_off_and_the_next_attempt_begins_anew(view: LoadView) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.begin(pb.STAGE_SPAWN, "starting")
    view.warn(Failure(Reason.WORKER_CRASHED, "it died", signal="SIGSEGV"))
    view.begin(pb.STAGE_SPAWN, "starting")
    view.end(LOADED)
    events = await rest(subscription)
    assert kinds(events) == ["started", "warning", "started", "finished", "loaded"]
    assert events[1].progress.stage == pb.STAGE_SPAWN
    assert events[1].progress.warning.failure.signal == "SIGSEGV"


async def test_the_first_end_is_the_end(view: LoadView) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.end(LOADED)
    view.fail(Failure(Reason.SHUTTING_DOWN, "too late"))
    assert await rest(subscription) == [LOADED]


def test_those_who_have_gone_are_forgotten(view: LoadView) -> None:
    gone = Subscription()
    view.attach(gone)
    gone.closed = True
    kept = weakref.ref(gone)
    view.attach(Subscription())
    del gone
    assert kept() is None


async def test_news_of_another_stage_is_not_shown(view: LoadView) -> None:
    subscription = Subscription()
    view.attach(subscription)
    view.advance(pb.STAGE_WEIGHTS, 0.5, 10)
    assert not await unread(subscription)
