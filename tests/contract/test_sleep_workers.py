"""Sleep, keep-alive and pins with real processes: fake workers that speak the real protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from google.protobuf.duration_pb2 import Duration

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import fake_launcher
from tests.fakes.polling import eventually
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

SLEEPING = model_pb2.MODEL_STATE_SLEEPING
LOADED = model_pb2.MODEL_STATE_LOADED
UNLOADED = model_pb2.MODEL_STATE_UNLOADED
SAID = "tok0 tok1 tok2"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        make_noise(directory / f"{name}.gguf")
    return directory


@asynccontextmanager
async def serve(
    models: Path, behaviour: Behaviour | None = None, **flags: Any
) -> AsyncGenerator[ModelManagerApi]:
    settings = {"models_dir": (models,), "grpc_port": 0, "state_dir": None, "drain_seconds": 5, **flags}
    async with (
        serving(ServerConfig.load(settings), launcher=fake_launcher(behaviour)) as server,
        connect(server.grpc_address) as channel,
    ):
        yield GrpcApi(channel)


async def load(api: ModelManagerApi, model: str) -> pb.Loaded:
    *_, last = [event async for event in api.load(pb.LoadRequest(model=model))]
    return last.loaded


async def say(api: ModelManagerApi, model: str, **fields: Any) -> str:
    request = pb.GenerateRequest(model=model, prompt="x", stop=gen.StopParams(max_tokens=3), **fields)
    return "".join([delta.text async for event in api.generate(request) for delta in event.deltas.deltas])


async def state(api: ModelManagerApi, model: str) -> int:
    return (await api.get(pb.GetRequest(model=model))).model.state


async def reaches(api: ModelManagerApi, model: str, wanted: int) -> None:
    async with asyncio.timeout(10):
        async for response in api.watch(pb.WatchRequest(models=[model])):
            if response.changed.model.state == wanted:
                return


async def test_a_sleeping_model_keeps_its_process_and_the_next_request_wakes_it(models: Path) -> None:
    async with serve(models) as api:
        loaded = await load(api, "a")
        slept = (await api.sleep(pb.SleepRequest(model="a"))).model
        assert slept.state == SLEEPING
        assert slept.worker.pid == loaded.model.worker.pid
        assert await say(api, "a") == SAID
        woken = (await api.get(pb.GetRequest(model="a"))).model
        assert (woken.state, woken.worker.pid) == (LOADED, loaded.model.worker.pid)
        assert woken.load_id != loaded.model.load_id


async def test_load_of_a_sleeping_model_streams_its_stages(models: Path) -> None:
    async with serve(models) as api:
        await load(api, "a")
        await api.sleep(pb.SleepRequest(model="a"))
        events = [event async for event in api.load(pb.LoadRequest(model="a"))]
        started = [event.progress.stage for event in events if event.progress.HasField("started")]
        assert started == [
            pb.STAGE_RESOLVE,
            pb.STAGE_ADMIT,
            pb.STAGE_SPAWN,
            pb.STAGE_WEIGHTS,
            pb.STAGE_WARMUP,
        ]
        assert events[-1].HasField("loaded")


async def test_an_idle_model_sleeps_by_itself_and_watchers_see_it(models: Path) -> None:
    async with serve(models, sleep_idle_seconds=0.05) as api:
        await load(api, "a")
        await reaches(api, "a", SLEEPING)


async def test_keep_alive_keeps_an_idle_model_awake(models: Path) -> None:
    async with serve(models, sleep_idle_seconds=0.05) as api:
        await say(api, "a", keep_alive=Duration(seconds=3600))
        expires = (await api.get(pb.GetRequest(model="a"))).model.expire_time
        await say(api, "a", keep_alive=Duration(seconds=1))
        again = (await api.get(pb.GetRequest(model="a"))).model.expire_time
        assert again.seconds - expires.seconds in {-1, 0, 1}, "the later end counts"
        assert await state(api, "a") == LOADED


async def test_a_keep_alive_out_of_range_is_refused_by_name(models: Path) -> None:
    async with serve(models) as api:
        with pytest.raises(PaddockError) as caught:
            await say(api, "a", keep_alive=Duration(seconds=-1))
        assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, "keep_alive")


async def test_a_pinned_model_is_not_evicted_and_who_needs_its_place_is_told(models: Path) -> None:
    async with serve(models, models_max=1) as api:
        await load(api, "a")
        assert (await api.pin(pb.PinRequest(model="a"))).model.pinned
        with pytest.raises(PaddockError) as caught:
            await say(api, "b")
        assert caught.value.reason == Reason.INSUFFICIENT_MEMORY
        assert caught.value.metadata["pinned"] == "a"
        assert not (await api.pin(pb.PinRequest(model="a", unpin=True))).model.pinned
        assert await say(api, "b") == SAID
        assert await state(api, "a") == UNLOADED


async def test_a_sleeping_model_takes_no_place(models: Path) -> None:
    async with serve(models, models_max=1) as api:
        await load(api, "a")
        await api.sleep(pb.SleepRequest(model="a"))
        await load(api, "b")
        assert await state(api, "a") == SLEEPING
        assert await say(api, "a") == SAID
        assert await state(api, "b") == UNLOADED


async def test_a_sleeper_that_is_killed_is_replaced_by_the_next_request(models: Path) -> None:
    async with serve(models) as api:
        loaded = await load(api, "a")
        await api.sleep(pb.SleepRequest(model="a"))
        os.kill(loaded.model.worker.pid, signal.SIGKILL)
        await reaches(api, "a", UNLOADED)
        assert await say(api, "a") == SAID


async def test_what_a_woken_worker_writes_carries_the_load_it_was_woken_for(models: Path) -> None:
    async with serve(models, Behaviour(stderr_lines=("loading",))) as api:
        first = (await load(api, "a")).model
        await api.sleep(pb.SleepRequest(model="a"))
        second = (await load(api, "a")).model
        assert second.worker.pid == first.worker.pid
        logs = pb.StreamLogsRequest(model="a", follow=True)
        written: list[tuple[str, int]] = []
        async with asyncio.timeout(10), aclosing(api.stream_logs(logs)) as responses:
            async for response in responses:
                written += [(line.load_id, line.pid) for line in response.lines if line.text == "loading"]
                if len(written) == 2:
                    break
        assert written == [(model.load_id, first.worker.pid) for model in (first, second)]


async def test_a_model_in_use_is_not_put_to_sleep(models: Path) -> None:
    async with serve(models, Behaviour(tokens_per_second=50)) as api:
        request = pb.GenerateRequest(model="a", prompt="x", stop=gen.StopParams(max_tokens=1000))
        stream = api.generate(request)
        await anext(stream)
        with pytest.raises(PaddockError) as caught:
            await api.sleep(pb.SleepRequest(model="a"))
        assert caught.value.reason == Reason.MODEL_IN_USE
        await stream.aclose()


async def test_unload_ends_a_worker_that_does_not_fall_asleep(models: Path) -> None:
    async with serve(models, Behaviour(hang_in_sleep=True)) as api:
        loaded = await load(api, "a")
        sleep = asyncio.create_task(api.sleep(pb.SleepRequest(model="a")))
        await reaches(api, "a", model_pb2.MODEL_STATE_UNLOADING)
        await api.unload(pb.UnloadRequest(model="a"))
        assert (await sleep).model.state == UNLOADED
        await eventually(lambda: not psutil.pid_exists(loaded.model.worker.pid))
