"""The memory ledger over a real server: who gets in, who has to go, and what is said of it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_manager_pb2_grpc, model_pb2
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from paddock_server.memory import MachineWatch
from tests.fakes.behaviour import Behaviour
from tests.fakes.launching import fake_launcher
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

LOADED = model_pb2.MODEL_STATE_LOADED
UNLOADED = model_pb2.MODEL_STATE_UNLOADED
MIB = 1 << 20
LARGE = model_pb2.RuntimeOptions(context_size_tokens=1 << 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("a", "b", "c"):
        make_noise(directory / f"{name}.gguf")
    return directory


@asynccontextmanager
async def serve(models: Path, **flags: Any) -> AsyncGenerator[ModelManagerApi]:
    settings = {"models_dir": (models,), "grpc_port": 0, "state_dir": None, "models_max": 0, **flags}
    async with (
        serving(ServerConfig.load(settings), launcher=fake_launcher()) as server,
        connect(server.grpc_address) as channel,
    ):
        yield GrpcApi(channel)


async def needed(models: Path) -> int:
    """Bytes a load with the server's defaults is predicted to take."""
    async with serve(models) as api:
        estimate = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
    return sum(part.size_bytes for part in estimate.parts)


async def load(api: ModelManagerApi, model: str, **fields: Any) -> model_pb2.Model:
    *_, last = [event async for event in api.load(pb.LoadRequest(model=model, **fields))]
    return last.loaded.model


async def states(api: ModelManagerApi) -> dict[str, int]:
    return {model.id: model.state for model in (await api.list(pb.ListRequest())).models}


async def test_a_loaded_model_is_charged_with_what_was_measured(models: Path) -> None:
    async with serve(models) as api:
        await load(api, "a")
        model = (await api.get(pb.GetRequest(model="a"))).model
        assert model.memory.phase == model_pb2.MEMORY_PHASE_MEASURED
        assert model.memory.bytes["RAM"] == pytest.approx(model.worker.resident_bytes, rel=0.2)
        assert not (await api.get(pb.GetRequest(model="b"))).model.HasField("memory")


async def test_what_models_hold_of_the_budget_is_shown_by_device(models: Path) -> None:
    budget = await needed(models) * 3
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        before = (await api.get_server_info(pb.GetServerInfoRequest())).devices[0]
        await load(api, "a")
        await load(api, "b")
        device = (await api.get_server_info(pb.GetServerInfoRequest())).devices[0]
        charges = {model.id: model.memory.bytes["RAM"] for model in (await api.list(pb.ListRequest())).models}
        others = (await api.estimate_memory(pb.EstimateMemoryRequest(model="c"))).devices[0]
        own = (await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))).devices[0]
    assert (before.budget_bytes, before.held_bytes) == (budget, 0)
    assert device.held_bytes == sum(charges.values()) == others.held_bytes
    assert (others.budget_bytes, own.held_bytes) == (budget, charges["b"]), "what it holds itself is not held"


async def test_an_estimate_judges_by_the_same_budget_as_a_load(models: Path) -> None:
    budget = await needed(models) + MIB
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        await load(api, "a")
        beside = await api.estimate_memory(pb.EstimateMemoryRequest(model="b"))
        alone = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        never = await api.estimate_memory(pb.EstimateMemoryRequest(model="b", runtime_options=LARGE))
    assert [estimate.verdict for estimate in (alone, beside, never)] == [
        pb.MEMORY_VERDICT_FITS,
        pb.MEMORY_VERDICT_FITS_AFTER_EVICTION,
        pb.MEMORY_VERDICT_NEVER_FITS,
    ]


async def test_a_model_that_does_not_fit_beside_idle_ones_has_them_evicted(models: Path) -> None:
    budget = await needed(models) + MIB
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        await load(api, "a")
        await load(api, "b")
        assert await states(api) == {"a": UNLOADED, "b": LOADED, "c": UNLOADED}


