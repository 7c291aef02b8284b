"""`ModelManagerApi` over a gRPC channel."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import uuid4

import grpc
import grpc.aio

from paddock.api import request_id
from paddock.status import from_rpc_error
from paddock.v1 import model_manager_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock.v1 import model_manager_pb2 as pb

    RequestT = TypeVar("RequestT")
    ResponseT = TypeVar("ResponseT")

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata key of the request identifier."""

SERVICE_NAME: Final = "paddock.v1.ModelManager"

MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""What the server takes."""

MAX_RESPONSE_BYTES: Final = 4 * 1024 * 1024
"""gRPC's default, written out because the API rests on it (64 texts per Embed)."""

_KEEPALIVE_TIME_MS: Final = 20_000
_KEEPALIVE_TIMEOUT_MS: Final = 10_000

_READ_ONLY_METHODS: Final = ("List", "Get", "Tokenize", "Detokenize", "GetServerInfo")
"""Unary methods with `idempotency_level = NO_SIDE_EFFECTS`: the ones that may be sent twice."""

_SERVICE_CONFIG: Final[dict[str, object]] = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE_NAME, "method": method} for method in _READ_ONLY_METHODS],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

CHANNEL_OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # A load or a watch may be silent for minutes; pings find out that the other machine is gone. The server
    # has to allow them: its `grpc.http2.min_recv_ping_interval_without_data_ms` is below the time here.
    ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that has just been started is tried again soon, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The environment's HTTP proxy is for the internet, not for a server that listens on loopback.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


def connect(target: str) -> grpc.aio.Channel:
    """Return a channel to a server. It connects on first use and again whenever the connection breaks.

    Args:
        target: `host:port`, or any other gRPC name, for example `unix:/run/paddock.sock`.
    """
    return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)


class GrpcApi:
    """`paddock.api.ModelManagerApi` over a channel, which stays the caller's to close.

    Every call carries `paddock.api.request_id`, or an identifier of its own when none is set, and raises
    `PaddockError`. Closing a stream cancels its call.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = model_manager_pb2_grpc.ModelManagerStub(channel)

    def load(self, request: pb.LoadRequest) -> AsyncGenerator[pb.LoadResponse]:
        """Load a model: `progress* loaded`. Closing detaches, the load goes on."""
        return _stream(self._stub.Load, request)

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Unload a model; returns once its worker has exited."""
        return await _unary(self._stub.Unload, request)

    async def sleep(self, request: pb.SleepRequest) -> pb.SleepResponse:
        """Have a loaded model give its memory back; returns once it has."""
        return await _unary(self._stub.Sleep, request)

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Pin a model, or take the pin off."""
        return await _unary(self._stub.Pin, request)

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """List models, ordered by id."""
        return await _unary(self._stub.List, request)

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        """Return one model."""
        return await _unary(self._stub.Get, request)

    def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Stream changes until closed: `changed* synced (changed | deleted | synced)*`."""
        return _stream(self._stub.Watch, request)

    def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """Generate: `started prompt_progress* deltas* generated`. Closing stops the generation."""
        return _stream(self._stub.Generate, request)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Compute embeddings."""
        return await _unary(self._stub.Embed, request)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Convert text to token ids."""
        return await _unary(self._stub.Tokenize, request)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Convert token ids to text."""
        return await _unary(self._stub.Detokenize, request)

    def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream the log lines of a model's workers."""
        return _stream(self._stub.StreamLogs, request)

    def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """Download a model without loading it: `progress* downloaded`."""
        return _stream(self._stub.Download, request)

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """Pause or cancel a download."""
        return await _unary(self._stub.StopDownload, request)

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Delete the local files of a model."""
        return await _unary(self._stub.Delete, request)

    async def estimate_memory(self, request: pb.EstimateMemoryRequest) -> pb.EstimateMemoryResponse:
        """Say what a model would take in memory, without loading it."""
        return await _unary(self._stub.EstimateMemory, request)

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """See `ModelManagerApi.reload`."""
        return await _unary(self._stub.Reload, request)

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """Describe the server."""
        return await _unary(self._stub.GetServerInfo, request)


def _metadata() -> tuple[tuple[str, str]]:
    return ((REQUEST_ID_KEY, request_id.get() or uuid4().hex),)


async def _unary(
    method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT
) -> ResponseT:
    try:
        return await method(request, metadata=_metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def _stream(
    method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT], request: RequestT
) -> AsyncGenerator[ResponseT]:
    call = method(request, metadata=_metadata())
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        # Leaving an `async for` does not cancel the call: the server would go on generating into a slot.
        call.cancel()
