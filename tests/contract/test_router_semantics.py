"""The rules that llama-server's router is tested by (tools/server/tests/unit: test_router.py, test_sleep.py),
as far as they hold here: the real server and gateway with fake workers. All: docs/router-semantics.md.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_gateway.serve import serve
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from tests.fakes.behaviour import Behaviour
from tests.fakes.hub import FakeHub, Repo, running_hub
from tests.fakes.launching import fake_launcher
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from paddock.api import ModelManagerApi
    from paddock_gateway.serve import Gateway

UNLOADED = model_pb2.MODEL_STATE_UNLOADED
LOADING = model_pb2.MODEL_STATE_LOADING
LOADED = model_pb2.MODEL_STATE_LOADED
SLEEPING = model_pb2.MODEL_STATE_SLEEPING
UNLOADING = model_pb2.MODEL_STATE_UNLOADING

WAY_OUT_SECONDS = 30
REPO = "org/noise-GGUF"
HUB_ID = f"{REPO}:Q4_K_M"
BUSY_TOKENS = 100
"""Two seconds' worth for the fake: long enough to be in the way, shorter than the manager's patience."""


class Router:
    """A server with models a, b and c, a gateway beside it, and what they were seen doing."""

    def __init__(self, api: ModelManagerApi, gateway: Gateway) -> None:
        self.api = api
        self.url = gateway.url
        self.evicted: list[str] = []
        """Models that began to unload, in order."""
        self._states: dict[str, int] = {}
        self._changed = asyncio.Condition()

    async def observe(self) -> None:
        """Note every change of state, from the watch."""
        async with aclosing(self.api.watch(pb.WatchRequest())) as responses:
            async for response in responses:
                model = response.changed.model
                async with self._changed:
                    self._states[model.id] = model.state
                    if model.state == UNLOADING:
                        self.evicted.append(model.id)
                    self._changed.notify_all()

    async def until(self, model: str, state: int) -> None:
        """Wait until a model was seen in a state."""
        async with asyncio.timeout(WAY_OUT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self._states.get(model) == state)

    async def state(self, model: str) -> int:
        return (await self.api.get(pb.GetRequest(model=model))).model.state

    async def load(self, *models: str) -> None:
        for model in models:
            async with aclosing(self.api.load(pb.LoadRequest(model=model))) as responses:
                async for _ in responses:
                    pass

    async def generate(self, model: str, tokens: int = 2, begun: asyncio.Event | None = None) -> int:
        """Generate, and return the number of tokens that came."""
        request = pb.GenerateRequest(model=model, prompt="hi", stop=gen.StopParams(max_tokens=tokens))
        count = 0
        async with aclosing(self.api.generate(request)) as responses:
            async for response in responses:
                count += sum(delta.token_count for delta in response.deltas.deltas)
                if begun is not None:
                    begun.set()
        return count

    async def keep_busy(self, model: str) -> asyncio.Task[int]:
        """Start a request that has the model busy for a while."""
        begun = asyncio.Event()
        task = asyncio.create_task(self.generate(model, BUSY_TOKENS, begun))
        async with asyncio.timeout(WAY_OUT_SECONDS):
            await begun.wait()
        return task

    async def queue(self, model: str) -> asyncio.Task[int]:
        """Start a request for a model that is not loaded, and return it when it waits for room."""
        task = asyncio.create_task(self.generate(model))
        await self.until(model, LOADING)
        return task

    async def download(self) -> int:
        """Download the model of the hub, and return how many times its progress was told."""
        advanced = 0
        async with aclosing(self.api.download(pb.DownloadRequest(model=f"hf:{HUB_ID}"))) as responses:
            async for response in responses:
                advanced += response.progress.HasField("advanced")
        return advanced

    async def statuses(self) -> dict[str, str]:
        """Return what `/v1/models` says of each model it lists."""
        async with httpx.AsyncClient(base_url=self.url, timeout=WAY_OUT_SECONDS) as client:
            listed = (await client.get("/v1/models")).json()["data"]
        return {model["id"]: model["status"]["value"] for model in listed}

    async def chat(self, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **more}
        async with httpx.AsyncClient(base_url=self.url, timeout=WAY_OUT_SECONDS) as client:
            return await client.post("/v1/chat/completions", json=body)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        make_noise(tmp_path / f"{name}.gguf")
    return tmp_path


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Generator[FakeHub]:
    """A hub with one model, which servers of the test use, with a cache of their own."""
    home = tmp_path_factory.mktemp("hub")
    (file,) = make_noise(home / "noise.gguf")
    with running_hub() as hub:
        hub.repos[REPO] = Repo({"noise-Q4_K_M.gguf": file.read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(home))
        yield hub


@asynccontextmanager
async def router(directory: Path, *, first: str = "a", **settings: object) -> AsyncGenerator[Router]:
    """Serve the models of a directory; `first` is one that there is."""
    config = ServerConfig.load(
        {"models_dir": (directory,), "grpc_port": 0, "state_dir": None, "drain_seconds": 5, **settings}
    )
    launcher = fake_launcher(Behaviour(tokens_per_second=50.0))
    async with (
        serving(config, launcher=launcher) as server,
        serve(server.service, port=0) as gateway,
        connect(server.grpc_address) as channel,
    ):
        found = Router(GrpcApi(channel), gateway)
        observing = asyncio.create_task(found.observe())
        await found.until(first, UNLOADED)
        try:
            async with asyncio.timeout(WAY_OUT_SECONDS):
                yield found
        finally:
            observing.cancel()
            await asyncio.wait({observing})


async def test_a_model_that_is_not_loaded_is_loaded_by_the_request_that_names_it(directory: Path) -> None:
    async with router(directory) as server:
        answer = await server.chat("a", stream=True)
        unknown = await server.chat("non-existent/model", stream=True)

    assert answer.status_code == 200
    assert "data: [DONE]" in answer.text
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_unload_answers_when_the_model_is_unloaded(directory: Path) -> None:
    async with router(directory) as server:
        await server.load("a")
        unloaded = await server.api.unload(pb.UnloadRequest(model="a"))

    assert unloaded.model.state == UNLOADED


async def test_one_model_too_many_costs_the_one_whose_use_is_longest_ago(directory: Path) -> None:
    async with router(directory, models_max=2) as server:
        await server.load("a", "b")
        await server.generate("a")
        await server.load("c")
        states = [await server.state(model) for model in ("a", "b", "c")]

    assert states == [LOADED, UNLOADED, LOADED]
    assert server.evicted[:1] == ["b"]


async def test_a_busy_model_is_not_evicted_and_the_request_for_another_waits(directory: Path) -> None:
    async with router(directory, models_max=1) as server:
        await server.load("a")
        busy = await server.keep_busy("a")
        queued = await server.queue("b")
        assert await server.state("a") == LOADED
        assert await busy == BUSY_TOKENS
        assert await queued == 2
        states = [await server.state(model) for model in ("a", "b")]

    assert states == [UNLOADED, LOADED]


async def test_many_requests_for_one_missing_model_cost_one_eviction(directory: Path) -> None:
    async with router(directory, models_max=2) as server:
        await server.load("a", "b")
        busy = await server.keep_busy("a")
        waiters = [asyncio.create_task(server.generate("c")) for _ in range(3)]
        assert await asyncio.gather(*waiters) == [2, 2, 2]
        assert await busy == BUSY_TOKENS
        states = [await server.state(model) for model in ("a", "b", "c")]
        evicted = list(server.evicted)

    assert (states, evicted) == ([LOADED, UNLOADED, LOADED], ["b"])


async def test_a_client_that_leaves_the_queue_costs_no_model_its_place(directory: Path) -> None:
    async with router(directory, models_max=1) as server:
        await server.load("a")
        busy = await server.keep_busy("a")
        queued = await server.queue("b")
        queued.cancel()
        await asyncio.wait({queued})
        await server.until("b", UNLOADED)
        assert await busy == BUSY_TOKENS
        assert await server.generate("a") == 2, "it serves on"
        evicted = list(server.evicted)

    assert "a" not in evicted


async def test_a_client_of_the_gateway_that_leaves_the_queue_costs_no_model_its_place(
    directory: Path,
) -> None:
    async with router(directory, models_max=1) as server:
        await server.load("a")
        busy = await server.keep_busy("a")
        queued = asyncio.create_task(server.chat("b"))
        await server.until("b", LOADING)
        queued.cancel()  # closes its connection
        await asyncio.wait({queued})
        await server.until("b", UNLOADED)
        assert await busy == BUSY_TOKENS
        evicted = list(server.evicted)

    assert "a" not in evicted


async def test_the_queue_is_served_in_the_order_of_arrival(directory: Path) -> None:
    ended: list[str] = []

    def note(model: str, _: asyncio.Task[int]) -> None:
        ended.append(model)

    async with router(directory, models_max=1) as server:
        await server.load("a")
        busy = await server.keep_busy("a")
        queued: dict[str, asyncio.Task[int]] = {}
        for model in ("c", "b"):
            queued[model] = await server.queue(model)
            queued[model].add_done_callback(partial(note, model))
        assert await busy == BUSY_TOKENS
        assert await asyncio.gather(*queued.values()) == [2, 2]

    assert ended == ["c", "b"]


async def test_two_requests_that_want_the_place_of_one_idle_model_are_both_served(directory: Path) -> None:
    async with router(directory, models_max=1) as server:
        await server.load("a")
        assert await asyncio.gather(server.generate("b"), server.generate("c")) == [2, 2]
        states = [await server.state(model) for model in ("a", "b", "c")]

    assert states[0] == UNLOADED
    assert states.count(LOADED) == 1


async def test_without_autoload_a_request_is_refused_until_somebody_loads_the_model(directory: Path) -> None:
    async with router(directory, models_autoload=False) as server:
        refused = await server.chat("a")
        with pytest.raises(PaddockError) as caught:
            await server.generate("a")
        before = await server.state("a")
        await server.load("a")
        served = await server.chat("a")

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_loaded")
    assert (caught.value.reason, before) == (Reason.MODEL_NOT_LOADED, UNLOADED)
    assert (served.status_code, "error" in served.json()) == (200, False)


async def test_looking_at_models_neither_loads_nor_uses_them(directory: Path) -> None:
    async with router(directory, models_max=2) as server:
        await server.load("a", "b")
        async with httpx.AsyncClient(base_url=server.url, timeout=WAY_OUT_SECONDS) as client:
            for path in ("/health", "/v1/models", "/v1/models/a", "/v1/models/c"):
                assert (await client.get(path)).status_code == 200
        await server.load("c")
        states = [await server.state(model) for model in ("a", "b", "c")]

    assert states == [UNLOADED, LOADED, LOADED], "a was looked at last, and used longest ago"


async def test_a_reload_reads_the_preset_again_and_models_come_go_and_stay(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    preset = empty / "models.ini"
    sections = {name: f"[{name}]\nmodel = {directory / name[-1]}.gguf\n" for name in ("p-a", "p-b", "p-c")}
    preset.write_text(sections["p-a"] + sections["p-b"])
    async with router(empty, first="p-a", models_preset=preset, hf_cache=False) as server:
        await server.load("p-b")
        before = await server.statuses()
        preset.write_text(sections["p-b"] + sections["p-c"])
        await server.api.reload(pb.ReloadRequest())
        after = await server.statuses()
        evicted = list(server.evicted)

    assert before == {"p-a": "unloaded", "p-b": "loaded"}
    assert after == {"p-b": "loaded", "p-c": "unloaded"}
    assert evicted == [], "what stays is not touched"


async def test_a_cached_model_that_a_preset_names_is_listed_once_and_has_both_names(
    directory: Path, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    preset = tmp_path_factory.mktemp("preset") / "models.ini"
    preset.write_text(f"[dedup]\nhf-repo = {HUB_ID}\n")
    async with router(directory) as server:
        await server.download()
    async with router(directory, models_preset=preset) as server:
        listed = await server.statuses()
        answers = [await server.generate(name) for name in ("dedup", HUB_ID)]
        preset.write_text("")
        await server.api.reload(pb.ReloadRequest())
        relisted, unnamed = await server.statuses(), await server.chat("dedup")

    assert [name for name in listed if name not in {"a", "b", "c"}] == ["dedup"]
    assert answers == [2, 2]
    assert [name for name in relisted if name not in {"a", "b", "c"}] == [HUB_ID]
    assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_download_costs_no_model_its_place_and_a_deleted_model_is_not_listed(
    directory: Path, hub: FakeHub
) -> None:
    async with router(directory, models_max=1) as server:
        await server.load("a")
        advanced = await server.download()
        listed = await server.statuses()
        await server.api.delete(pb.DeleteRequest(model=HUB_ID))
        relisted = await server.statuses()
        evicted = list(server.evicted)

    assert advanced, "it tells how far it is"
    assert (listed["a"], listed[HUB_ID]) == ("loaded", "unloaded")
    assert evicted == []
    assert HUB_ID not in relisted


async def test_an_idle_model_sleeps_until_a_request_and_looking_at_it_does_not_wake_it(
    directory: Path,
) -> None:
    async with router(directory) as server:
        await server.load("a")
        await server.api.sleep(pb.SleepRequest(model="a"))
        async with httpx.AsyncClient(base_url=server.url, timeout=WAY_OUT_SECONDS) as client:
            for path in ("/health", "/v1/models", "/v1/models/a"):
                assert (await client.get(path)).status_code == 200
        await server.api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        looked_at = (await server.state("a"), (await server.statuses())["a"])
        answer = await server.chat("a")
        woken = await server.state("a")

    assert looked_at == (SLEEPING, "sleeping")
    assert (answer.status_code, woken) == (200, LOADED)


async def test_counting_tokens_wakes_a_model_that_sleeps_even_without_autoload(directory: Path) -> None:
    async with router(directory, models_autoload=False) as server:
        await server.load("a")
        await server.api.sleep(pb.SleepRequest(model="a"))
        counted = await server.api.tokenize(pb.TokenizeRequest(model="a", text="hello world"))
        woken = await server.state("a")

    assert counted.token_ids
    assert woken == LOADED


async def test_a_request_over_http_says_how_long_the_model_is_kept(directory: Path) -> None:
    async with router(directory, sleep_idle_seconds=0.05) as server:
        kept = await server.chat("a", keep_alive="1h")
        wrong = await server.chat("a", keep_alive="for ever")
        model = (await server.api.get(pb.GetRequest(model="a"))).model

    assert kept.status_code == 200
    assert model.state == LOADED
    assert 3500 < model.expire_time.seconds - model.last_use_time.seconds <= 3601
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "keep_alive")
