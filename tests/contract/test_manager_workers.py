"""The manager with the real catalog and real processes: fake workers that speak the real protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import Catalog
from paddock_server.manager import ManagerConfig, ModelManager
from paddock_server.supervisor import RestartPolicy
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.fakes.polling import eventually
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from typing import Protocol

    Children = Callable[[], set[psutil.Process]]

    class Serve(Protocol):
        """Runs a manager over the models of the test."""

        def __call__(
            self, behaviour: Behaviour | None = None, **config: Any
        ) -> AbstractAsyncContextManager[ModelManager]: ...


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("noise") / "noise.gguf"
    make_noise(path)
    return path.read_bytes()


@pytest.fixture
def directory(tmp_path: Path, noise: bytes) -> Path:
    """Models `a` and `b`."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(noise)
    return tmp_path


class Managing:
    """A manager for the time of a block."""

    def __init__(self, directory: Path, behaviour: Behaviour | None, config: dict[str, Any]) -> None:
        self._manager = ModelManager(
            catalog=Catalog([directory]),
            launcher=fake_launcher(behaviour),
            config=ManagerConfig(**config),
        )

    async def __aenter__(self) -> ModelManager:
        await self._manager.start()
        return self._manager

    async def __aexit__(self, *exc: object) -> None:
        await self._manager.stop(drain_seconds=0)


@pytest.fixture
def serve(directory: Path) -> Serve:
    def managing(behaviour: Behaviour | None = None, **config: Any) -> Managing:
        return Managing(directory, behaviour, {"stop_grace_seconds": 1.0, "slot_count": 8, **config})

    return managing


async def load(manager: ModelManager, model: str, **request: Any) -> list[pb.LoadResponse]:
    async with aclosing(manager.subscribe_load(pb.LoadRequest(model=model, **request))) as stream:
        return [event async for event in stream]


def now(manager: ModelManager, model: str = "a") -> model_pb2.Model:
    return next(found for found in manager.snapshots()[0] if found.id == model)


def request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="a", prompt="hi", stop=gen.StopParams(max_tokens=max_tokens))


async def generate(manager: ModelManager, max_tokens: int = 3, begun: list[str] | None = None) -> str:
    """Generate as the service does; return the text. Adds to `begun` when the generation has a slot."""
    text = ""
    lease = await manager.acquire("a")
    async with lease, lease.worker.generate(request(max_tokens)) as updates:
        async for update in updates:
            if update.HasField("started") and begun is not None:
                begun.append(lease.load_id)
            text += "".join(delta.text for delta in update.deltas.deltas)
    return text


async def test_the_size_of_the_kv_cache_is_known_before_the_first_heartbeat(serve: Serve) -> None:
    async with serve(Behaviour(heartbeat_seconds=3600)) as manager:
        loaded = (await load(manager, "a"))[-1].loaded.model
        shown = await manager.snapshot("a")

    assert loaded.worker.kv_cache_total_tokens > 0
    assert shown.worker.kv_cache_total_tokens == shown.runtime_options.context_size_tokens


async def test_a_load_runs_through_its_stages_on_a_real_process(serve: Serve, directory: Path) -> None:
    async with serve(Behaviour(load_seconds=0.6, progress_steps=6)) as manager:
        events = await load(manager, "a")
        model = events[-1].loaded.model
        assert psutil.pid_exists(model.worker.pid)
        assert model.worker.resident_bytes > 1_000_000
        assert await generate(manager)
    begun = [event.progress.stage for event in events if event.progress.HasField("started")]
    assert begun[:4] == [pb.STAGE_RESOLVE, pb.STAGE_ADMIT, pb.STAGE_SPAWN, pb.STAGE_WEIGHTS]
    size = (directory / "a.gguf").stat().st_size
    advanced = [event.progress.advanced for event in events if event.progress.HasField("advanced")]
    assert {one.total_bytes for one in advanced if one.total_bytes} == {size}
    assert not psutil.pid_exists(model.worker.pid)


async def test_kill_9_is_seen_at_once_and_the_next_request_is_served(serve: Serve) -> None:
    async with serve(Behaviour(tokens_per_second=50.0)) as manager:
        await load(manager, "a")
        pid = now(manager).worker.pid
        begun: list[str] = []
        streams = [asyncio.create_task(generate(manager, 1000, begun)) for _ in range(8)]
        await eventually(lambda: len(begun) == 8)
        os.kill(pid, signal.SIGKILL)
        for ended in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(ended, PaddockError)
            assert ended.reason == Reason.WORKER_CRASHED
        assert await generate(manager)
        model = now(manager)
    assert (model.last_failure.reason, model.last_failure.signal) == (Reason.WORKER_CRASHED, "SIGKILL")
    assert (model.worker.restart_count, model.worker.pid != pid) == (1, True)


async def test_a_worker_that_crashes_after_every_load_ends_as_a_crash_loop(serve: Serve) -> None:
    behaviour = Behaviour(crash_after_tokens=1, crash_signal="SIGSEGV", stderr_lines=("last words",))
    async with serve(behaviour, restart=RestartPolicy(max_crash_count=3, max_delay_seconds=0.05)) as manager:
        for _ in range(3):
            with pytest.raises(PaddockError):
                await generate(manager)
        await eventually(lambda: now(manager).state == model_pb2.MODEL_STATE_FAILED)
        failure = now(manager).last_failure
        assert (failure.reason, failure.signal) == (Reason.CRASH_LOOP, "SIGSEGV")
        assert "last words" in failure.log_tail


