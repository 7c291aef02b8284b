"""Watch: numbered changes, coming back to them, and callers who are too slow."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from paddock.errors import InvalidFieldError, PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.manager import events
from paddock_server.manager.events import BACKLOG_LENGTH, HISTORY_LENGTH, ChangeLog
from tests.unit.manager_fakes import Server, loads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock_server.manager import ModelManager

UNLOADED = model_pb2.MODEL_STATE_UNLOADED
LOADING = model_pb2.MODEL_STATE_LOADING
LOADED = model_pb2.MODEL_STATE_LOADED
UNLOADING = model_pb2.MODEL_STATE_UNLOADING


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    async with Server("a", "b") as running:
        yield running


async def take(stream: AsyncGenerator[pb.WatchResponse], count: int) -> list[pb.WatchResponse]:
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


async def until_synced(manager: ModelManager, **request: object) -> list[pb.WatchResponse]:
    responses: list[pb.WatchResponse] = []
    async with aclosing(manager.watch(pb.WatchRequest(**request))) as stream:  # pyright: ignore[reportArgumentType]
        async for response in stream:
            responses.append(response)
            if response.HasField("synced"):
                break
    return responses


async def test_first_comes_every_model_then_synced_then_changes(server: Server) -> None:
    async with aclosing(server.manager.watch(pb.WatchRequest())) as stream:
        initial = await take(stream, 3)
        assert [response.changed.model.id for response in initial[:2]] == ["a", "b"]
        assert all(response.changed.previous_state == 0 for response in initial[:2])
        assert initial[2].HasField("synced")
        await loads(server.manager, "a")
        await server.manager.unload(pb.UnloadRequest(model="a"))
        changes = await take(stream, 4)
    assert [(change.changed.previous_state, change.changed.model.state) for change in changes] == [
        (UNLOADED, LOADING),
        (LOADING, LOADED),
        (LOADED, UNLOADING),
        (UNLOADING, UNLOADED),
    ]
    first = initial[2].revision
    assert [change.revision for change in changes] == [first + 1, first + 2, first + 3, first + 4]


async def test_a_caller_misses_nothing_between_list_and_watch(server: Server) -> None:
    revision = server.manager.listing().revision
    await loads(server.manager, "a")
    responses = await until_synced(server.manager, start_revision=revision + 1)
    assert [response.changed.model.state for response in responses[:-1]] == [LOADING, LOADED]


async def test_a_watch_of_one_model_sees_no_other(server: Server) -> None:
    await loads(server.manager, "a")
    await loads(server.manager, "b")
    for start in (0, 1):
        responses = await until_synced(server.manager, models=["b"], start_revision=start)
        assert {response.changed.model.id for response in responses[:-1]} == {"b"}


async def test_a_revision_of_another_server_is_refused(server: Server) -> None:
    with pytest.raises(PaddockError) as caught:
        await until_synced(server.manager, start_revision=1, instance_id="another")
    assert caught.value.reason == Reason.REVISION_GONE
    await until_synced(server.manager, start_revision=1, instance_id=server.manager.instance_id)


async def test_a_revision_that_is_yet_to_come_is_refused(server: Server) -> None:
    revision = server.manager.listing().revision
    await until_synced(server.manager, start_revision=revision + 1)
    with pytest.raises(PaddockError) as caught:
        await until_synced(server.manager, start_revision=revision + 2)
    assert caught.value.reason == Reason.REVISION_GONE


async def test_a_negative_revision_names_its_field(server: Server) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        await until_synced(server.manager, start_revision=-1)
    assert caught.value.violations[0].field == "start_revision"


async def test_a_revision_the_history_does_not_reach_is_refused() -> None:
    log = ChangeLog("me", list)
    for _ in range(HISTORY_LENGTH + 5):
        log.deleted("a")
    stream = log.watch(pb.WatchRequest(start_revision=5))
    with pytest.raises(PaddockError) as caught:
        await anext(stream)
    assert caught.value.reason == Reason.REVISION_GONE
    async with aclosing(log.watch(pb.WatchRequest(start_revision=6))) as reachable:
        assert (await anext(reachable)).revision == 6


async def test_a_caller_who_falls_too_far_behind_is_told_to_start_over() -> None:
    log = ChangeLog("me", list)
    stream = log.watch(pb.WatchRequest())
    await anext(stream)
    for _ in range(BACKLOG_LENGTH + 1):
        log.deleted("a")
    with pytest.raises(PaddockError) as caught:
        await anext(stream)
    assert caught.value.reason == Reason.WATCH_TOO_SLOW


async def test_synced_comes_again_when_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SYNCED_SECONDS", 0.01)
    log = ChangeLog("me", list)
    async with aclosing(log.watch(pb.WatchRequest())) as stream:
        assert all(response.HasField("synced") for response in await take(stream, 3))


async def test_synced_is_true_while_changes_are_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SYNCED_SECONDS", 0.0)
    log = ChangeLog("me", list)
    async with aclosing(log.watch(pb.WatchRequest())) as stream:
        await take(stream, 1)
        log.deleted("a")
        log.deleted("b")
        (synced,) = await take(stream, 1)
    assert synced.HasField("synced")
    assert synced.revision == 0, "nothing up to 1 has been sent yet"


async def test_a_closed_watch_is_forgotten() -> None:
    log = ChangeLog("me", list)
    stream = log.watch(pb.WatchRequest())
    await anext(stream)
    assert log.watcher_count == 1
    await stream.aclose()
    assert log.watcher_count == 0


async def test_use_of_a_model_is_no_change(server: Server) -> None:
    await loads(server.manager, "a")
    before = server.manager.listing().revision
    async with await server.manager.acquire("a"):
        pass
    assert server.manager.listing().revision == before
