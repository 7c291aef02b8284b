"""A real server with its gateway, real llama.cpp, real clients: what must hold whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import AsyncOpenAI, OpenAI

from paddock.errors import ModelNotFoundError, PaddockError, Reason
from paddock.transport import SERVICE_NAME, GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.servers import ServerProcess, paddock_gateway, paddock_up

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from openai.types.chat import ChatCompletionMessageParam

    from paddock.api import ModelManagerApi

MODEL = "noise"
OTHER = "noise-b"

HEALTH: Any = health_pb2_grpc  # the stub package knows only the synchronous stub


@pytest.fixture
def own_server(models_dir: Path, tmp_path: Path) -> Generator[ServerProcess]:
    """A server for one test that does it harm."""
    with paddock_up(models_dir, tmp_path / "log.jsonl", "--parallel", "8") as running:
        yield running


@pytest.fixture(scope="session")
def standalone_gateway(
    real_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Generator[ServerProcess]:
    """A gateway in a process of its own, in front of the shared server."""
    log = tmp_path_factory.mktemp("gateway") / "log.jsonl"
    with paddock_gateway(real_server.grpc_address, log) as running:
        yield running


@pytest.fixture(params=["embedded", "standalone"])
def http_url(request: pytest.FixtureRequest) -> str:
    """Root of a gateway's routes, of either kind."""
    name = {"embedded": "real_server", "standalone": "standalone_gateway"}[request.param]
    gateway: ServerProcess = request.getfixturevalue(name)
    return gateway.http_url


@pytest.fixture
async def api(real_server: ServerProcess) -> AsyncGenerator[ModelManagerApi]:
    async with connect(real_server.grpc_address) as channel:
        yield GrpcApi(channel)


def request(max_tokens: int, model: str = MODEL, *, ignore_eos: bool = False) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        prompt="one two three",
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
    )


async def text_of(api: ModelManagerApi, request: pb.GenerateRequest) -> str:
    text = ""
    async with aclosing(api.generate(request)) as responses:
        async for response in responses:
            text += "".join(delta.text for delta in response.deltas.deltas)
    return text


async def load(api: ModelManagerApi, model: str = MODEL) -> list[pb.LoadResponse]:
    async with aclosing(api.load(pb.LoadRequest(model=model))) as responses:
        return [response async for response in responses]


async def test_a_load_streams_progress_that_never_goes_back_and_ends_with_loaded(
    api: ModelManagerApi,
) -> None:
    await api.unload(pb.UnloadRequest(model=MODEL))

    responses = await load(api)

    assert responses[-1].loaded.model.state == model_pb2.MODEL_STATE_LOADED
    assert all(response.HasField("progress") for response in responses[:-1])
    stages = [response.progress.stage for response in responses[:-1]]
    assert stages == sorted(stages)
    assert {pb.STAGE_SPAWN, pb.STAGE_WEIGHTS, pb.STAGE_WARMUP} <= set(stages)
    weights = [r.progress.advanced for r in responses[:-1] if r.progress.stage == pb.STAGE_WEIGHTS]
    fractions = [advanced.fraction for advanced in weights if advanced.HasField("fraction")]
    assert fractions == sorted(fractions)
    finished = {r.progress.stage for r in responses[:-1] if r.progress.HasField("finished")}
    assert finished == set(stages)


async def test_ten_loads_of_one_model_are_one_worker_and_ten_equal_ends(
    api: ModelManagerApi, real_server: ServerProcess
) -> None:
    await api.unload(pb.UnloadRequest(model=MODEL))
    before = {worker.pid for worker in real_server.workers()}

    ends = [responses[-1] for responses in await asyncio.gather(*(load(api) for _ in range(10)))]

    assert {end.loaded.model.state for end in ends} == {model_pb2.MODEL_STATE_LOADED}
    assert len({end.loaded.model.load_id for end in ends}) == 1
    assert len({end.SerializeToString(deterministic=True) for end in ends}) == 1
    assert len({worker.pid for worker in real_server.workers()} - before) == 1


async def test_a_request_loads_its_model_and_streams(api: ModelManagerApi) -> None:
    await api.unload(pb.UnloadRequest(model=MODEL))

    async with aclosing(api.generate(request(8))) as responses:
        received = [response async for response in responses]

    kinds = [response.WhichOneof("event") for response in received]
    assert kinds[0] == "started"
    assert kinds[-1] == "generated"
    assert set(kinds[1:-1]) == {"deltas"}
    assert received[0].started.model == MODEL
    assert received[-1].generated.usage.completion_tokens <= 8
    assert received[-1].generated.timings.load_duration.ToNanoseconds() > 0


async def test_many_greedy_streams_at_once_give_what_one_gives_alone(api: ModelManagerApi) -> None:
    alone = await text_of(api, request(48))

    together = await asyncio.gather(*(text_of(api, request(48)) for _ in range(32)))

    assert set(together) == {alone}


async def test_an_unknown_model_is_not_found_and_never_another_one(api: ModelManagerApi) -> None:
    with pytest.raises(ModelNotFoundError):
        await text_of(api, request(4, model="no-such-model"))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_the_openai_sdk_works_unchanged(http_url: str, stream: bool, chat: bool) -> None:
    async with AsyncOpenAI(base_url=f"{http_url}/v1", api_key="none") as client:
        text, finish_reason = await _ask(client, stream=stream, chat=chat)

    assert text
    assert finish_reason in ("stop", "length")


