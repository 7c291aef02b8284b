"""The service itself: what every RPC does, free of any transport.

Satisfies `paddock.api.ModelManagerApi`, so an embedded gateway calls it directly. The gRPC servicer in
`paddock_server.rpc.servicer` adds nothing but the wire.
"""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc import validate
from paddock_server.rpc.defaults import with_defaults
from paddock_server.rpc.estimates import devices, estimate_memory
from paddock_server.rpc.paging import page
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from google.protobuf.duration_pb2 import Duration

    from paddock_server.manager import Lease, ModelManager
    from paddock_server.memory import MachineWatch

RequestT = TypeVar("RequestT", pb.GenerateRequest, pb.EmbedRequest, pb.TokenizeRequest, pb.DetokenizeRequest)

FEATURES: Final = ("downloads", "embeddings", "estimate", "logs", "tokenize")
"""Optional features `GetServerInfo` reports."""


class ModelManagerService:
    """Implements every RPC of `ModelManager` on top of the manager."""

    def __init__(self, manager: ModelManager, *, version: str, machine: MachineWatch) -> None:
        """`machine` says what there is of memory and accelerators."""
        self._manager = manager
        self._machine = machine
        self._version = version
        self._start_time = Timestamp()
        self._start_time.GetCurrentTime()

    async def load(self, request: pb.LoadRequest) -> AsyncGenerator[pb.LoadResponse]:
        """See `ModelManagerApi.load`."""
        validate.load(request)
        structlog.contextvars.bind_contextvars(model=request.model)
        async with aclosing(self._manager.subscribe_load(request)) as responses:
            async for response in responses:
                yield response

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """See `ModelManagerApi.unload`."""
        validate.unload(request)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await self._manager.unload(request)

    async def sleep(self, request: pb.SleepRequest) -> pb.SleepResponse:
        """See `ModelManagerApi.sleep`."""
        validate.model_name(request.model)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await self._manager.sleep(request)

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """See `ModelManagerApi.pin`."""
        validate.model_name(request.model)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await self._manager.pin(request)

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """See `ModelManagerApi.list`."""
        validate.list_models(request)
        return page(request, self._manager.listing())

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        """See `ModelManagerApi.get`."""
        validate.model_name(request.model)
        return pb.GetResponse(model=await self._manager.snapshot(request.model))

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """See `ModelManagerApi.watch`."""
        async with aclosing(self._manager.watch(request)) as responses:
            async for response in responses:
                yield response

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """See `ModelManagerApi.generate`."""
        asked_for = request.model
        request = self._addressed(request)
        validate.generate(request)
        generation_id = uuid.uuid4().hex
        structlog.contextvars.bind_contextvars(model=request.model, generation_id=generation_id)
        begin = time.monotonic()
        lease = await self._manager.acquire(
            request.model, request.autoload_policy, _seconds(request.keep_alive)
        )
        request = with_defaults(request, self._manager.request_defaults(asked_for))
        async with lease, lease.worker.generate(request) as generation:
            structlog.contextvars.bind_contextvars(model=lease.model_id, load_id=lease.load_id)
            waiting_for_text = True
            async for update in generation:
                if waiting_for_text and update.HasField("deltas"):
                    waiting_for_text = False
                    structlog.contextvars.bind_contextvars(
                        ttft_ms=round((time.monotonic() - begin) * 1000, 1)
                    )
                for response in _responses(update, generation_id, lease):
                    yield response

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """See `ModelManagerApi.embed`."""
        request = self._addressed(request)
        validate.embed(request)
        keep_alive = _seconds(request.keep_alive)
        async with await self._lease(request.model, request.autoload_policy, keep_alive) as lease:
            reply = await lease.worker.call(worker_pb2.Call(embed=request))
        structlog.contextvars.bind_contextvars(prompt_tokens=reply.embed.usage.prompt_tokens)
        return reply.embed

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """See `ModelManagerApi.tokenize`."""
        request = self._addressed(request)
        validate.model_name(request.model)
        async with await self._lease(request.model, pb.AUTOLOAD_POLICY_FAIL) as lease:
            reply = await lease.worker.call(worker_pb2.Call(tokenize=request))
        return reply.tokenize

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """See `ModelManagerApi.detokenize`."""
        request = self._addressed(request)
        validate.detokenize(request)
        async with await self._lease(request.model, pb.AUTOLOAD_POLICY_FAIL) as lease:
            reply = await lease.worker.call(worker_pb2.Call(detokenize=request))
        return reply.detokenize

    async def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """See `ModelManagerApi.stream_logs`."""
        validate.stream_logs(request)
        structlog.contextvars.bind_contextvars(model=request.model)
        async with aclosing(self._manager.stream_logs(request)) as responses:
            async for response in responses:
                yield response

    async def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """See `ModelManagerApi.download`."""
        validate.download(request)
        structlog.contextvars.bind_contextvars(model=request.model or request.source.hugging_face.repo_id)
        async with aclosing(self._manager.hub.download(request)) as responses:
            async for response in responses:
                yield response

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """See `ModelManagerApi.stop_download`."""
        validate.stop_download(request)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await self._manager.hub.stop_download(request)

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """See `ModelManagerApi.delete`."""
        validate.model_name(request.model)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await self._manager.hub.delete(request)

    async def estimate_memory(self, request: pb.EstimateMemoryRequest) -> pb.EstimateMemoryResponse:
        """See `ModelManagerApi.estimate_memory`."""
        validate.model_name(request.model)
        structlog.contextvars.bind_contextvars(model=request.model)
        return await estimate_memory(request, self._manager, self._machine)

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """See `ModelManagerApi.reload`."""
        del request
        return await self._manager.reload()

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """See `ModelManagerApi.get_server_info`."""
        del request
        return pb.GetServerInfoResponse(
            version=self._version,
            instance_id=self._manager.instance_id,
            start_time=self._start_time,
            features=FEATURES,
            devices=devices(await self._machine.look(), self._manager),
        )

    def _addressed(self, request: RequestT) -> RequestT:
        """Give a request that names no model the default model, if there is one."""
        default = "" if request.model else self._manager.default_model()
        if not default:
            return request
        addressed = type(request)()
        addressed.CopyFrom(request)
        addressed.model = default
        return addressed

    async def _lease(
        self, model: str, autoload_policy: pb.AutoloadPolicy.ValueType, keep_alive_seconds: float = 0.0
    ) -> Lease:
        structlog.contextvars.bind_contextvars(model=model)
        lease = await self._manager.acquire(model, autoload_policy, keep_alive_seconds)
        structlog.contextvars.bind_contextvars(model=lease.model_id, load_id=lease.load_id)
        return lease


