"""`ModelManager` with workers in memory: loads as views, leases, crashes, unloading, the end."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration

from paddock.errors import ModelNotFoundError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.manager import ManagerConfig, ModelManager
from paddock_server.manager import actor as actor_module
from paddock_server.worker.v1 import worker_pb2
from tests.listing import models_of
from tests.unit.manager_fakes import FakeCatalog, FakeLauncher, Server, loads, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock_server.manager import Lease

WEIGHTS = worker_pb2.LOAD_STAGE_WEIGHTS
WARMUP = worker_pb2.LOAD_STAGE_WARMUP


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    async with Server("a", "b", models_max=1) as running:
        yield running


def stages(events: list[pb.LoadResponse]) -> list[str]:
    """`stage kind` of each event."""
    return [
        f"{pb.Stage.Name(event.progress.stage).removeprefix('STAGE_')} {event.progress.WhichOneof('detail')}"
        if event.HasField("progress")
        else "loaded"
        for event in events
    ]


async def slow_load(server: Server, count: int = 1) -> list[asyncio.Task[list[pb.LoadResponse]]]:
    """Begin loads of `a` that wait for the test, and let them get as far as the worker."""
    server.launcher.slow.add("a")
    tasks = [asyncio.create_task(loads(server.manager, "a")) for _ in range(count)]
    await server.launcher.worker()
    return tasks


async def state(server: Server, model: str = "a") -> model_pb2.ModelState.ValueType:
    return (await server.manager.snapshot(model)).state


def state_now(server: Server) -> model_pb2.ModelState.ValueType:
    """The state of `a`, the first model."""
    return models_of(server.manager)[0].state


@pytest.mark.parametrize(("reported", "stage"), [(WEIGHTS, "weights"), (WARMUP, "warmup")])
async def test_a_load_that_takes_too_long_says_the_stage_it_was_at(
    server: Server, reported: worker_pb2.LoadStage.ValueType, stage: str
) -> None:
    server.launcher.slow.add("a")
    task = asyncio.create_task(loads(server.manager, "a", load_timeout=Duration(nanos=500_000_000)))
    (await server.launcher.worker()).advance(reported, 0.0)
    with pytest.raises(PaddockError) as caught:
        await task
    assert (caught.value.reason, caught.value.metadata["stage"]) == (Reason.LOAD_STALLED, stage)
    assert f"stage {stage!r}" in caught.value.message


async def test_a_load_shows_its_stages_in_order_and_ends_with_the_model(server: Server) -> None:
    (task,) = await slow_load(server)
    worker = await server.launcher.worker()
    worker.advance(WEIGHTS, 0.5)
    worker.advance(WARMUP, 0.0)
    worker.become_ready()
    events = await task
    assert stages(events) == [
        "RESOLVE started",
        "RESOLVE finished",
        "ADMIT started",
        "ADMIT finished",
        "SPAWN started",
        "SPAWN finished",
        "WEIGHTS started",
        "WEIGHTS advanced",
        "WEIGHTS finished",
        "WARMUP started",
        "WARMUP advanced",
        "WARMUP finished",
        "loaded",
    ]
    advanced = events[7].progress.advanced
    assert (advanced.fraction, advanced.completed_bytes, advanced.total_bytes) == (0.5, 500, 1000)
    loaded = events[-1].loaded
    assert not loaded.already_loaded
    model = loaded.model
    assert (model.state, model.worker.pid, model.size_bytes) == (model_pb2.MODEL_STATE_LOADED, 1000, 1000)
    assert model.load_id
    assert model.HasField("load_time")
    assert model.info.architecture == "llama"


async def test_a_second_load_is_answered_at_once(server: Server) -> None:
    first = await loads(server.manager, "a")
    second = await loads(server.manager, "a")
    assert stages(second) == ["loaded"]
    assert second[0].loaded.already_loaded
    assert second[0].loaded.model.load_id == first[-1].loaded.model.load_id


async def test_ten_callers_share_one_worker_and_see_one_end(server: Server) -> None:
    tasks = await slow_load(server, 10)
    (await server.launcher.worker()).become_ready()
    ends = [(await task)[-1] for task in tasks]
    assert len(server.launcher.workers) == 1
    assert all(end == ends[0] for end in ends)
    assert ends[0].HasField("loaded")


async def test_one_caller_who_goes_does_not_disturb_the_others(server: Server) -> None:
    tasks = await slow_load(server, 10)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    (await server.launcher.worker()).become_ready()
    for task in tasks[1:]:
        assert stages(await task)[-1] == "loaded"


async def test_a_load_goes_on_when_everyone_has_gone(server: Server) -> None:
    (task,) = await slow_load(server)
    task.cancel()
    await asyncio.wait([task])
    (await server.launcher.worker()).become_ready()
    await until(lambda: state_now(server) == model_pb2.MODEL_STATE_LOADED)


async def test_a_late_caller_is_shown_the_stage_the_load_is_at(server: Server) -> None:
    await slow_load(server)
    worker = await server.launcher.worker()
    worker.advance(WEIGHTS, 0.5)
    async with aclosing(server.manager.subscribe_load(pb.LoadRequest(model="a"))) as stream:
        seen = [await anext(stream), await anext(stream)]
    assert stages(seen) == ["WEIGHTS started", "WEIGHTS advanced"]
    assert seen[1].progress.advanced.fraction == 0.5


async def test_unload_aborts_a_load_for_all_who_watch_and_wait(server: Server) -> None:
    tasks = await slow_load(server, 3)
    request = asyncio.create_task(server.manager.acquire("a"))
    await asyncio.sleep(0)
    response = await server.manager.unload(pb.UnloadRequest(model="a"))
    for task in [*tasks, request]:
        with pytest.raises(PaddockError) as caught:
            await task
        assert caught.value.reason == Reason.LOAD_ABORTED
    assert (response.model.state, response.aborted_request_count) == (model_pb2.MODEL_STATE_UNLOADED, 1)
    assert not response.model.HasField("worker")
    assert server.launcher.workers[0].exited.done()


async def test_every_caller_gets_an_exception_of_its_own(server: Server) -> None:
    tasks = await slow_load(server, 2)
    await server.manager.unload(pb.UnloadRequest(model="a"))
    await asyncio.wait(tasks)
    assert tasks[0].exception() is not tasks[1].exception()


async def test_a_failed_load_tells_its_reason_and_leaves_it_in_the_model(server: Server) -> None:
    (task,) = await slow_load(server)
    worker = await server.launcher.worker()
    worker.say("llama_model_load: error", "tensor 'x' is cut off")
    worker.fail(make_error(Reason.MODEL_CORRUPT, "tensor 'x' is cut off", metadata={"what": "cut off"}))
    with pytest.raises(PaddockError) as caught:
        await task
    assert (caught.value.reason, caught.value.metadata["what"]) == (Reason.MODEL_CORRUPT, "cut off")
    model = await server.manager.snapshot("a")
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert model.last_failure.reason == Reason.MODEL_CORRUPT
    assert list(model.last_failure.log_tail) == ["llama_model_load: error", "tensor 'x' is cut off"]
    assert model.last_failure.HasField("failure_time")
    assert not model.HasField("worker")


async def test_a_bad_file_does_not_keep_another_model_from_serving(server: Server) -> None:
    (task,) = await slow_load(server)
    (await server.launcher.worker()).fail(make_error(Reason.UNSUPPORTED_MODEL, "no such architecture"))
    await asyncio.wait([task])
    async with await server.manager.acquire("b") as lease:
        assert lease.model_id == "b"
    assert task.exception() is not None


async def collect(server: Server, events: list[pb.LoadResponse]) -> None:
    async for event in server.manager.subscribe_load(pb.LoadRequest(model="a")):
        events.append(event)  # noqa: PERF401  # an error may end the stream


async def test_a_worker_that_cannot_be_started_is_tried_again_with_a_warning() -> None:
    async with Server("a") as server:
        server.launcher.fault = make_error(Reason.WORKER_CRASHED, "no such file")
        events: list[pb.LoadResponse] = []
        with pytest.raises(PaddockError) as caught:
            await collect(server, events)
        assert caught.value.reason == Reason.CRASH_LOOP
        assert caught.value.metadata["crash_count"] == "2"
        assert stages(events).count("SPAWN warning") == 1
        assert stages(events).count("SPAWN started") == 2


async def test_a_bug_in_a_start_is_one_models_failure_and_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    server.launcher.fault = ValueError("a bug")
    with pytest.raises(PaddockError) as caught:
        await loads(server.manager, "a")
    assert caught.value.reason == Reason.INTERNAL
    assert "a bug" not in str(caught.value)
    assert "load_bug" in caplog.text + "".join(capsys.readouterr())
    server.launcher.fault = None
    assert stages(await loads(server.manager, "b"))[-1] == "loaded"


async def test_a_bug_in_an_actor_leaves_nobody_waiting(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (load,) = await slow_load(server)
    waiting = asyncio.create_task(server.manager.acquire("a"))
    await asyncio.sleep(0)

    def broken(*_: Any) -> Any:
        message = "a bug"
        raise ValueError(message)

    with monkeypatch.context() as patch:
        patch.setattr(actor_module, "step", broken)
        with pytest.raises(PaddockError) as caught:
            await server.manager.unload(pb.UnloadRequest(model="a"))
    assert caught.value.reason == Reason.INTERNAL
    for task in (load, waiting):
        with pytest.raises(PaddockError):
            await task
    with pytest.raises(PaddockError):
        await server.manager.acquire("a")
    async with await server.manager.acquire("b"):
        pass
    assert await state(server) == model_pb2.MODEL_STATE_FAILED


# Leases


async def test_a_lease_of_a_loaded_model_has_not_waited(server: Server) -> None:
    await loads(server.manager, "a")
    lease = await server.manager.acquire("a")
    assert lease.load_wait_seconds == 0
    assert lease.load_id == (await server.manager.snapshot("a")).load_id
    lease.release()
    lease.release()
    async with await server.manager.acquire("b"):
        pass


async def test_a_lease_that_needed_a_load_tells_how_long(server: Server) -> None:
    async with await server.manager.acquire("a") as lease:
        assert lease.load_wait_seconds > 0


async def test_requests_that_wait_are_all_served_by_one_load(server: Server) -> None:
    server.launcher.slow.add("a")
    waiting = [asyncio.create_task(server.manager.acquire("a")) for _ in range(5)]
    (await server.launcher.worker()).become_ready()
    leases = await asyncio.gather(*waiting)
    assert len(server.launcher.workers) == 1
    assert len({lease.load_id for lease in leases}) == 1


async def test_a_cancelled_request_leaves_the_queue(server: Server) -> None:
    lease = await server.manager.acquire("a")
    waiting = asyncio.create_task(server.manager.acquire("b"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    lease.release()
    await asyncio.sleep(0.01)
    assert await state(server, "a") == model_pb2.MODEL_STATE_LOADED
    assert await state(server, "b") == model_pb2.MODEL_STATE_UNLOADED


async def test_a_request_cancelled_as_it_is_granted_gives_its_lease_back(server: Server) -> None:
    await loads(server.manager, "a")
    for turns in range(6):
        request = asyncio.create_task(server.manager.acquire("a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        done, _ = await asyncio.wait([request])
        for task in done:
            if not task.cancelled():
                task.result().release()
    async with asyncio.timeout(10), await server.manager.acquire("b"):
        pass


async def test_an_exception_in_a_request_gives_its_lease_back(server: Server) -> None:
    async def fails() -> None:
        async with await server.manager.acquire("a"):
            message = "the caller went away"
            raise ConnectionError(message)

    with pytest.raises(ConnectionError):
        await fails()
    async with asyncio.timeout(10), await server.manager.acquire("b"):
        pass


@pytest.mark.parametrize(
    ("autoload", "policy", "loaded"),
    [
        (True, pb.AUTOLOAD_POLICY_UNSPECIFIED, True),
        (True, pb.AUTOLOAD_POLICY_FAIL, False),
        (False, pb.AUTOLOAD_POLICY_UNSPECIFIED, False),
        (False, pb.AUTOLOAD_POLICY_LOAD, True),
    ],
)
async def test_each_autoload_policy(
    autoload: bool, policy: pb.AutoloadPolicy.ValueType, loaded: bool
) -> None:
    async with Server("a", autoload=autoload) as server:
        if loaded:
            async with await server.manager.acquire("a", policy):
                pass
        else:
            with pytest.raises(PaddockError) as caught:
                await server.manager.acquire("a", policy)
            assert caught.value.reason == Reason.MODEL_NOT_LOADED


async def test_one_request_too_many_is_told_when_to_come_again() -> None:
    async with Server("a", queue_limit=2) as server:
        server.launcher.slow.add("a")
        waiting = [asyncio.create_task(server.manager.acquire("a")) for _ in range(2)]
        await server.launcher.worker()
        with pytest.raises(PaddockError) as caught:
            await server.manager.acquire("a")
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.QUEUE_FULL, 1.0)
        server.launcher.workers[0].become_ready()
        await asyncio.gather(*waiting)


async def test_so_many_requests_wait_over_all_models_and_one_for_a_loaded_model_is_none_of_them() -> None:
    async with Server("a", "b", "c", waiting_requests_max=2) as server:
        await loads(server.manager, "c")
        server.launcher.slow |= {"a", "b"}
        waiting = [asyncio.create_task(server.manager.acquire(model)) for model in ("a", "b")]
        await until(lambda: len(server.launcher.workers) == 3)
        with pytest.raises(PaddockError) as caught:
            await server.manager.acquire("a")
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.QUEUE_FULL, 1.0)
        async with await server.manager.acquire("c"):
            pass
        for worker in server.launcher.workers[1:]:
            worker.become_ready()
        await asyncio.gather(*waiting)


async def test_the_least_recently_used_model_makes_room() -> None:
    async with Server("a", "b", "c", models_max=2) as server:
        for model in ("a", "b", "a", "c"):
            async with await server.manager.acquire(model):
                pass
        states = {model.id: model.state for model in models_of(server.manager)}
    assert states == {
        "a": model_pb2.MODEL_STATE_LOADED,
        "b": model_pb2.MODEL_STATE_UNLOADED,
        "c": model_pb2.MODEL_STATE_LOADED,
    }


async def test_traffic_cannot_keep_another_model_out_for_ever() -> None:
    async with Server("a", "b", models_max=1, patience_seconds=0.05) as server:
        lease = await server.manager.acquire("a")
        waiting = asyncio.create_task(server.manager.acquire("b"))
        await until_not(server, model_pb2.MODEL_STATE_LOADED)
        kept_off = asyncio.create_task(server.manager.acquire("a"))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not server.launcher.workers[0].stop_reasons, "a running request is not aborted for it"
        lease.release()
        (await waiting).release()
        (await kept_off).release()


async def until_not(server: Server, unwanted: model_pb2.ModelState.ValueType) -> None:
    """Wait for `a` to leave a state."""
    await until(lambda: state_now(server) != unwanted)


# Crashes


async def test_a_crash_is_seen_at_once_and_the_next_request_is_served_by_a_new_worker(server: Server) -> None:
    async with await server.manager.acquire("a") as lease:
        first = server.launcher.workers[0]
        first.say("ggml_abort: assertion failed")
        first.die("SIGABRT")
        async with await server.manager.acquire("a") as other:
            assert other.worker is server.launcher.workers[1]
            assert other.load_id != lease.load_id
        model = await server.manager.snapshot("a")
    assert (model.last_failure.reason, model.last_failure.signal) == (Reason.WORKER_CRASHED, "SIGABRT")
    assert list(model.last_failure.log_tail) == ["ggml_abort: assertion failed"]
    assert not model.last_failure.HasField("exit_code")
    assert model.worker.restart_count == 1


async def test_a_request_is_never_sent_to_a_worker_known_to_be_dead(server: Server) -> None:
    await loads(server.manager, "a")
    request = asyncio.create_task(server.manager.acquire("a"))
    await asyncio.sleep(0)  # its message is in the inbox, and the death comes before it is read
    server.launcher.workers[0].die()
    async with await request as lease:
        assert lease.worker is server.launcher.workers[1]


async def test_a_worker_that_keeps_dying_ends_as_failed_with_its_signal() -> None:
    async with Server("a", restart=type(ManagerConfig().restart)(max_crash_count=2)) as server:
        await loads(server.manager, "a")
        server.launcher.workers[0].die("SIGSEGV")
        worker = await server.launcher.worker(1)
        await until(lambda: state_now(server) == model_pb2.MODEL_STATE_LOADED)
        worker.die("SIGSEGV")
        await until(lambda: state_now(server) == model_pb2.MODEL_STATE_FAILED)
        model = await server.manager.snapshot("a")
        assert (model.last_failure.reason, model.last_failure.signal) == (Reason.CRASH_LOOP, "SIGSEGV")
        with pytest.raises(PaddockError) as caught:
            await server.manager.acquire("a")
        assert caught.value.reason == Reason.CRASH_LOOP
        assert caught.value.retry_after_seconds is not None
        assert 0 < caught.value.retry_after_seconds <= 60


async def test_callers_of_load_join_a_restart(server: Server) -> None:
    await loads(server.manager, "a")
    server.launcher.slow.add("a")
    server.launcher.workers[0].die()
    joined = asyncio.create_task(loads(server.manager, "a"))
    worker = await server.launcher.worker(1)
    await until(lambda: state_now(server) == model_pb2.MODEL_STATE_LOADING)
    await asyncio.sleep(0)
    worker.become_ready()
    assert stages(await joined)[-1] == "loaded"


# Unload, idle time, the end


async def test_unload_waits_for_the_worker_to_be_gone(server: Server) -> None:
    await loads(server.manager, "a")
    worker = server.launcher.workers[0]
    worker.reaping.clear()
    unload = asyncio.create_task(server.manager.unload(pb.UnloadRequest(model="a")))
    await until(lambda: bool(worker.stop_reasons))
    assert await state(server) == model_pb2.MODEL_STATE_UNLOADING
    assert not unload.done()
    worker.reaping.set()
    assert (await unload).model.state == model_pb2.MODEL_STATE_UNLOADED
    assert worker.stop_reasons == [Reason.MODEL_UNLOADED]


async def test_a_forced_unload_tells_how_many_requests_it_aborted(server: Server) -> None:
    await server.manager.acquire("a")
    await server.manager.acquire("a")
    response = await server.manager.unload(pb.UnloadRequest(model="a", mode=pb.UNLOAD_MODE_FORCE))
    assert response.aborted_request_count == 2


async def test_a_drain_ends_at_its_deadline(server: Server) -> None:
    await server.manager.acquire("a")
    request = pb.UnloadRequest(model="a")
    request.drain_timeout.FromMilliseconds(10)
    assert (await server.manager.unload(request)).aborted_request_count == 1


async def test_unload_of_another_load_is_refused(server: Server) -> None:
    await loads(server.manager, "a")
    with pytest.raises(PaddockError) as caught:
        await server.manager.unload(pb.UnloadRequest(model="a", load_id="stale"))
    assert caught.value.reason == Reason.LOAD_ID_MISMATCH


async def test_an_idle_model_is_unloaded_when_its_time_has_come() -> None:
    async with Server("a", idle_timeout_seconds=0.02) as server:
        async with await server.manager.acquire("a"):
            assert (await server.manager.snapshot("a")).HasField("expire_time")
            await asyncio.sleep(0.05)
            assert await state(server) == model_pb2.MODEL_STATE_LOADED
        await until_not(server, model_pb2.MODEL_STATE_LOADED)


async def test_without_idle_unloading_nothing_expires(server: Server) -> None:
    async with await server.manager.acquire("a"):
        model = await server.manager.snapshot("a")
    assert not model.HasField("expire_time")
    assert model.HasField("last_use_time")


async def test_an_idle_time_out_that_is_set_counts_from_the_command() -> None:
    options = model_pb2.RuntimeOptions()
    options.idle_timeout.FromSeconds(5)
    async with Server("a") as server:
        await loads(server.manager, "a")
        await asyncio.sleep(0.3)
        begun = time.time()
        reload = pb.LOAD_CONFLICT_POLICY_RELOAD
        told = await loads(server.manager, "a", runtime_options=options, conflict_policy=reload)
        expires = told[-1].loaded.model.expire_time.ToNanoseconds() / 1e9
        assert begun + 4.99 <= expires <= time.time() + 5.01


async def test_stopping_lets_requests_end_and_refuses_new_ones(server: Server) -> None:
    lease = await server.manager.acquire("a")
    stop = asyncio.create_task(server.manager.stop(drain_seconds=30))
    await asyncio.sleep(0)
    for model in ("a", "b", "unknown"):
        with pytest.raises(PaddockError) as caught:
            await server.manager.acquire(model)
        assert caught.value.reason == Reason.SHUTTING_DOWN
    assert not stop.done()
    lease.release()
    await stop
    assert server.launcher.workers[0].stop_reasons == [Reason.SHUTTING_DOWN]


async def test_stopping_ends_a_search_for_an_unknown_model(server: Server) -> None:
    searching = asyncio.create_task(server.manager.acquire("unknown"))
    await asyncio.sleep(0)
    await server.manager.stop(drain_seconds=30)
    with pytest.raises(PaddockError) as caught:
        await searching
    assert caught.value.reason == Reason.SHUTTING_DOWN


async def test_stopping_ends_a_load_and_those_who_wait_for_it(server: Server) -> None:
    tasks = await slow_load(server, 2)
    await server.manager.stop(drain_seconds=30)
    for task in tasks:
        with pytest.raises(PaddockError) as caught:
            await task
        assert caught.value.reason == Reason.SHUTTING_DOWN
    assert server.launcher.workers[0].exited.done()


async def test_a_manager_that_never_loaded_anything_stops() -> None:
    manager = ModelManager(catalog=FakeCatalog(), launcher=FakeLauncher(), config=ManagerConfig())
    await manager.start()
    await manager.stop(drain_seconds=30)


async def test_an_unknown_model_is_not_found(server: Server) -> None:
    with pytest.raises(ModelNotFoundError):
        await server.manager.acquire("unknown")


async def test_a_snapshot_shows_the_worker_and_the_options_in_effect(server: Server) -> None:
    await loads(server.manager, "a")
    model = await server.manager.snapshot("a")
    assert (model.worker.active_request_count, model.worker.queued_request_count) == (2, 1)
    assert (model.worker.kv_cache_used_tokens, model.worker.kv_cache_total_tokens) == (7, 2048)
    assert model.worker.resident_bytes == 4096
    options = model.runtime_options
    assert (options.context_size_tokens, options.slot_count, options.thread_count) == (2048, 4, 2)
    unloaded = await server.manager.snapshot("b")
    assert not unloaded.HasField("worker")
    assert not unloaded.HasField("runtime_options")
    assert unloaded.load_id == ""


async def test_log_lines_outlive_their_worker(server: Server) -> None:
    await loads(server.manager, "a")
    server.launcher.workers[0].say("one", "two", "three")
    await server.manager.unload(pb.UnloadRequest(model="a"))
    request = pb.StreamLogsRequest(model="a", tail_line_count=2)
    responses = [response async for response in server.manager.stream_logs(request)]
    lines = [line for response in responses for line in response.lines]
    assert [line.text for line in lines] == ["two", "three"]
    assert lines[0].pid == 1000
    assert lines[0].load_id


async def leases_of(server: Server, model: str, count: int) -> list[Lease]:
    return [await server.manager.acquire(model) for _ in range(count)]


async def test_a_model_is_idle_only_when_every_lease_is_back(server: Server) -> None:
    leases = await leases_of(server, "a", 3)
    waiting = asyncio.create_task(server.manager.acquire("b"))
    for lease in leases:
        await asyncio.sleep(0.002)
        assert not waiting.done()
        lease.release()
    async with asyncio.timeout(10), await waiting:
        pass
