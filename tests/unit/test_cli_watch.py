"""How `paddock watch` goes on after its connection is lost."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from paddock.cli import watch
from paddock.cli.watch import Event, Lost, StartedOver, follow
from paddock.client import Client
from paddock.convert import watch_event
from paddock.errors import PaddockError, Reason, make_error
from paddock.types import ModelChanged, ModelDeleted, Synced
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

Script = list[pb.WatchResponse | PaddockError]
UNREACHABLE = make_error(Reason.SERVER_UNREACHABLE, "Nobody there.")
GONE = make_error(Reason.REVISION_GONE, "Too old.")
TOO_SLOW = make_error(Reason.WATCH_TOO_SLOW, "Too slow.")


class Servers:
    """An API whose watches follow scripts, one a connection. What it was asked for is in `asked`."""

    def __init__(self, *scripts: Script, instances: tuple[str, ...] = ("i",)) -> None:
        self._scripts = list(scripts)
        self._instances = list(instances)
        self.asked: list[tuple[int, str]] = []
        self.silent = False

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        instance = self._instances.pop(0) if len(self._instances) > 1 else self._instances[0]
        return pb.GetServerInfoResponse(instance_id=instance)

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        self.asked.append((request.start_revision, request.instance_id))
        for item in self._scripts.pop(0) if self._scripts else [UNREACHABLE]:
            if isinstance(item, PaddockError):
                raise item
            yield item
        if self.silent:
            await asyncio.Event().wait()


def changed(revision: int, model: str = "a") -> pb.WatchResponse:
    return pb.WatchResponse(revision=revision, changed=pb.ModelChanged(model=model_pb2.Model(id=model)))


def synced(revision: int) -> pb.WatchResponse:
    return pb.WatchResponse(revision=revision, synced=pb.Synced())


def deleted(revision: int) -> pb.WatchResponse:
    return pb.WatchResponse(revision=revision, deleted=pb.ModelDeleted(model="a"))


@pytest.fixture(autouse=True)
def without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_DELAY_SECONDS", 0)


async def seen(servers: Servers, reconnect_seconds: float = 60) -> tuple[list[Event], PaddockError]:
    """Follow until it gives up; its clock goes on by ten seconds with every look."""
    api: Any = servers
    times = iter(range(0, 10_000, 10))
    events: list[Event] = []
    stream = follow(Client(api), reconnect_seconds=reconnect_seconds, clock=lambda: next(times))
    try:
        async with asyncio.timeout(10), aclosing(stream) as following:
            async for event in following:
                events.append(event)  # noqa: PERF401  # what came before the error counts
    except PaddockError as error:
        return events, error
    raise AssertionError(events)


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


async def test_a_lost_connection_is_made_anew_and_goes_on_after_the_last_revision() -> None:
    servers = Servers(
        [changed(4), synced(4), changed(5), UNREACHABLE], [UNREACHABLE], [deleted(6), synced(6)]
    )
    events, failure = await seen(servers)

    assert servers.asked[:4] == [(0, "i"), (6, "i"), (6, "i"), (7, "i")]
    assert kinds(events) == [ModelChanged, Synced, ModelChanged, Lost, ModelDeleted, Synced, Lost]
    assert failure.reason == Reason.SERVER_UNREACHABLE


async def test_a_server_that_restarted_is_watched_from_the_start_and_it_says_so() -> None:
    servers = Servers(
        [changed(4), synced(4), UNREACHABLE], [GONE], [changed(1), synced(1)], instances=("i", "j")
    )
    events, _ = await seen(servers)

    assert servers.asked[:3] == [(0, "i"), (5, "i"), (0, "j")]
    assert kinds(events) == [ModelChanged, Synced, Lost, StartedOver, ModelChanged, Synced, Lost]
    assert events[3] == StartedOver(Reason.REVISION_GONE, "Too old.")


async def test_an_initial_state_that_was_cut_is_started_over() -> None:
    servers = Servers([changed(4, "a"), UNREACHABLE], [changed(4, "a"), changed(4, "b"), synced(4)])
    events, _ = await seen(servers)

    assert [start for start, _ in servers.asked[:3]] == [0, 0, 5]
    assert kinds(events)[:4] == [ModelChanged, StartedOver, ModelChanged, ModelChanged]


async def test_a_watch_that_was_too_slow_goes_on_where_it_was() -> None:
    servers = Servers([synced(4), changed(5), TOO_SLOW], [changed(6)])
    events, _ = await seen(servers)

    assert [start for start, _ in servers.asked[:2]] == [0, 6]
    assert StartedOver not in kinds(events)


async def test_a_server_without_any_change_yet_is_resumed_too() -> None:
    servers = Servers([synced(0), UNREACHABLE], [changed(1)])
    await seen(servers)

    assert [start for start, _ in servers.asked[:3]] == [0, 1, 2]


async def test_a_first_connection_that_fails_is_not_tried_again() -> None:
    servers = Servers([UNREACHABLE], [synced(1)])
    events, failure = await seen(servers)

    assert (events, failure.reason, len(servers.asked)) == ([], Reason.SERVER_UNREACHABLE, 1)


async def test_trying_again_ends_after_its_time() -> None:
    events, failure = await seen(Servers([synced(1), UNREACHABLE]), reconnect_seconds=35)
    at_once, _ = await seen(Servers([synced(1), UNREACHABLE]), reconnect_seconds=0)

    assert kinds(events) == [Synced, Lost]
    assert kinds(at_once) == [Synced]
    assert failure.reason == Reason.SERVER_UNREACHABLE


async def test_what_a_new_connection_does_not_help_against_is_raised() -> None:
    denied = make_error(Reason.KEY_INVALID, "No.")
    events, failure = await seen(Servers([synced(1), denied], [synced(2)]))

    assert (kinds(events), failure.reason) == ([Synced], Reason.KEY_INVALID)


async def test_silence_of_a_server_counts_as_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 0.01)
    servers = Servers([synced(1)])
    servers.silent = True
    events, failure = await seen(servers, reconnect_seconds=0)

    assert kinds(events) == [Synced]
    assert "said nothing" in failure.message


async def test_a_restart_of_the_server_is_told_from_a_history_that_is_too_short() -> None:
    other = make_error(Reason.REVISION_GONE, "Another.", metadata={"instance_id": "j"})
    servers = Servers(
        [synced(4), UNREACHABLE], [other], [synced(1), UNREACHABLE], [GONE], instances=("i", "j")
    )
    events, _ = await seen(servers)

    restarts = [event.restarted for event in events if isinstance(event, StartedOver)]
    assert restarts == [True, False]


def crashed(revision: int, state: model_pb2.ModelState.ValueType, *, at: int) -> ModelChanged:
    """The model has changed to a state, having failed at some time."""
    failure = model_pb2.Failure(reason="WORKER_CRASHED", message="It was ended by SIGKILL.", signal="SIGKILL")
    failure.failure_time.FromSeconds(at)
    change = pb.ModelChanged(
        model=model_pb2.Model(id="a", state=state, last_failure=failure),
        previous_state=model_pb2.MODEL_STATE_LOADED,
    )
    event = watch_event(pb.WatchResponse(revision=revision, changed=change))
    assert isinstance(event, ModelChanged)
    return event


def test_a_person_is_told_why_a_model_changed_and_of_each_failure_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = watch.Lines()
    loading, loaded = model_pb2.MODEL_STATE_LOADING, model_pb2.MODEL_STATE_LOADED
    for number, (state, at) in enumerate([(loading, 1), (loaded, 1), (loaded, 2)], 1):
        lines.show(crashed(number, state, at=at))
    lines.show(StartedOver(Reason.REVISION_GONE, "start_revision 0", restarted=True))
    shown, notes = capsys.readouterr()

    assert [line.split("  a  ")[1] for line in shown.splitlines()] == [
        "loaded -> loading: It was ended by SIGKILL.",
        "loaded (changed)",
        "loaded: It was ended by SIGKILL.",
    ]
    assert notes.strip() == "The server has restarted; starting over."