async def test_a_server_has_one_process_look_for_accelerators(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[MachineWatch] = []

    async def asked(watch: MachineWatch) -> bytes:
        probes.append(watch)
        return b'{"gpus": [], "features": []}'

    monkeypatch.setattr(MachineWatch, "_asked", asked)
    async with serve(models) as api:
        await api.get_server_info(pb.GetServerInfoRequest())
        await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
    assert len(probes) == 1


async def test_models_that_fit_stay_beside_each_other(models: Path) -> None:
    budget = await needed(models) * 3
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        await load(api, "a")
        await load(api, "b")
        await load(api, "c")
        assert set((await states(api)).values()) == {LOADED}


async def test_a_load_that_never_fits_is_refused_with_needed_and_free(models: Path) -> None:
    budget = await needed(models) * 2
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        with pytest.raises(PaddockError) as caught:
            await load(api, "a", runtime_options=LARGE)
        assert caught.value.reason == Reason.INSUFFICIENT_MEMORY
        figures = caught.value.metadata
        assert int(figures["needed_bytes.RAM"]) > int(figures["budget_bytes.RAM"]) == budget
        assert figures["free_bytes.RAM"] == str(budget)


async def test_a_load_refused_for_a_pin_names_who_holds_what(models: Path) -> None:
    budget = await needed(models) + MIB
    async with serve(models, memory_budget=f"RAM={budget}") as api:
        await load(api, "a")
        await api.pin(pb.PinRequest(model="a"))
        with pytest.raises(PaddockError) as caught:
            await load(api, "b")
        held = int(caught.value.metadata["held_by.a"].removeprefix("RAM="))
        assert held > MIB
        assert int(caught.value.metadata["free_bytes.RAM"]) == budget - held


async def test_a_context_left_open_is_chosen_to_fit_and_shown(models: Path) -> None:
    everything = pb.LoadRequest(model="a", runtime_options=model_pb2.RuntimeOptions(context_size_tokens=0))
    async with serve(models) as api:
        estimate = await api.estimate_memory(
            pb.EstimateMemoryRequest(model="a", runtime_options=everything.runtime_options)
        )
        trained = (await api.get(pb.GetRequest(model="a"))).model.info.trained_context_tokens
    need = sum(part.size_bytes for part in estimate.parts)
    async with serve(models, memory_budget=f"RAM={need - 256 * 1024}") as api:
        model = await load(api, "a", runtime_options=everything.runtime_options)
    assert 0 < model.runtime_options.context_size_tokens < trained


async def ram_of(api: ModelManagerApi, **fields: Any) -> pb.DeviceMemory:
    """Return what an estimate says of the main memory."""
    return (await api.estimate_memory(pb.EstimateMemoryRequest(model="a", **fields))).devices[0]


async def test_what_was_measured_corrects_estimates_and_survives_a_restart(
    models: Path, tmp_path: Path
) -> None:
    async with serve(models, state_dir=tmp_path, restore=False) as api:
        before = await ram_of(api)
        loaded = await load(api, "a")
        after = await ram_of(api)
    async with serve(models, state_dir=tmp_path, restore=False) as api:
        again = await ram_of(api)
        other = await ram_of(api, runtime_options=model_pb2.RuntimeOptions(slot_count=3))
    assert not before.measured
    assert (after.measured, again.measured, other.measured) == (True, True, False)
    assert after.needed_bytes == pytest.approx(loaded.worker.resident_bytes, rel=0.2)
    assert again.needed_bytes == after.needed_bytes
    assert other.needed_bytes == pytest.approx(before.needed_bytes, rel=0.1)


async def test_the_first_load_after_a_restart_is_admitted_by_what_was_measured(
    models: Path, tmp_path: Path
) -> None:
    async with serve(models, state_dir=tmp_path, restore=False) as api:
        estimated = (await ram_of(api)).needed_bytes
        await load(api, "a")
        measured = (await ram_of(api)).needed_bytes
    assert measured + 4 * MIB < estimated, "a fake worker takes less than a real one"
    budget = f"RAM={measured + 4 * MIB}"
    async with serve(models, state_dir=None, memory_budget=budget) as api:
        with pytest.raises(PaddockError) as caught:
            await load(api, "a")
        assert caught.value.reason == Reason.INSUFFICIENT_MEMORY
    async with serve(models, state_dir=tmp_path, restore=False, memory_budget=budget) as api:
        estimate = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        assert estimate.verdict == pb.MEMORY_VERDICT_FITS
        assert (await load(api, "a")).state == LOADED


async def test_a_waiter_whose_deadline_passes_costs_nothing(models: Path) -> None:
    """It leaves the queue, and the model nobody waits for any more is not loaded when room comes."""
    settings = {"models_dir": (models,), "grpc_port": 0, "state_dir": None, "models_max": 1}
    async with (
        serving(
            ServerConfig.load(settings), launcher=fake_launcher(Behaviour(tokens_per_second=50))
        ) as server,
        connect(server.grpc_address) as channel,
    ):
        api = GrpcApi(channel)
        busy = api.generate(pb.GenerateRequest(model="a", prompt="x", stop=gen.StopParams(max_tokens=1000)))
        await anext(busy)
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(pb.GenerateRequest(model="b", prompt="x"), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        waiting = (await api.get(pb.GetRequest(model="b"))).model
        await busy.aclose()
        assert (waiting.state, waiting.waiting_request_count) == (UNLOADED, 0)
        assert (await api.get(pb.GetRequest(model="b"))).model.state == UNLOADED
        assert (await api.get(pb.GetRequest(model="a"))).model.state == LOADED