def _responses(
    update: worker_pb2.GenerationUpdate, generation_id: str, lease: Lease
) -> list[pb.GenerateResponse]:
    """Turn one update of a worker into the messages a caller sees, in the order of the stream's grammar."""
    responses: list[pb.GenerateResponse] = []
    if update.HasField("started"):
        started = pb.Started(
            generation_id=generation_id,
            load_id=lease.load_id,
            prompt_tokens=update.started.prompt_tokens,
            model=lease.model_id,
        )
        responses.append(pb.GenerateResponse(started=started))
    if update.HasField("prompt_progress"):
        responses.append(pb.GenerateResponse(prompt_progress=update.prompt_progress))
    if update.HasField("deltas"):
        responses.append(pb.GenerateResponse(deltas=update.deltas))
    if update.HasField("finished"):
        finished = update.finished
        generated = pb.Generated(usage=finished.usage, timings=finished.timings, seed=finished.seed)
        if lease.load_wait_seconds > 0:
            generated.timings.load_duration.FromNanoseconds(int(lease.load_wait_seconds * 1e9))
        structlog.contextvars.bind_contextvars(
            prompt_tokens=finished.usage.prompt_tokens,
            completion_tokens=finished.usage.completion_tokens,
            load_ms=_milliseconds(generated.timings.load_duration),
            queue_ms=_milliseconds(generated.timings.queue_duration),
            prompt_ms=_milliseconds(generated.timings.prompt_duration),
            generation_ms=_milliseconds(generated.timings.generation_duration),
        )
        responses.append(pb.GenerateResponse(generated=generated))
    return responses


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _milliseconds(duration: Duration) -> float:
    return round(duration.ToNanoseconds() / 1e6, 1)
