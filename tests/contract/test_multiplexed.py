"""`MultiplexedApi` against the server and its fake workers: what `Generate` does, over one stream."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import httpx
import pytest

from paddock.errors import FieldViolation, PaddockError, Reason, make_error
from paddock.multiplexed import CREDIT, MAX_SHARED_REQUEST_BYTES, MultiplexedApi
from paddock.transport import SERVICE_NAME, GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_gateway.serve import serve
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from paddock_server.rpc.server import RpcServer
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.fakes.relay import relay
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

WAY_OUT_SECONDS: Final = 20.0

BEHAVIOURS: Final[dict[str, dict[str, Any]]] = {
    "quick": {"tokens_per_second": 1000.0},
    "paced": {"tokens_per_second": 100.0},
    "crashes": {"tokens_per_second": 100.0, "crash_after_tokens": 5, "crash_signal": "SIGSEGV"},
    "loops": {"crash_at": 0.5},
    "unsupported": {"fail_load_reason": "UNSUPPORTED_MODEL"},
    "corrupt": {"fail_load_reason": "MODEL_CORRUPT"},
    "short": {"context_size_tokens": 2},
    "template": {"fail_generate_reason": "TEMPLATE_ERROR", "fail_generate_field": "chat.messages"},
    "full": {"fail_generate_reason": "QUEUE_FULL"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, behaviour in BEHAVIOURS.items():
        make_noise(directory / f"{name}.gguf")
        write_sidecar(directory / f"{name}.gguf", **behaviour)
    return directory


@pytest.fixture
def config(models: Path) -> ServerConfig:
    values = {"models_dir": (models,), "grpc_port": 0, "state_dir": None, "drain_seconds": 20}
    return ServerConfig.load({**values, "parallel": 64, "queue_limit": 64, "models_max": 0})


@pytest.fixture
async def channel(config: ServerConfig) -> AsyncGenerator[grpc.aio.Channel]:
    async with serving(config, launcher=fake_launcher()) as server, connect(server.grpc_address) as channel:
        yield channel


@pytest.fixture
async def api(channel: grpc.aio.Channel) -> AsyncGenerator[MultiplexedApi]:
    async with MultiplexedApi(channel) as api:
        yield api


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def request(model: str = "quick", max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt="hi", stop=gen.StopParams(max_tokens=max_tokens), **fields)


async def run(api: ModelManagerApi, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with asyncio.timeout(WAY_OUT_SECONDS), aclosing(api.generate(request)) as responses:
        return [response async for response in responses]


async def error_of(api: ModelManagerApi, request: pb.GenerateRequest) -> tuple[list[str], PaddockError]:
    """Return the kinds of responses before the error, repeated ones once, and the error."""
    kinds: list[str] = []
    try:
        async with asyncio.timeout(WAY_OUT_SECONDS), aclosing(api.generate(request)) as responses:
            async for response in responses:
                kind = response.WhichOneof("event") or ""
                kinds += [kind] if kinds[-1:] != [kind] else []
    except PaddockError as error:
        return kinds, error
    pytest.fail(f"no error came, but {kinds}")


async def run_once_reachable(api: ModelManagerApi, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """Run as soon as the channel has noticed that its connection is gone and made another."""
    async with asyncio.timeout(WAY_OUT_SECONDS):
        while True:
            try:
                return await run(api, request)
            except PaddockError as error:
                if error.reason != Reason.SERVER_UNREACHABLE:
                    raise
            await asyncio.sleep(0.05)


def tokens(responses: list[pb.GenerateResponse]) -> int:
    return sum(delta.token_count for response in responses for delta in response.deltas.deltas)


def facts(error: PaddockError) -> dict[str, object]:
    """Return all that an error says, without what differs from one call to the next."""
    texts = {"type": type(error), "reason": error.reason, "code": error.code, "resource": error.resource}
    lists = {"violations": error.violations, "metadata": sorted(error.metadata)}
    return {**texts, **lists, "retry": error.retry_after_seconds is not None, "id": bool(error.request_id)}


async def test_the_responses_are_those_of_generate(channel: grpc.aio.Channel, api: MultiplexedApi) -> None:
    one = request(choice_count=2, report_prompt_progress=True)
    plain = await run(GrpcApi(channel), one)
    shared = await run(api, one)

    def kinds(responses: list[pb.GenerateResponse]) -> set[str | None]:
        return {response.WhichOneof("event") for response in responses}

    assert kinds(shared) == kinds(plain)
    assert (shared[0].WhichOneof("event"), shared[-1].WhichOneof("event")) == ("started", "generated")
    assert (shared[0].started.model, shared[0].started.load_id) == ("quick", plain[0].started.load_id)
    assert tokens(shared) == tokens(plain) == 16
    assert shared[-1].generated.usage == plain[-1].generated.usage


async def test_64_generations_at_once_each_get_all_their_tokens(api: MultiplexedApi) -> None:
    counts = range(20, 84)
    ends = await asyncio.gather(*(run(api, request(max_tokens=count)) for count in counts))

    assert [tokens(responses) for responses in ends] == list(counts)
    assert [one[-1].generated.usage.completion_tokens for one in ends] == list(counts)


ERRORS: Final[dict[str, pb.GenerateRequest]] = {
    "MODEL_NOT_FOUND": request("nowhere"),
    "INVALID_FIELD": request(sampling=gen.SamplingParams(top_p=2)),
    "MODEL_NOT_LOADED": request(autoload_policy=pb.AUTOLOAD_POLICY_FAIL),
    "WORKER_CRASHED": request("crashes"),
    "CRASH_LOOP": request("loops"),
    "UNSUPPORTED_MODEL": request("unsupported"),
    "MODEL_CORRUPT": request("corrupt"),
    "CONTEXT_LENGTH_EXCEEDED": request("short"),
    "TEMPLATE_ERROR": request("template"),
    "QUEUE_FULL": request("full"),
}


@pytest.mark.parametrize("reason", ERRORS)
async def test_an_error_of_the_server_is_the_one_generate_raises(
    channel: grpc.aio.Channel, api: MultiplexedApi, reason: str
) -> None:
    plain_kinds, plain = await error_of(GrpcApi(channel), ERRORS[reason])
    kinds, shared = await error_of(api, ERRORS[reason])

    assert (kinds, facts(shared)) == (plain_kinds, facts(plain))
    assert shared.reason == reason
    # The stream goes on.
    assert tokens(await run(api, request())) == 8


class RaisingService:
    """Raises the error whose reason is the model's name, after `started` when `max_tokens` is set."""

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        if request.stop.max_tokens:
            yield pb.GenerateResponse(started=pb.Started(generation_id="g"))
        raise make_error(
            request.model,
            f"A sentence about {request.model}.",
            metadata={"model": "m", "needed_bytes": "12"},
            violations=[FieldViolation("sampling.top_p", "must be at most 1")],
            resource="m",
            retry_after_seconds=2.5,
        )


