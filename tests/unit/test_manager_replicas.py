"""`ModelManager` with a model that has replicas, and workers in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import ModelSetup
from tests.listing import models_of
from tests.unit.manager_fakes import Server, entry, loads, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock_server.manager import Lease
    from tests.unit.manager_fakes import FakeWorker

RELOAD = pb.LOAD_CONFLICT_POLICY_RELOAD


def replicas(count: int) -> model_pb2.RuntimeOptions:
    return model_pb2.RuntimeOptions(replica_count=count)


def configured(server: Server, count: int, **setup: Any) -> None:
    """Have the catalog say that `a` has so many replicas."""
    server.catalog.entries["a"] = replace(
        entry("a"), setup=ModelSetup(options={"replica_count": count, "slot_count": 2}, **setup)
    )


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    """`a` with two replicas of two slots, and `b`; room for three workers."""
    server = Server("a", "b", models_max=3)
    configured(server, 2)
    async with server:
        yield server


async def now(server: Server, model: str = "a") -> model_pb2.Model:
    return await server.manager.snapshot(model)


def pids(model: model_pb2.Model) -> list[int]:
    return [worker.pid for worker in model.workers]


def is_whole(server: Server) -> bool:
    """Whether both replicas of `a` are loaded: what they take is measured then."""
    model = models_of(server.manager)[0]
    return len(model.workers) == 2 and model.memory.phase == model_pb2.MEMORY_PHASE_MEASURED


async def acquire(server: Server, count: int) -> list[Lease]:
    return list(await asyncio.gather(*(server.manager.acquire("a") for _ in range(count))))


def of_worker(leases: list[Lease]) -> list[int]:
    """How many leases each worker has."""
    workers = [lease.worker.pid for lease in leases]
    return sorted(workers.count(pid) for pid in set(workers))


async def test_a_load_starts_every_replica_and_ends_once_with_the_whole_model(server: Server) -> None:
    events = await loads(server.manager, "a")
    assert [event.WhichOneof("event") for event in events].count("loaded") == 1
    stages = [event.progress.stage for event in events if event.progress.HasField("started")]
    assert len(stages) == len(set(stages)), "each stage is shown once"
    model = events[-1].loaded.model
    assert pids(model) == [1000, 1001]
    assert model.worker.pid == 1000
    assert model.runtime_options.replica_count == 2
    assert (await loads(server.manager, "a"))[-1].loaded.already_loaded


async def test_requests_spread_over_the_replicas(server: Server) -> None:
    await loads(server.manager, "a")
    leases = await acquire(server, 8)
    assert of_worker(leases) == [4, 4]
    assert (await now(server)).lease_count == 8
    for lease in leases[:6]:
        lease.release()
    await until(lambda: models_of(server.manager)[0].lease_count == 2)


async def test_a_request_loads_all_replicas(server: Server) -> None:
    leases = await acquire(server, 4)
    await until(lambda: len(models_of(server.manager)[0].workers) == 2)
    assert sum(of_worker(leases)) == 4


async def test_one_that_dies_takes_only_its_own_requests_and_the_next_is_served_at_once(
    server: Server,
) -> None:
    await loads(server.manager, "a")
    first, second = await acquire(server, 2)
    worker: FakeWorker = server.launcher.workers[0]
    server.launcher.slow.add("a")
    worker.die()
    lease = await server.manager.acquire("a")
    assert lease.worker is server.launcher.workers[1]
    assert lease.load_wait_seconds == 0
    model = await now(server)
    assert model.state == model_pb2.MODEL_STATE_LOADED
    assert model.last_failure.reason == Reason.WORKER_CRASHED
    assert {first.worker.pid, second.worker.pid} == {1000, 1001}


async def test_a_request_on_its_way_to_one_that_dies_is_served_by_another(server: Server) -> None:
    await loads(server.manager, "a")
    server.launcher.slow.add("a")
    asking = asyncio.create_task(server.manager.acquire("a"))
    await asyncio.sleep(0)
    server.launcher.workers[0].die()
    lease = await asyncio.wait_for(asking, 5)
    assert lease.worker.pid in {1000, 1001}
    assert (await server.manager.acquire("a")).worker.pid == 1001


async def test_waiting_requests_are_taken_over_by_the_first_that_serves(server: Server) -> None:
    server.launcher.slow.add("a")
    asking = [asyncio.create_task(server.manager.acquire("a")) for _ in range(4)]
    workers = [await server.launcher.worker(0), await server.launcher.worker(1)]
    workers[1].become_ready()
    workers[0].fail(make_error(Reason.MODEL_CORRUPT, "it is broken"))
    leases = await asyncio.gather(*asking)
    assert {lease.worker.pid for lease in leases} == {1001}
    assert (await now(server)).waiting_request_count == 0


async def test_no_request_waits_for_a_replica_that_loads_beside_a_free_slot(server: Server) -> None:
    server.launcher.slow.add("a")
    asking = [asyncio.create_task(server.manager.acquire("a")) for _ in range(3)]
    await server.launcher.worker(0)  # It hangs.
    (await server.launcher.worker(1)).become_ready()
    await until(lambda: sum(task.done() for task in asking) == 2)
    (waiting,) = (task for task in asking if not task.done())
    leases = [task.result() for task in asking if task is not waiting]
    assert of_worker(leases) == [2]
    leases[0].release()
    assert (await asyncio.wait_for(waiting, 5)).worker.pid == 1001


async def test_a_replica_whose_requests_were_taken_over_comes_up_all_the_same(server: Server) -> None:
    await loads(server.manager, "b", runtime_options=replicas(2))
    held = [await server.manager.acquire("b") for _ in range(2)]
    leases = await acquire(server, 4)
    assert of_worker(leases) == [4], "there was room for one"
    for lease in held:
        lease.release()
    await until(lambda: is_whole(server))


async def test_a_load_fails_with_the_first_failure_and_what_came_up_serves(server: Server) -> None:
    server.launcher.slow.add("a")
    loading = asyncio.create_task(loads(server.manager, "a"))
    workers = [await server.launcher.worker(0), await server.launcher.worker(1)]
    workers[0].become_ready()
    workers[1].fail(make_error(Reason.MODEL_CORRUPT, "it is broken"))
    with pytest.raises(PaddockError, match="broken"):
        await loading
    model = await now(server)
    assert (model.state, pids(model)) == (model_pb2.MODEL_STATE_LOADED, [1000])


async def pinned_b(server: Server) -> None:
    """Have `b` leave `a` room for one replica of two."""
    await loads(server.manager, "b")
    await server.manager.pin(pb.PinRequest(model="b"))


async def test_replicas_that_do_not_fit_beside_each_other_are_refused_at_once() -> None:
    server = Server("a", "b", models_max=2)
    configured(server, 2)
    async with server:
        await pinned_b(server)
        with pytest.raises(PaddockError) as caught:
            await loads(server.manager, "a")
        assert caught.value.reason == Reason.INSUFFICIENT_MEMORY
        assert "\0" not in f"{caught.value.message}{caught.value.metadata}"
        model = await now(server)
        assert (model.state, pids(model)) == (model_pb2.MODEL_STATE_LOADED, [1001])


async def test_a_replica_that_found_no_room_is_not_tried_again_for_every_request() -> None:
    server = Server("a", "b", models_max=2)
    configured(server, 2)
    async with server:
        await pinned_b(server)
        with pytest.raises(PaddockError, match="does not fit beside"):
            await loads(server.manager, "a")
        before = server.manager.listing().revision
        await acquire(server, 6)
        await server.manager.pin(pb.PinRequest(model="a", unpin=True))  # By now all has been read.
        assert server.manager.listing().revision == before, "no replica has tried to load"


async def test_an_evicted_replica_comes_back_when_the_others_are_full(server: Server) -> None:
    server.catalog.entries["c"] = entry("c")
    await loads(server.manager, "a")
    await loads(server.manager, "b")
    held = [await server.manager.acquire("b"), await server.manager.acquire("a")]
    await loads(server.manager, "c")
    model = await now(server)
    assert (model.state, pids(model)) == (model_pb2.MODEL_STATE_LOADED, [held[1].worker.pid])
    await server.manager.unload(pb.UnloadRequest(model="c"))
    held.append(await server.manager.acquire("a"))
    assert len((await now(server)).workers) == 1, "a slot was free"
    held.append(await server.manager.acquire("a"))
    await until(lambda: is_whole(server))
    assert (await server.manager.acquire("a")).worker.pid != held[1].worker.pid


async def test_another_number_starts_or_stops_the_difference(server: Server) -> None:
    await loads(server.manager, "a")
    with pytest.raises(PaddockError) as caught:
        await loads(server.manager, "a", runtime_options=replicas(3))
    assert caught.value.metadata["fields"] == "replica_count"
    more = await loads(server.manager, "a", runtime_options=replicas(3), conflict_policy=RELOAD)
    assert pids(more[-1].loaded.model) == [1000, 1001, 1002]
    leases = await acquire(server, 3)
    await loads(server.manager, "a", runtime_options=replicas(1), conflict_policy=RELOAD)
    model = await now(server)
    assert pids(model) == [1000, 1001, 1002], "running requests end first"
    assert (await server.manager.acquire("a")).worker.pid == 1000
    for lease in leases:
        lease.release()
    await until(lambda: pids(models_of(server.manager)[0]) == [1000])
    assert (await now(server)).runtime_options.replica_count == 1
    assert server.launcher.workers[0].stop_reasons == []


async def test_a_reload_starts_or_stops_the_difference(server: Server) -> None:
    await loads(server.manager, "a")
    configured(server, 3)
    await server.manager.reload()
    await until(lambda: pids(models_of(server.manager)[0]) == [1000, 1001, 1002])
    configured(server, 1)
    await server.manager.reload()
    await until(lambda: pids(models_of(server.manager)[0]) == [1000])
    assert server.launcher.workers[0].stop_reasons == []


async def test_unload_and_sleep_mean_all_replicas(server: Server) -> None:
    await loads(server.manager, "a")
    (lease,) = await acquire(server, 1)
    with pytest.raises(PaddockError) as caught:
        await server.manager.sleep(pb.SleepRequest(model="a"))
    assert caught.value.reason == Reason.MODEL_IN_USE
    lease.release()
    await until(lambda: models_of(server.manager)[0].lease_count == 0)
    slept = await server.manager.sleep(pb.SleepRequest(model="a"))
    assert slept.model.state == model_pb2.MODEL_STATE_SLEEPING
    assert [worker.sleep_count for worker in server.launcher.workers] == [1, 1]
    leases = await acquire(server, 2)
    assert sum(of_worker(leases)) == 2
    request = pb.UnloadRequest(model="a", mode=pb.UNLOAD_MODE_FORCE)
    unloaded = await server.manager.unload(request)
    assert unloaded.aborted_request_count == 2
    assert (unloaded.model.state, pids(unloaded.model)) == (model_pb2.MODEL_STATE_UNLOADED, [])


async def test_unload_may_name_the_load_of_any_replica(server: Server) -> None:
    await loads(server.manager, "a")
    second = max(await acquire(server, 2), key=lambda lease: lease.worker.pid)
    with pytest.raises(PaddockError) as caught:
        await server.manager.unload(pb.UnloadRequest(model="a", load_id="other"))
    assert caught.value.reason == Reason.LOAD_ID_MISMATCH
    request = pb.UnloadRequest(model="a", load_id=second.load_id, mode=pb.UNLOAD_MODE_FORCE)
    assert (await server.manager.unload(request)).model.state == model_pb2.MODEL_STATE_UNLOADED


async def test_watchers_see_one_model(server: Server) -> None:
    watch = server.manager.watch(pb.WatchRequest())
    seen: list[pb.WatchResponse] = []

    async def follow() -> None:
        async for response in watch:
            seen.append(response)  # noqa: PERF401  # they are looked at as they come

    following = asyncio.create_task(follow())
    await loads(server.manager, "a")
    await server.manager.unload(pb.UnloadRequest(model="a"))
    await until(lambda: bool(seen) and seen[-1].changed.model.state == model_pb2.MODEL_STATE_UNLOADED)
    following.cancel()
    assert {response.changed.model.id for response in seen} <= {"a", "b", ""}
    states: list[int] = [model_pb2.MODEL_STATE_UNLOADED]
    for response in seen:
        if response.changed.model.id == "a" and response.changed.previous_state:
            assert response.changed.previous_state == states[-1]
            states.append(response.changed.model.state)
    assert model_pb2.MODEL_STATE_LOADED in states


async def test_a_request_that_leaves_costs_no_replica_a_place(server: Server) -> None:
    for _ in range(2):
        await loads(server.manager, "b", runtime_options=replicas(3), conflict_policy=RELOAD)
    leases = [await server.manager.acquire("b") for _ in range(3)]
    asking = asyncio.create_task(server.manager.acquire("a"))
    await until(lambda: models_of(server.manager)[0].state == model_pb2.MODEL_STATE_LOADING)
    asking.cancel()
    await until(lambda: models_of(server.manager)[0].state == model_pb2.MODEL_STATE_UNLOADED)
    for lease in leases:
        lease.release()
    assert len(server.launcher.workers) == 3


async def test_a_model_with_replicas_that_is_gone_is_gone_with_all_of_them(server: Server) -> None:
    await loads(server.manager, "a")
    del server.catalog.entries["a"]
    await server.manager.reload()
    await until(lambda: [model.id for model in models_of(server.manager)] == ["b"])
    assert [worker.stop_reasons for worker in server.launcher.workers] == [["MODEL_UNLOADED"]] * 2


async def test_the_number_of_replicas_outlives_the_server(tmp_path: Any) -> None:
    for _ in range(2):
        async with Server("a", state_file=tmp_path / "loads.json") as server:
            if not (tmp_path / "loads.json").exists():
                await loads(server.manager, "a", runtime_options=replicas(2))
            await until(lambda: len(models_of(server.manager)[0].workers) == 2)


async def test_a_replica_that_a_reload_adds_as_the_server_stops_is_stopped_too() -> None:
    server = Server("a")
    configured(server, 1)
    await server.manager.start()
    await loads(server.manager, "a")
    configured(server, 2)
    await server.manager.reload()
    async with asyncio.timeout(5):
        await server.manager.stop(drain_seconds=0)
    assert all(worker.exited.done() for worker in server.launcher.workers)


async def test_who_pins_a_model_that_goes_in_this_moment_is_answered(server: Server) -> None:
    del server.catalog.entries["a"]
    await server.manager.reload()
    pinning = server.manager.pin(pb.PinRequest(model="a"))
    assert (await pinning).model.id == "a"
