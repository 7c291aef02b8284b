"""The gRPC servicer: hands every call to the service.

A streaming method returns the service's generator as it is; `CallInterceptor`, which wraps every method,
iterates and closes it, and turns errors into statuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paddock.v1 import model_manager_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable

    from paddock.api import ModelManagerApi
    from paddock.v1 import model_manager_pb2 as pb
    from paddock_server.rpc.multiplex import GenerationStreams


class ModelManagerServicer(model_manager_pb2_grpc.ModelManagerServicer):
    """One line per RPC; the documentation is the proto's."""

    def __init__(self, service: ModelManagerApi, streams: GenerationStreams) -> None:
        self._service = service
        self._streams = streams

    def Load(self, request: pb.LoadRequest, context: Any) -> AsyncGenerator[pb.LoadResponse]:
        """Stream a load."""
        return self._service.load(request)

    async def Unload(self, request: pb.UnloadRequest, context: Any) -> pb.UnloadResponse:
        """Unload a model."""
        return await self._service.unload(request)

    async def Sleep(self, request: pb.SleepRequest, context: Any) -> pb.SleepResponse:
        """Have a model give its memory back."""
        return await self._service.sleep(request)

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinResponse:
        """Pin a model."""
        return await self._service.pin(request)

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        """List models."""
        return await self._service.list(request)

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """Return one model."""
        return await self._service.get(request)

    def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncGenerator[pb.WatchResponse]:
        """Stream changes."""
        return self._service.watch(request)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncGenerator[pb.GenerateResponse]:
        """Stream a generation."""
        return self._service.generate(request)

    def GenerateMany(
        self, request_iterator: AsyncIterable[pb.GenerateManyRequest], context: Any
    ) -> AsyncGenerator[pb.GenerateManyResponse]:
        """Run many generations over one stream."""
        return self._streams.serve(request_iterator)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Compute embeddings."""
        return await self._service.embed(request)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Convert text to token ids."""
        return await self._service.tokenize(request)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Convert token ids to text."""
        return await self._service.detokenize(request)

    def StreamLogs(
        self, request: pb.StreamLogsRequest, context: Any
    ) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream log lines."""
        return self._service.stream_logs(request)

    def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncGenerator[pb.DownloadResponse]:
        """Stream a download."""
        return self._service.download(request)

    async def StopDownload(self, request: pb.StopDownloadRequest, context: Any) -> pb.StopDownloadResponse:
        """Pause or cancel a download."""
        return await self._service.stop_download(request)

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        """Delete a model's files."""
        return await self._service.delete(request)

    async def EstimateMemory(
        self, request: pb.EstimateMemoryRequest, context: Any
    ) -> pb.EstimateMemoryResponse:
        """Say what a model would take in memory."""
        return await self._service.estimate_memory(request)

    async def Reload(self, request: pb.ReloadRequest, context: Any) -> pb.ReloadResponse:
        """Read the configuration again."""
        return await self._service.reload(request)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """Describe the server."""
        return await self._service.get_server_info(request)
