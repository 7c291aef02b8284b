"""`ModelManager` as Python sees it: one method per RPC, protobuf messages in and out.

Two things satisfy the interface: `paddock.transport.GrpcApi` (a channel) and the server's own service object
(`paddock_server.rpc.service.ModelManagerService`), so that a gateway embedded in the server calls it without
serialising anything. Everything raises `paddock.errors.PaddockError`, never a transport's exception.

A method that streams returns an async generator. Closing it (`contextlib.aclosing`) cancels the call; leaving
the loop without closing does not, so always use `aclosing`. Requests and responses belong to the callee once
passed: neither side changes a message after handing it over.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock.v1 import model_manager_pb2 as pb

request_id: ContextVar[str] = ContextVar("paddock_request_id", default="")
"""Identifier of the request being served, for logs and errors. `GrpcApi` sends it as `x-request-id`."""


class ModelManagerApi(Protocol):
    """The `ModelManager` service; protos/paddock/v1/model_manager.proto is the reference for every method."""

    def load(self, request: pb.LoadRequest) -> AsyncGenerator[pb.LoadResponse]:
        """Load a model: `progress* loaded`. Closing detaches, the load goes on."""
        ...

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Unload a model; returns once its worker has exited."""
        ...

    async def sleep(self, request: pb.SleepRequest) -> pb.SleepResponse:
        """Have a loaded model give its memory back; returns once it has."""
        ...

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Pin a model, or take the pin off."""
        ...

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """List models, ordered by id."""
        ...

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        """Return one model."""
        ...

    def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Stream changes until closed: `changed* synced (changed | deleted | synced)*`."""
        ...

    def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """Generate: `started prompt_progress* deltas* generated`. Closing stops the generation."""
        ...

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Compute embeddings."""
        ...

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Convert text to token ids."""
        ...

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Convert token ids to text."""
        ...

    def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream the log lines of a model's workers."""
        ...

    def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """Download a model without loading it: `progress* downloaded`."""
        ...

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """Pause or cancel a download."""
        ...

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Delete the local files of a model."""
        ...

    async def estimate_memory(self, request: pb.EstimateMemoryRequest) -> pb.EstimateMemoryResponse:
        """Say what a model would take in memory, without loading it."""
        ...

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """Read the configuration files and the model directories again."""
        ...

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """Describe the server."""
        ...