async def test_each_way_to_die_in_a_load_has_its_reason(serve: Serve, directory: Path) -> None:
    async with serve() as manager:
        await load(manager, "b")
        for behaviour, reason in (
            ({"crash_at": 0.5, "crash_signal": "SIGABRT"}, Reason.CRASH_LOOP),
            ({"crash_at": 0.5, "exit_code": 70}, Reason.CRASH_LOOP),
            ({"fail_load_reason": "MODEL_CORRUPT"}, Reason.MODEL_CORRUPT),
            ({"fail_load_reason": "INSUFFICIENT_MEMORY"}, Reason.INSUFFICIENT_MEMORY),
        ):
            write_sidecar(directory / "a.gguf", **behaviour)
            with pytest.raises(PaddockError) as caught:
                await load(manager, "a")
            assert caught.value.reason == reason
            assert now(manager).last_failure.reason == reason
            async with await manager.acquire("b"):
                pass


async def test_unload_ends_a_load_that_hangs(serve: Serve) -> None:
    async with serve(Behaviour(load_seconds=60, hang_in_load=True)) as manager:
        task = asyncio.create_task(load(manager, "a"))
        await eventually(lambda: now(manager).worker.pid > 0)
        pid = now(manager).worker.pid
        response = await manager.unload(pb.UnloadRequest(model="a"))
        with pytest.raises(PaddockError) as caught:
            await task
        assert caught.value.reason == Reason.LOAD_ABORTED
        assert response.model.state == model_pb2.MODEL_STATE_UNLOADED
        assert not psutil.pid_exists(pid)


async def test_unload_of_a_worker_that_is_still_starting_leaves_no_process(
    serve: Serve, children: Children
) -> None:
    async with serve(Behaviour(hang_in_handshake=True)) as manager:
        task = asyncio.create_task(load(manager, "a"))
        await eventually(lambda: now(manager).state == model_pb2.MODEL_STATE_LOADING)
        await eventually(lambda: bool(children()))
        await manager.unload(pb.UnloadRequest(model="a"))
        with pytest.raises(PaddockError) as caught:
            await task
        assert caught.value.reason == Reason.LOAD_ABORTED
        assert not children()


async def test_a_load_time_out_ends_the_load_and_its_worker(serve: Serve, children: Children) -> None:
    async with serve(Behaviour(load_seconds=60)) as manager:
        wanted = pb.LoadRequest(model="a")
        wanted.load_timeout.FromMilliseconds(500)
        with pytest.raises(PaddockError) as caught:
            await load(manager, "a", load_timeout=wanted.load_timeout)
        assert caught.value.reason == Reason.LOAD_STALLED
        await eventually(lambda: now(manager).state == model_pb2.MODEL_STATE_FAILED)
        assert not children()


async def test_a_drain_lets_streams_end_and_a_force_cuts_them(serve: Serve) -> None:
    async with serve(Behaviour(tokens_per_second=100.0)) as manager:
        await load(manager, "a")
        begun: list[str] = []
        stream = asyncio.create_task(generate(manager, 20, begun))
        await eventually(lambda: len(begun) == 1)
        drained = await manager.unload(pb.UnloadRequest(model="a"))
        assert drained.aborted_request_count == 0
        assert (await stream).split() == [f"tok{number}" for number in range(20)]

        stream = asyncio.create_task(generate(manager, 100_000, begun))
        await eventually(lambda: len(begun) == 2)
        forced = await manager.unload(pb.UnloadRequest(model="a", mode=pb.UNLOAD_MODE_FORCE))
        with pytest.raises(PaddockError) as caught:
            await stream
        assert (forced.aborted_request_count, caught.value.reason) == (1, Reason.MODEL_UNLOADED)


async def test_swapping_under_load_serves_everyone(serve: Serve, children: Children) -> None:
    async def use(manager: ModelManager, model: str) -> str:
        lease = await manager.acquire(model)
        async with lease, lease.worker.generate(request(3)) as updates:
            async for _ in updates:
                pass
        return lease.model_id

    async with serve(models_max=1, patience_seconds=0.2) as manager:
        wanted = ["a", "b"] * 10
        assert await asyncio.gather(*(use(manager, model) for model in wanted)) == wanted
        assert len(children()) == 1


async def test_stopping_the_manager_lets_streams_end(serve: Serve, children: Children) -> None:
    async with serve(Behaviour(tokens_per_second=100.0)) as manager:
        begun: list[str] = []
        stream = asyncio.create_task(generate(manager, 20, begun))
        await eventually(lambda: len(begun) == 1)
        await manager.stop(drain_seconds=20)
        assert len((await stream).split()) == 20
        assert not children()


@pytest.fixture
def children() -> Children:
    """Return the processes this one has started since, but for a server that other tests share."""
    others = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - others


@pytest.fixture(autouse=True)
async def nothing_is_left(children: Children) -> AsyncGenerator[None]:
    """Fail a test that leaves a process."""
    yield
    await eventually(lambda: not children(), lambda: children())
