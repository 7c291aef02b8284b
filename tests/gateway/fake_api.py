"""A `ModelManagerApi` in memory whose generations do what a test tells them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.duration_pb2 import Duration

from paddock.api import request_id
from paddock.errors import ModelNotFoundError, Reason, make_error
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    Behaviour = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse]]

MODEL = "tiny"
LOAD_ID = "load-1"


def started(generation_id: str = "g1", prompt_tokens: int = 7, model: str = MODEL) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            generation_id=generation_id, load_id=LOAD_ID, prompt_tokens=prompt_tokens, model=model
        )
    )


def deltas(*parts: gen.Delta) -> pb.GenerateResponse:
    return pb.GenerateResponse(deltas=pb.Deltas(deltas=parts))


def text(text: str, choice: int = 0, tokens: int = 1) -> gen.Delta:
    return gen.Delta(choice_index=choice, text=text, token_count=tokens)


def end(
    reason: gen.FinishReason.ValueType = gen.FINISH_REASON_STOP, choice: int = 0, text: str = ""
) -> gen.Delta:
    return gen.Delta(choice_index=choice, text=text, finish_reason=reason)


def generated(prompt: int = 7, completion: int = 2, cached: int = 3) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        generated=pb.Generated(
            usage=gen.Usage(prompt_tokens=prompt, cached_prompt_tokens=cached, completion_tokens=completion),
            timings=gen.Timings(
                prompt_duration=Duration(nanos=8_000_000), generation_duration=Duration(nanos=10_000_000)
            ),
            seed=11,
        )
    )


def saying(*texts: str, reason: gen.FinishReason.ValueType = gen.FINISH_REASON_STOP) -> Behaviour:
    """Every choice says the same texts, a token each, and ends."""

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        choices = range(request.choice_count or 1)
        yield started()
        for part in texts:
            await asyncio.sleep(0)
            yield deltas(*(text(part, choice) for choice in choices))
        yield deltas(*(end(reason, choice) for choice in choices))
        yield generated(completion=len(texts) * len(choices))

    return behave


def playing(*responses: pb.GenerateResponse) -> Behaviour:
    """Every generation is exactly these events."""

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        for response in responses:
            await asyncio.sleep(0)
            yield response

    return behave


def failing(error: BaseException, *before: pb.GenerateResponse) -> Behaviour:
    """Every generation fails after these events."""

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        for response in before:
            await asyncio.sleep(0)
            yield response
        raise error

    return behave


def hanging(*before: pb.GenerateResponse) -> Behaviour:
    """Every generation stops after these events without ending, until it is cancelled."""

    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        for response in before:
            await asyncio.sleep(0)
            yield response
        await asyncio.Event().wait()

    return behave


class FakeApi:
    """The service. `requests` and the counters say what reached it."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or saying("Hello", " there")
        self.models = {
            MODEL: model_pb2.Model(id=MODEL, state=model_pb2.MODEL_STATE_LOADED),
            "org/repo:Q4": model_pb2.Model(id="org/repo:Q4", state=model_pb2.MODEL_STATE_UNLOADED),
        }
        self.requests: list[pb.GenerateRequest] = []
        self.request_ids: list[str] = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        """Generations that were given up before they ended."""
        self.changed = asyncio.Event()
        """Set whenever a generation begins or ends."""
        self.health_error: Exception | None = None

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """Play the behaviour and take note of how it ends."""
        self.requests.append(request)
        self.request_ids.append(request_id.get())
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        self.changed.set()
        try:
            async with aclosing(self.behaviour(request)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something about the counters to come true."""
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """Answer one model per page, to see that all pages are read."""
        ids = sorted(self.models)
        index = int(request.page_token or 0)
        more = str(index + 1) if index + 1 < len(ids) else ""
        models = [self.models[ids[index]]] if ids else []
        return pb.ListResponse(models=models, next_page_token=more)

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        """Answer one model."""
        if request.model not in self.models:
            raise ModelNotFoundError.of(request.model)
        return pb.GetResponse(model=self.models[request.model])

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """Answer, or fail with `health_error`."""
        del request
        if self.health_error is not None:
            raise self.health_error
        return pb.GetServerInfoResponse(version="test")

    async def sleep(self, request: pb.SleepRequest) -> pb.SleepResponse:
        """Not for gateways."""
        _unused(request)

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Not for gateways."""
        _unused(request)

    async def estimate_memory(self, request: pb.EstimateMemoryRequest) -> pb.EstimateMemoryResponse:
        """Not for gateways."""
        _unused(request)

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """Not for gateways."""
        _unused(request)

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Not for gateways."""
        _unused(request)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Not for gateways."""
        _unused(request)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Not for gateways."""
        _unused(request)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Not for gateways."""
        _unused(request)

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """Not for gateways."""
        _unused(request)

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Not for gateways."""
        _unused(request)

    def load(self, request: pb.LoadRequest) -> AsyncGenerator[pb.LoadResponse]:
        """Not for gateways."""
        _unused(request)

    def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Not for gateways."""
        _unused(request)

    def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Not for gateways."""
        _unused(request)

    def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """Not for gateways."""
        _unused(request)


def _unused(request: object) -> NoReturn:
    raise make_error(Reason.NOT_IMPLEMENTED, f"No gateway calls this: {request!r}")