async def _ask(client: AsyncOpenAI, *, stream: bool, chat: bool) -> tuple[str, str | None]:
    text, finish_reason = "", None
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    if chat and stream:
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=12, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
            finish_reason = chunk.choices[0].finish_reason
    elif chat:
        answer = await client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=12
        )
        text, finish_reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    elif stream:
        async for part in await client.completions.create(
            model=MODEL, prompt="hello", max_tokens=12, stream=True
        ):
            text += part.choices[0].text
            finish_reason = part.choices[0].finish_reason
    else:
        done = await client.completions.create(model=MODEL, prompt="hello", max_tokens=12)
        text, finish_reason = done.choices[0].text, done.choices[0].finish_reason
    return text, finish_reason


def test_either_gateway_and_grpc_give_the_same_greedy_text(
    real_server: ServerProcess, standalone_gateway: ServerProcess
) -> None:
    def over_http(gateway: ServerProcess) -> str:
        with OpenAI(base_url=f"{gateway.http_url}/v1", api_key="none") as client:
            done = client.completions.create(
                model=MODEL, prompt="one two three", max_tokens=24, temperature=0
            )
        return done.choices[0].text

    async def over_grpc() -> str:
        async with connect(real_server.grpc_address) as channel:
            return await text_of(GrpcApi(channel), request(24))

    embedded = over_http(real_server)

    assert embedded
    assert embedded == over_http(standalone_gateway) == asyncio.run(over_grpc())


async def test_killing_a_worker_ends_its_streams_at_once_and_the_next_request_is_served(
    own_server: ServerProcess,
) -> None:
    async with connect(own_server.grpc_address) as channel:
        api = GrpcApi(channel)
        await load(api)
        (worker,) = own_server.workers()
        streams = [api.generate(request(100_000, ignore_eos=True)) for _ in range(8)]
        for stream in streams:
            while not (await anext(stream)).HasField("deltas"):
                pass
        worker.kill()
        killed = time.monotonic()
        ends = await asyncio.gather(*(_end_of(stream) for stream in streams))
        waited = time.monotonic() - killed
        models = {model.id: model for model in (await api.list(pb.ListRequest())).models}
        served = await text_of(api, request(8))

    assert ends == [(Reason.WORKER_CRASHED, grpc.StatusCode.UNAVAILABLE)] * 8
    assert waited < 10  # a way out, not a measurement: the note has the figure
    assert models[MODEL].last_failure.reason == Reason.WORKER_CRASHED
    assert models[MODEL].last_failure.signal == "SIGKILL"
    assert served


async def _end_of(stream: AsyncGenerator[pb.GenerateResponse]) -> tuple[str, grpc.StatusCode | None]:
    try:
        async for _ in stream:
            pass
    except PaddockError as error:
        call = error.__cause__  # what came over the wire; `error.code` could be the table's
        return error.reason, call.code() if isinstance(call, grpc.aio.AioRpcError) else None
    return "ended well", None


async def test_a_client_that_goes_away_frees_its_slot(own_server: ServerProcess) -> None:
    async with connect(own_server.grpc_address) as channel:
        api = GrpcApi(channel)
        async with aclosing(api.generate(request(100_000, ignore_eos=True))) as stream:
            async for response in stream:
                if response.HasField("deltas"):
                    break

        async def idle() -> bool:
            model = (await api.get(pb.GetRequest(model=MODEL))).model
            return model.worker.active_request_count == 0

        for _ in range(600):
            if await idle():
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("the slot was not freed")


def test_killing_the_server_leaves_no_worker(own_server: ServerProcess) -> None:
    asyncio.run(_load_in(own_server))
    workers = own_server.workers()
    assert workers

    own_server.process.kill()
    own_server.process.wait(30)

    _, alive = psutil.wait_procs(workers, timeout=2)
    assert not alive


def test_sigterm_lets_running_streams_finish_and_exits_with_zero(own_server: ServerProcess) -> None:
    async def stream_through_the_stop() -> tuple[str, int]:
        async with connect(own_server.grpc_address) as channel:
            api = GrpcApi(channel)
            await load(api)
            tokens, end = 0, ""
            async with aclosing(api.generate(request(400, ignore_eos=True))) as stream:
                async for response in stream:
                    if tokens == 0 and response.HasField("deltas"):
                        os.kill(own_server.process.pid, signal.SIGTERM)
                    tokens += sum(delta.token_count for delta in response.deltas.deltas)
                    end = response.WhichOneof("event") or ""
            return end, tokens

    end, tokens = asyncio.run(stream_through_the_stop())

    assert own_server.process.wait(60) == 0
    assert (end, tokens) == ("generated", 400)


async def test_a_stopping_server_refuses_new_work_and_turns_its_health(own_server: ServerProcess) -> None:
    async with connect(own_server.grpc_address) as channel:
        api = GrpcApi(channel)
        health: Any = HEALTH.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        before = await health.read()
        async with aclosing(api.generate(request(1500, ignore_eos=True))) as stream:
            while not (await anext(stream)).HasField("deltas"):
                pass
            os.kill(own_server.process.pid, signal.SIGTERM)
            after = await health.read()
            health.cancel()  # or the server would wait for it
            with pytest.raises(PaddockError) as caught:
                await text_of(api, request(4, model=OTHER))
            rest = [response.WhichOneof("event") async for response in stream]

    assert before.status == health_pb2.HealthCheckResponse.SERVING
    assert after.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert caught.value.reason in (Reason.SHUTTING_DOWN, Reason.SERVER_UNREACHABLE)
    assert caught.value.code.name == grpc.StatusCode.UNAVAILABLE.name
    assert (rest[0], rest[-1]) == ("deltas", "generated")


async def _load_in(server: ServerProcess) -> None:
    async with connect(server.grpc_address) as channel:
        await load(GrpcApi(channel))