@asynccontextmanager
async def raising_server() -> AsyncGenerator[grpc.aio.Channel]:
    untyped: Any = RaisingService()
    server = RpcServer(untyped, host="127.0.0.1", port=0, with_reflection=False)
    await server.start()
    async with connect(server.address) as channel:
        yield channel
    await server.stop(0)


async def test_every_row_of_the_error_table_arrives_as_from_generate() -> None:
    async with raising_server() as channel, MultiplexedApi(channel) as api:
        for reason in Reason:
            for max_tokens in (None, 1):
                one = pb.GenerateRequest(model=reason, stop=gen.StopParams(max_tokens=max_tokens))
                plain_kinds, plain = await error_of(GrpcApi(channel), one)
                kinds, shared = await error_of(api, one)
                assert (kinds, facts(shared)) == (plain_kinds, facts(plain))
                assert (shared.message, shared.metadata) == (plain.message, plain.metadata)
                assert shared.retry_after_seconds == 2.5


async def test_leaving_a_generation_stops_it_and_only_it(api: MultiplexedApi) -> None:
    other = asyncio.create_task(run(api, request("paced", 60)))
    async with aclosing(api.generate(request("paced", 100_000))) as responses:
        await anext(responses)
        await anext(responses)
    # Waits for what runs, so it would not return before its time-out if the first still did.
    unloading = asyncio.create_task(api.unload(pb.UnloadRequest(model="paced")))

    assert tokens(await other) == 60
    assert (await unloading).aborted_request_count == 0


async def test_a_crash_ends_the_generations_of_its_worker_alone(api: MultiplexedApi) -> None:
    others = [asyncio.create_task(run(api, request("paced", 50))) for _ in range(4)]
    crashed = await asyncio.gather(*(error_of(api, request("crashes", 50)) for _ in range(4)))

    assert {error.reason for _, error in crashed} == {Reason.WORKER_CRASHED}
    assert [tokens(await other) for other in others] == [50] * 4


async def test_unloading_by_force_ends_what_runs_on_the_model(api: MultiplexedApi) -> None:
    running = asyncio.create_task(error_of(api, request("paced", 100_000)))
    other = asyncio.create_task(run(api, request("quick", 300)))
    await run(api, request("paced", 5))
    await api.unload(pb.UnloadRequest(model="paced", mode=pb.UNLOAD_MODE_FORCE))

    kinds, error = await running
    assert (kinds[0], error.reason) == ("started", Reason.MODEL_UNLOADED)
    assert tokens(await other) == 300


