"""The whole server over real gRPC, with fake workers that are told to misbehave."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

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

NAMES = ("good", "other", "crashes", "refuses", "slow")


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
    model: str = "good", max_tokens: int = 4, **fields: pb.AutoloadPolicy.ValueType
) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt="hi", stop=gen.StopParams(max_tokens=max_tokens), **fields)


async def run(api: ModelManagerApi, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(api.generate(request)) as responses:
        return [response async for response in responses]


async def load(api: ModelManagerApi, model: str) -> list[pb.LoadResponse]:
    async with aclosing(api.load(pb.LoadRequest(model=model))) as responses:
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


async def test_what_is_not_built_yet_says_so(api: ModelManagerApi) -> None:
    with pytest.raises(PaddockError, match="--models-dir") as of_download:
        async with aclosing(api.download(pb.DownloadRequest(model="x"))) as responses:
            await anext(responses)
    with pytest.raises(PaddockError) as of_delete:
        await api.delete(pb.DeleteRequest(model="x"))

    assert of_download.value.reason == of_delete.value.reason == Reason.NOT_IMPLEMENTED
    assert of_download.value.code.name == "UNIMPLEMENTED"


async def test_the_server_describes_itself(api: ModelManagerApi) -> None:
    first = await api.get_server_info(pb.GetServerInfoRequest())
    second = await api.get_server_info(pb.GetServerInfoRequest())

    assert first.version
    assert first.instance_id == second.instance_id != ""
