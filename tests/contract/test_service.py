"""The whole server over real gRPC, with fake workers that are told to misbehave."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

NAMES = ("good", "other", "crashes", "refuses", "slow", "takes-a-while")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_noise(directory / f"{name}.gguf")
    write_sidecar(directory / "good.gguf", tokens_per_second=200.0)
    write_sidecar(
        directory / "crashes.gguf", crash_at=0.5, crash_signal="SIGSEGV", stderr_lines=("about to fall over",)
    )
    write_sidecar(
        directory / "refuses.gguf",
        fail_load_reason="UNSUPPORTED_MODEL",
        fail_load_message="unknown architecture",
    )
    write_sidecar(directory / "slow.gguf", load_seconds=30.0)
    write_sidecar(directory / "takes-a-while.gguf", load_seconds=1.5)
    return directory


@pytest.fixture
async def api(models: Path) -> AsyncGenerator[ModelManagerApi]:
    config = ServerConfig.load(
        {
            "models_dir": (models,),
            "grpc_port": 0,
            "state_dir": None,
            "drain_seconds": 5,
            "parallel": 2,
            "queue_limit": 1,
        }
    )
    async with serving(config, launcher=fake_launcher()) as server, connect(server.grpc_address) as channel:
        yield GrpcApi(channel)


def request(
    model: str = "good",
    max_tokens: int = 4,
    autoload_policy: pb.AutoloadPolicy.ValueType = pb.AUTOLOAD_POLICY_UNSPECIFIED,
) -> pb.GenerateRequest:
    stop = gen.StopParams(max_tokens=max_tokens)
    return pb.GenerateRequest(model=model, prompt="hi", stop=stop, autoload_policy=autoload_policy)


async def run(api: ModelManagerApi, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(api.generate(request)) as responses:
        return [response async for response in responses]


async def load(
    api: ModelManagerApi,
    model: str,
    options: model_pb2.RuntimeOptions | None = None,
    conflict_policy: pb.LoadConflictPolicy.ValueType = pb.LOAD_CONFLICT_POLICY_UNSPECIFIED,
) -> list[pb.LoadResponse]:
    request = pb.LoadRequest(model=model, runtime_options=options, conflict_policy=conflict_policy)
    async with aclosing(api.load(request)) as responses:
        return [response async for response in responses]


async def test_list_shows_what_the_directory_holds_with_facts_of_unloaded_models(
    api: ModelManagerApi,
) -> None:
    models = {model.id: model for model in (await api.list(pb.ListRequest())).models}

    assert sorted(NAMES) == list(models)
    assert {model.state for model in models.values()} == {model_pb2.MODEL_STATE_UNLOADED}
    assert models["good"].info.architecture == "llama"
    assert models["good"].info.has_chat_template


async def test_generate_follows_its_grammar(api: ModelManagerApi) -> None:
    events = [response.WhichOneof("event") for response in await run(api, request())]

    assert events[0] == "started"
    assert events[-1] == "generated"
    assert set(events[1:-1]) == {"deltas"}


async def test_autoload_off_by_request_is_refused_before_anything_is_loaded(api: ModelManagerApi) -> None:
    with pytest.raises(PaddockError) as caught:
        await run(api, request(autoload_policy=pb.AUTOLOAD_POLICY_FAIL))
    model = (await api.get(pb.GetRequest(model="good"))).model

    assert caught.value.reason == Reason.MODEL_NOT_LOADED
    assert model.state == model_pb2.MODEL_STATE_UNLOADED


async def test_a_load_that_always_crashes_fails_with_signal_and_log_tail(api: ModelManagerApi) -> None:
    with pytest.raises(PaddockError) as caught:
        await load(api, "crashes")
    model = (await api.get(pb.GetRequest(model="crashes"))).model

    assert caught.value.reason == Reason.CRASH_LOOP
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert model.last_failure.reason == Reason.CRASH_LOOP
    assert model.last_failure.signal == "SIGSEGV"
    assert "about to fall over" in "\n".join(model.last_failure.log_tail)


async def test_a_refused_file_fails_with_the_workers_reason_and_others_are_served(
    api: ModelManagerApi,
) -> None:
    with pytest.raises(PaddockError, match="unknown architecture") as caught:
        await load(api, "refuses")

    assert caught.value.reason == Reason.UNSUPPORTED_MODEL
    assert (await run(api, request()))[-1].HasField("generated")


async def test_unload_aborts_a_load_for_all_who_watch_it(api: ModelManagerApi) -> None:
    watchers = [asyncio.create_task(load(api, "slow")) for _ in range(3)]
    async with aclosing(api.load(pb.LoadRequest(model="slow"))) as responses:
        async for response in responses:
            if response.progress.stage == pb.STAGE_WEIGHTS:
                break
    await api.unload(pb.UnloadRequest(model="slow"))
    ends = await asyncio.gather(*watchers, return_exceptions=True)

    assert [end.reason for end in ends if isinstance(end, PaddockError)] == [Reason.LOAD_ABORTED] * 3


async def test_a_watcher_that_goes_away_takes_no_load_from_the_nine_others(api: ModelManagerApi) -> None:
    streams = [api.load(pb.LoadRequest(model="takes-a-while")) for _ in range(10)]
    firsts = await asyncio.gather(*(anext(stream) for stream in streams))
    await streams[0].aclose()  # cancels the call

    async def end(stream: AsyncGenerator[pb.LoadResponse]) -> pb.LoadResponse:
        return [response async for response in stream][-1]

    ends = await asyncio.gather(*(end(stream) for stream in streams[1:]))

    assert all(first.HasField("progress") for first in firsts)
    assert [end.WhichOneof("event") for end in ends] == ["loaded"] * 9
    assert len({end.loaded.model.load_id for end in ends}) == 1


async def test_a_load_with_other_options_is_refused_and_names_them(api: ModelManagerApi) -> None:
    await load(api, "good")
    other = model_pb2.RuntimeOptions(slot_count=3, batch_size_tokens=64)

    with pytest.raises(PaddockError) as caught:
        await load(api, "good", other, pb.LOAD_CONFLICT_POLICY_FAIL)

    assert caught.value.reason == Reason.OPTIONS_CONFLICT
    assert caught.value.code.name == "FAILED_PRECONDITION"
    assert caught.value.metadata["model"] == "good"
    assert set(caught.value.metadata["fields"].split(",")) == {"slot_count", "batch_size_tokens"}


@pytest.mark.parametrize(
    ("policy", "slot_count"), [(pb.LOAD_CONFLICT_POLICY_KEEP, 2), (pb.LOAD_CONFLICT_POLICY_RELOAD, 3)]
)
async def test_a_load_with_other_options_keeps_or_reloads_as_told(
    api: ModelManagerApi, policy: pb.LoadConflictPolicy.ValueType, slot_count: int
) -> None:
    first = (await load(api, "good"))[-1].loaded
    second = (await load(api, "good", model_pb2.RuntimeOptions(slot_count=3), policy))[-1].loaded

    kept = policy == pb.LOAD_CONFLICT_POLICY_KEEP
    assert second.already_loaded == kept
    assert (second.model.load_id == first.model.load_id) == kept
    assert second.model.runtime_options.slot_count == slot_count


async def test_an_idle_model_is_unloaded_after_its_idle_timeout(api: ModelManagerApi) -> None:
    options = model_pb2.RuntimeOptions(idle_timeout=Duration(nanos=200_000_000))
    states: list[int] = []
    async with aclosing(api.watch(pb.WatchRequest(models=["good"]))) as watch:
        while not (await anext(watch)).HasField("synced"):
            pass
        assert (await load(api, "good", options))[-1].HasField("loaded")
        async for event in watch:
            states.append(event.changed.model.state)
            if states[-1] == model_pb2.MODEL_STATE_UNLOADED:
                break

    assert model_pb2.MODEL_STATE_LOADED in states
    assert model_pb2.MODEL_STATE_FAILED not in states


async def test_more_requests_than_slots_and_queue_are_refused_with_a_time_to_retry(
    api: ModelManagerApi,
) -> None:
    await load(api, "good")
    streams = [api.generate(request(max_tokens=10_000)) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    # Two more for one place in the queue: one waits, the other ends at once.
    more = [asyncio.create_task(run(api, request(max_tokens=1))) for _ in range(2)]
    (refused,), (waiting,) = await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
    error = refused.exception()
    for stream in streams:
        await stream.aclose()

    assert isinstance(error, PaddockError)
    assert error.reason == Reason.QUEUE_FULL
    assert error.retry_after_seconds
    assert (await waiting)[-1].HasField("generated")


async def test_watch_sends_the_state_then_synced_then_changes(api: ModelManagerApi) -> None:
    states: list[int] = []
    async with aclosing(api.watch(pb.WatchRequest(models=["good"]))) as watch:
        assert (await anext(watch)).changed.model.id == "good"
        assert (await anext(watch)).HasField("synced")
        await load(api, "good")
        async for event in watch:
            states.append(event.changed.model.state)
            if states[-1] == model_pb2.MODEL_STATE_LOADED:
                break

    assert states[0] == model_pb2.MODEL_STATE_LOADING


async def test_a_watch_from_a_revision_goes_on_without_a_gap(api: ModelManagerApi) -> None:
    server = await api.get_server_info(pb.GetServerInfoRequest())
    listed = (await api.list(pb.ListRequest())).revision
    await load(api, "good")
    await load(api, "other")
    latest = (await api.list(pb.ListRequest())).revision

    request = pb.WatchRequest(start_revision=listed + 1, instance_id=server.instance_id)
    revisions: list[int] = []
    models: set[str] = set()
    async with aclosing(api.watch(request)) as watch:
        async for event in watch:
            if event.HasField("changed"):
                revisions.append(event.revision)
                models.add(event.changed.model.id)
            if event.revision >= latest:
                break

    assert revisions == list(range(listed + 1, latest + 1))
    assert models == {"good", "other"}


async def test_list_returns_only_models_in_the_states_asked_for(api: ModelManagerApi) -> None:
    await load(api, "good")

    async def ids(*states: model_pb2.ModelState.ValueType) -> list[str]:
        return [model.id for model in (await api.list(pb.ListRequest(states=states))).models]

    rest = sorted(set(NAMES) - {"good"})
    assert await ids(model_pb2.MODEL_STATE_LOADED) == ["good"]
    assert await ids(model_pb2.MODEL_STATE_UNLOADED) == rest
    assert await ids(model_pb2.MODEL_STATE_LOADED, model_pb2.MODEL_STATE_UNLOADED) == sorted(NAMES)
    assert await ids(model_pb2.MODEL_STATE_FAILED) == []


async def test_logs_are_what_the_worker_wrote(api: ModelManagerApi) -> None:
    with pytest.raises(PaddockError):
        await load(api, "crashes")
    async with aclosing(api.stream_logs(pb.StreamLogsRequest(model="crashes"))) as batches:
        lines = [line async for batch in batches for line in batch.lines]

    assert any("about to fall over" in line.text for line in lines)
    assert all(line.pid and line.load_id for line in lines)


async def test_tokens_and_embeddings_come_from_the_worker(api: ModelManagerApi) -> None:
    await load(api, "good")
    tokens = await api.tokenize(pb.TokenizeRequest(model="good", text="hello"))
    text = await api.detokenize(pb.DetokenizeRequest(model="good", token_ids=tokens.token_ids))
    vectors = await api.embed(pb.EmbedRequest(model="good", texts=["a", "b"]))

    assert text.text == "hello"
    assert len(vectors.embeddings) == 2


async def test_tokenize_does_not_load(api: ModelManagerApi) -> None:
    with pytest.raises(PaddockError) as caught:
        await api.tokenize(pb.TokenizeRequest(model="good", text="hello"))

    assert caught.value.reason == Reason.MODEL_NOT_LOADED


async def test_the_server_describes_itself(api: ModelManagerApi) -> None:
    first = await api.get_server_info(pb.GetServerInfoRequest())
    second = await api.get_server_info(pb.GetServerInfoRequest())

    assert first.version
    assert first.instance_id == second.instance_id != ""
    assert "vision" not in first.features  # workers do not load projectors yet


async def test_an_estimate_says_what_a_load_would_take_without_starting_one(api: ModelManagerApi) -> None:
    estimate = await api.estimate_memory(pb.EstimateMemoryRequest(model="good"))
    model = (await api.get(pb.GetRequest(model="good"))).model

    (ram,) = [device for device in estimate.devices if device.device == "RAM"]
    assert ram.needed_bytes == sum(part.size_bytes for part in estimate.parts if part.device == "RAM")
    assert 0 < ram.needed_bytes < ram.budget_bytes
    assert estimate.verdict == pb.MEMORY_VERDICT_FITS
    assert (estimate.runtime_options.slot_count, estimate.roughness) == (2, "")
    assert model.state == model_pb2.MODEL_STATE_UNLOADED


async def test_an_estimate_counts_what_other_models_hold(api: ModelManagerApi) -> None:
    await load(api, "good")
    other = await api.estimate_memory(pb.EstimateMemoryRequest(model="other"))
    itself = await api.estimate_memory(pb.EstimateMemoryRequest(model="good"))

    assert other.devices[0].held_bytes > 0
    assert itself.devices[0].held_bytes == 0


async def test_an_estimate_with_an_open_context_chooses_the_trained_one(api: ModelManagerApi) -> None:
    options = model_pb2.RuntimeOptions(context_size_tokens=0, slot_count=3)
    estimate = await api.estimate_memory(pb.EstimateMemoryRequest(model="good", runtime_options=options))
    assert estimate.runtime_options.context_size_tokens == 2048
    assert estimate.runtime_options.slot_count == 3


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.EstimateMemoryRequest(), Reason.INVALID_FIELD),
        (pb.EstimateMemoryRequest(model="nobody"), Reason.MODEL_NOT_FOUND),
        (
            pb.EstimateMemoryRequest(
                model="good", runtime_options=model_pb2.RuntimeOptions(cache_type_k="q9")
            ),
            Reason.INVALID_FIELD,
        ),
    ],
    ids=["no name", "no model", "no such cache type"],
)
async def test_an_estimate_of_nothing_is_refused(
    api: ModelManagerApi, request_: pb.EstimateMemoryRequest, reason: Reason
) -> None:
    with pytest.raises(PaddockError) as caught:
        await api.estimate_memory(request_)
    assert caught.value.reason == reason


async def test_the_memory_of_the_machine_is_the_first_device(api: ModelManagerApi) -> None:
    info = await api.get_server_info(pb.GetServerInfoRequest())
    assert info.devices[0].display_name == "RAM"
    assert 0 < info.devices[0].free_bytes <= info.devices[0].total_bytes
