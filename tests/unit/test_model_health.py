"""The health service: what its statuses come from, and that nobody can hold it up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2

from paddock.errors import Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.rpc import health
from paddock_server.rpc.health import (
    MODEL_STATUSES,
    NOT_SERVING,
    SERVICE_UNKNOWN,
    SERVING,
    HealthServicer,
    follow_models,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import pytest


class Reader:
    """The context of a watch: keeps what it is sent, once it may."""

    def __init__(self, *, may_read: bool = True) -> None:
        self.statuses: list[int] = []
        self.asked = asyncio.Event()
        self.may_read = asyncio.Event()
        if may_read:
            self.may_read.set()

    async def write(self, response: Any) -> None:
        self.asked.set()
        await self.may_read.wait()
        self.statuses.append(response.status)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def watching(servicer: HealthServicer, reader: Reader, service: str = "a") -> asyncio.Task[None]:
    return asyncio.create_task(servicer.Watch(health_pb2.HealthCheckRequest(service=service), reader))


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def test_every_state_of_a_model_has_a_status() -> None:
    states = set(model_pb2.ModelState.values()) - {model_pb2.MODEL_STATE_UNSPECIFIED}
    assert set(MODEL_STATUSES) == states
    serving = {state for state, status in MODEL_STATUSES.items() if status == SERVING}
    assert serving == {model_pb2.MODEL_STATE_LOADED, model_pb2.MODEL_STATE_SLEEPING}


async def test_a_watcher_is_told_of_transitions_only() -> None:
    servicer, reader = HealthServicer(), Reader()
    task = watching(servicer, reader)
    await settle()
    for status in (NOT_SERVING, NOT_SERVING, SERVING, SERVING):
        servicer.set("a", status)
        await settle()
    servicer.forget("a")
    await settle()
    await end(task)

    assert reader.statuses == [SERVICE_UNKNOWN, NOT_SERVING, SERVING, SERVICE_UNKNOWN]


async def test_a_watcher_who_does_not_read_holds_nobody_up_and_gets_the_latest_status() -> None:
    servicer, slow, quick = HealthServicer(), Reader(may_read=False), Reader()
    tasks = [watching(servicer, slow), watching(servicer, quick)]
    await slow.asked.wait()
    for status in (NOT_SERVING, SERVING, NOT_SERVING):
        servicer.set("a", status)
        await settle()
    slow.may_read.set()
    await settle()
    for task in tasks:
        await end(task)

    assert quick.statuses == [SERVICE_UNKNOWN, NOT_SERVING, SERVING, NOT_SERVING]
    assert slow.statuses == [SERVICE_UNKNOWN, NOT_SERVING]


async def test_a_watch_that_ended_is_forgotten() -> None:
    servicer = HealthServicer()
    task = watching(servicer, Reader())
    await settle()
    assert servicer.watched_count == 1
    await end(task)
    assert servicer.watched_count == 0


async def test_after_the_stop_no_service_serves_again() -> None:
    servicer, reader = HealthServicer(), Reader()
    servicer.set("a", SERVING)
    task = watching(servicer, reader)
    await settle()
    servicer.stop()
    servicer.set("a", SERVING)
    await settle()
    await end(task)

    assert reader.statuses == [SERVING, NOT_SERVING]


class Watches:
    """An API whose watches are scripted: each is a list of responses, and ends with WATCH_TOO_SLOW but for
    the last, which goes on."""

    def __init__(self, *scripts: list[pb.WatchResponse]) -> None:
        self._scripts = list(scripts)
        self.drained = asyncio.Event()

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        assert request.start_revision == 0
        for response in self._scripts.pop(0):
            yield response
        if self._scripts:
            raise make_error(Reason.WATCH_TOO_SLOW, "Too slow.")
        self.drained.set()
        await asyncio.Event().wait()


def changed(model: str, state: model_pb2.ModelState.ValueType) -> pb.WatchResponse:
    return pb.WatchResponse(changed=pb.ModelChanged(model=model_pb2.Model(id=model, state=state)))


def deleted(model: str) -> pb.WatchResponse:
    return pb.WatchResponse(deleted=pb.ModelDeleted(model=model))


SYNCED = pb.WatchResponse(synced=pb.Synced())
LOADED = model_pb2.MODEL_STATE_LOADED
UNLOADED = model_pb2.MODEL_STATE_UNLOADED


async def followed(*scripts: list[pb.WatchResponse]) -> dict[str, int]:
    servicer = HealthServicer()
    servicer.set("", SERVING)
    api: Any = Watches(*scripts)
    task = asyncio.create_task(follow_models(api, servicer))
    async with asyncio.timeout(10):
        await api.drained.wait()
    await end(task)
    return servicer._statuses


async def test_models_are_services_by_their_state() -> None:
    statuses = await followed(
        [changed("a", LOADED), changed("b", UNLOADED), SYNCED, changed("b", LOADED), deleted("a"), SYNCED]
    )
    assert statuses == {"": SERVING, "model/b": SERVING}


async def test_a_follower_that_starts_over_forgets_what_went_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "START_OVER_SECONDS", 0)
    statuses = await followed(
        [changed("a", LOADED), changed("b", LOADED), SYNCED],
        [changed("b", UNLOADED), changed("c", LOADED), SYNCED],
    )
    assert statuses == {"": SERVING, "model/b": NOT_SERVING, "model/c": SERVING}


async def test_a_state_of_a_newer_kind_is_not_serving() -> None:
    unknown: Any = 99
    assert (await followed([changed("a", unknown), SYNCED]))["model/a"] == NOT_SERVING


async def test_ten_thousand_models_are_taken_in_and_others_get_their_turn() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    statuses = await followed([*(changed(f"m{number}", UNLOADED) for number in range(10_000)), SYNCED])
    await end(counter)
    assert len(statuses) == 10_001
    assert turns > 10