async def test_a_reader_that_stands_still_stops_nobody_and_loses_nothing(api: MultiplexedApi) -> None:
    async with aclosing(api.generate(request(max_tokens=500))) as slow:
        first = await anext(slow)
        # The fake makes a token of each a step: when this one has 500, so has the first.
        assert tokens(await run(api, request(max_tokens=500))) == 500
        rest = [response async for response in slow]

    assert first.HasField("started")
    assert tokens(rest) == 500
    # The credit, and after it what had been merged meanwhile.
    assert len(rest) < CREDIT + 20


async def test_a_stream_that_breaks_fails_what_ran_on_it_and_is_opened_again(config: ServerConfig) -> None:
    async with (
        serving(config, launcher=fake_launcher()) as server,
        relay(server.grpc_address) as network,
        connect(network.address) as channel,
        MultiplexedApi(channel) as api,
    ):
        running = [asyncio.create_task(error_of(api, request("paced", 100_000))) for _ in range(3)]
        await run(api, request("paced", 10))
        network.cut()
        ends = [await task for task in running]
        again = await run_once_reachable(api, request("paced", 3))
        # What ran on the broken stream was stopped: a model in use would not unload before its time-out.
        unloaded = await api.unload(pb.UnloadRequest(model="paced"))

    assert [error.reason for _, error in ends] == [Reason.SERVER_UNREACHABLE] * 3
    assert all(kinds[0] == "started" and error.request_id for kinds, error in ends)
    assert tokens(again) == 3
    assert unloaded.aborted_request_count == 0


async def test_without_a_server_the_error_is_the_one_of_generate(unused_port: int) -> None:
    async with connect(f"127.0.0.1:{unused_port}") as channel, MultiplexedApi(channel) as api:
        _, plain = await error_of(GrpcApi(channel), request())
        _, shared = await error_of(api, request())

    assert (shared.reason, shared.code) == (plain.reason, plain.code)
    assert shared.reason == Reason.SERVER_UNREACHABLE


class OlderServer(grpc.GenericRpcHandler):
    """Knows `Generate` and nothing newer. Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        self.asked.append(method.rpartition("/")[2])
        if method != f"/{SERVICE_NAME}/Generate":
            return None
        return grpc.unary_stream_rpc_method_handler(
            self._generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
        )

    async def _generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[pb.GenerateResponse]:
        del context
        yield pb.GenerateResponse(started=pb.Started(model=request.model))
        for _ in range(request.stop.max_tokens):
            yield pb.GenerateResponse(deltas=pb.Deltas(deltas=[gen.Delta(token_count=1)]))
        yield pb.GenerateResponse(generated=pb.Generated())


async def test_an_older_server_gets_a_generate_per_generation_from_then_on() -> None:
    older = OlderServer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((older,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(f"127.0.0.1:{port}") as channel, MultiplexedApi(channel) as api:
        at_once = await asyncio.gather(*(run(api, request(max_tokens=count)) for count in (3, 4, 5)))
        later = await run(api, request(max_tokens=6))
    await server.stop(0)

    assert [tokens(one) for one in (*at_once, later)] == [3, 4, 5, 6]
    assert sorted(older.asked) == ["Generate"] * 4 + ["GenerateMany"]


async def test_closing_the_api_ends_what_runs_and_refuses_more(channel: grpc.aio.Channel) -> None:
    api = MultiplexedApi(channel)
    running = asyncio.create_task(error_of(api, request("paced", 100_000)))
    await run(api, request("paced", 3))
    await api.close()

    assert (await running)[1].reason == Reason.CANCELLED
    assert (await error_of(api, request()))[1].reason == Reason.CANCELLED


async def test_a_large_request_does_not_share_the_stream(channel: grpc.aio.Channel) -> None:
    async with MultiplexedApi(channel) as api:
        large = request("quick", 4)
        large.prompt = "x" * MAX_SHARED_REQUEST_BYTES
        _, error = await error_of(api, large)

        assert error.reason == Reason.CONTEXT_LENGTH_EXCEEDED
        assert api._stream is None


async def test_a_gateway_in_front_of_it_streams_and_stops_what_nobody_reads(api: MultiplexedApi) -> None:
    body = {"model": "paced", "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}

    async def stream(client: httpx.AsyncClient, max_tokens: int) -> str:
        response = await client.post("/v1/completions", json={**body, "max_tokens": max_tokens})
        return response.text

    async with serve(api, port=0) as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        texts = await asyncio.gather(*(stream(client, count) for count in range(10, 18)))
        forever = {**body, "max_tokens": 100_000}
        async with client.stream("POST", "/v1/completions", json=forever) as response:
            await anext(response.aiter_bytes())
        unloaded = await api.unload(pb.UnloadRequest(model="paced"))

    for count, text in zip(range(10, 18), texts, strict=True):
        assert f'"completion_tokens":{count}' in text
        assert "data: [DONE]" in text
    assert unloaded.aborted_request_count == 0
