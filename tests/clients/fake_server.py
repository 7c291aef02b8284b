"""A real gRPC server with a small `ModelManager` in memory: what the tests of clients and of the CLI talk to.

Its models behave by their names: `tiny` is loaded, `cold` is not, `endless` is loaded and generates until the
call is cancelled, `stuck` begins to load and gets no further, `broken` has failed. Threads, not asyncio, so
that a command line with an event loop of its own can be tested beside it.
"""
# ruff: noqa: N802  # the methods have the names of the RPCs

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from paddock.errors import ModelNotFoundError, PaddockError, Reason, make_error
from paddock.status import to_status
from paddock.v1 import generation_pb2, model_manager_pb2_grpc, model_pb2
from paddock.v1 import model_manager_pb2 as pb

WAY_OUT_SECONDS = 20
"""How long a fake waits for a cancel that never comes."""

PIECES = ("Hello", ", ", "wörld", "!")


@dataclass(frozen=True)
class Call:
    """A call the server got."""

    rpc: str
    request: Message
    metadata: dict[str, str | bytes]


def make_model(name: str, state: model_pb2.ModelState.ValueType) -> model_pb2.Model:
    model = model_pb2.Model(
        id=name,
        source=model_pb2.ModelSource(local=model_pb2.LocalSource(path=f"{name}.gguf")),
        state=state,
        artifact_state=model_pb2.ARTIFACT_STATE_DOWNLOADED,
        info=model_pb2.ModelInfo(
            architecture="llama",
            quantization="Q8_0",
            parameter_count=1_100_000,
            trained_context_tokens=512,
            has_chat_template=True,
            vocabulary_size=320,
            display_name=f"{name} model",
        ),
        size_bytes=1_234_567,
    )
    if state == model_pb2.MODEL_STATE_LOADED:
        model.load_id = "load-1"
        model.load_time.FromSeconds(1_700_000_000)
        model.runtime_options.context_size_tokens = 512
        model.runtime_options.slot_count = 4
        model.worker.MergeFrom(
            model_pb2.Worker(pid=4242, resident_bytes=50_000_000, kv_cache_total_tokens=512)
        )
    return model


_STREAMS = ("Load", "Generate", "Watch", "StreamLogs", "Download")


@dataclass
class FakeManager(model_manager_pb2_grpc.ModelManagerServicer):
    """The servicer. Tests set `error` and read `calls`."""

    error: PaddockError | None = None
    """Raised by every call while set."""

    errors: dict[str, PaddockError] = field(default_factory=dict[str, PaddockError])
    """By RPC: raised by every call of that one."""

    error_count: int = -1
    """How many more calls raise `error`; below zero all do."""

    truncate: bool = False
    """End streams without their terminal message."""

    calls: list[Call] = field(default_factory=list[Call])
    cancelled: dict[str, threading.Event] = field(default_factory=dict[str, threading.Event])
    """By RPC: set once its stream has been cancelled."""

    finished: set[str] = field(default_factory=set[str])
    """RPCs whose latest stream came to its end or its error by itself."""

    def __post_init__(self) -> None:
        self.cancelled = {
            rpc: threading.Event() for rpc in ("Load", "Generate", "Watch", "StreamLogs", "Download")
        }
        loaded, unloaded = model_pb2.MODEL_STATE_LOADED, model_pb2.MODEL_STATE_UNLOADED
        self.models = {
            name: make_model(name, state)
            for name, state in (
                ("broken", model_pb2.MODEL_STATE_FAILED),
                ("cold", unloaded),
                ("endless", loaded),
                ("stuck", unloaded),
                ("tiny", loaded),
            )
        }
        failure = self.models["broken"].last_failure
        failure.reason = Reason.WORKER_CRASHED
        failure.message = "The worker was ended by SIGKILL."
        failure.signal = "SIGKILL"
        failure.log_tail.extend(["first line", "last line"])

    def requests(self, rpc: str) -> list[Message]:
        return [call.request for call in self.calls if call.rpc == rpc]

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[pb.LoadResponse]:
        self._begin("Load", request, context)
        model = self._model(request.model, context)
        already = model.state == model_pb2.MODEL_STATE_LOADED
        if not already:
            yield from self._load_progress()
            if request.model == "stuck":
                self._wait_for_cancel("Load", context)
                return
            if self.truncate:
                self.finished.add("Load")
                return
            model.CopyFrom(make_model(model.id, model_pb2.MODEL_STATE_LOADED))
        loaded = pb.Loaded(model=model, already_loaded=already)
        loaded.load_duration.FromMilliseconds(1500)
        self.finished.add("Load")
        yield pb.LoadResponse(loaded=loaded)

    def Unload(self, request: pb.UnloadRequest, context: grpc.ServicerContext) -> pb.UnloadResponse:
        self._begin("Unload", request, context)
        model = self._model(request.model, context)
        model.CopyFrom(make_model(model.id, model_pb2.MODEL_STATE_UNLOADED))
        return pb.UnloadResponse(model=model, aborted_request_count=2)

    def Sleep(self, request: pb.SleepRequest, context: grpc.ServicerContext) -> pb.SleepResponse:
        self._begin("Sleep", request, context)
        self._model(request.model, context)
        return pb.SleepResponse(model=make_model(request.model, model_pb2.MODEL_STATE_SLEEPING))

    def Pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinResponse:
        self._begin("Pin", request, context)
        model = make_model(request.model, self._model(request.model, context).state)
        model.pinned = not request.unpin
        return pb.PinResponse(model=model)

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        self._begin("List", request, context)
        models = [m for m in self.models.values() if not request.states or m.state in request.states]
        start = int(request.page_token or 0)
        page = models[start : start + 2]  # two a page, so that every test pages
        more = start + 2 < len(models)
        return pb.ListResponse(models=page, next_page_token=str(start + 2) if more else "", revision=7)

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
        self._begin("Get", request, context)
        return pb.GetResponse(model=self._model(request.model, context))

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchResponse]:
        self._begin("Watch", request, context)
        for model in self.models.values():
            yield pb.WatchResponse(revision=7, changed=pb.ModelChanged(model=model))
        yield pb.WatchResponse(revision=7, synced=pb.Synced())
        yield pb.WatchResponse(
            revision=8,
            changed=pb.ModelChanged(model=self.models["tiny"], previous_state=model_pb2.MODEL_STATE_LOADING),
        )
        yield pb.WatchResponse(revision=9, deleted=pb.ModelDeleted(model="gone"))
        self._wait_for_cancel("Watch", context)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self._begin("Generate", request, context)
        model = self._model(request.model, context)
        if model.state != model_pb2.MODEL_STATE_LOADED:
            self._abort(make_error(Reason.MODEL_NOT_LOADED, f"{model.id!r} is not loaded."), context)
        yield pb.GenerateResponse(
            started=pb.Started(generation_id="g-1", load_id=model.load_id, prompt_tokens=3, model=model.id)
        )
        if request.report_prompt_progress:
            yield pb.GenerateResponse(prompt_progress=pb.PromptProgress(evaluated_tokens=2, total_tokens=3))
        if request.model == "endless":
            while context.is_active():
                yield self._deltas(request, "x")
                time.sleep(0.002)
            return
        for piece in PIECES:
            yield self._deltas(request, piece)
        yield self._deltas(request, "", finish_reason=generation_pb2.FINISH_REASON_STOP, stop_sequence="!!")
        self.finished.add("Generate")
        if self.truncate:
            return
        generated = pb.Generated(
            usage=generation_pb2.Usage(prompt_tokens=3, completion_tokens=4, cached_prompt_tokens=1), seed=11
        )
        generated.timings.generation_duration.FromMilliseconds(500)
        yield pb.GenerateResponse(generated=generated)

    def GenerateMany(
        self, request_iterator: Iterator[pb.GenerateManyRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateManyResponse]:
        self._abort(make_error(Reason.NOT_IMPLEMENTED, "For gateways."), context)

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        self._begin("Embed", request, context)
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=[float(len(text)), 0.5]) for text in request.texts],
            usage=generation_pb2.Usage(prompt_tokens=len(request.texts), cached_prompt_tokens=1),
        )

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        self._begin("Tokenize", request, context)
        data = request.text.encode()
        pieces = [bytes([byte]) for byte in data] if request.include_pieces else []
        return pb.TokenizeResponse(token_ids=list(data), pieces=pieces)

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        self._begin("Detokenize", request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode(errors="replace"))

    def StreamLogs(
        self, request: pb.StreamLogsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamLogsResponse]:
        self._begin("StreamLogs", request, context)
        for text in ("first", "second"):
            line = pb.LogLine(load_id="load-1", pid=4242, text=text)
            line.read_time.FromSeconds(1_700_000_000)
            yield pb.StreamLogsResponse(lines=[line], dropped_line_count=3 if text == "second" else 0)
        if request.follow:
            self._wait_for_cancel("StreamLogs", context)
        self.finished.add("StreamLogs")

    def Download(
        self, request: pb.DownloadRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadResponse]:
        self._begin("Download", request, context)
        for completed in (700, 800):
            advanced = pb.StageAdvanced(
                fraction=completed / 1000, completed_bytes=completed, total_bytes=1000
            )
            yield pb.DownloadResponse(progress=pb.ProgressEvent(stage=pb.STAGE_DOWNLOAD, advanced=advanced))
        if request.model == "hf:org/stuck":
            self._wait_for_cancel("Download", context)
            return
        self.finished.add("Download")
        yield pb.DownloadResponse(downloaded=make_model("org/repo:Q4_K_M", model_pb2.MODEL_STATE_UNLOADED))

    def StopDownload(
        self, request: pb.StopDownloadRequest, context: grpc.ServicerContext
    ) -> pb.StopDownloadResponse:
        self._begin("StopDownload", request, context)
        model = make_model("org/repo:Q4_K_M", model_pb2.MODEL_STATE_UNLOADED)
        model.download.paused = request.mode == pb.STOP_DOWNLOAD_MODE_PAUSE
        return pb.StopDownloadResponse(model=model)

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:
        self._begin("Delete", request, context)
        return pb.DeleteResponse(freed_bytes=0 if request.allow_missing else 1000)

    def EstimateMemory(
        self, request: pb.EstimateMemoryRequest, context: grpc.ServicerContext
    ) -> pb.EstimateMemoryResponse:
        self._begin("EstimateMemory", request, context)
        options = model_pb2.RuntimeOptions(slot_count=4)
        options.MergeFrom(request.runtime_options)
        return pb.EstimateMemoryResponse(
            parts=[
                pb.MemoryPart(device="RAM", kind=pb.MEMORY_PART_KIND_WEIGHTS, size_bytes=3 << 20),
                pb.MemoryPart(device="RAM", kind=pb.MEMORY_PART_KIND_KV_CACHE, size_bytes=1 << 20),
            ],
            devices=[
                pb.DeviceMemory(
                    device="RAM",
                    needed_bytes=4 << 20,
                    budget_bytes=8 << 20,
                    measured=request.model == "cold",
                )
            ],
            verdict=pb.MEMORY_VERDICT_FITS,
            runtime_options=options,
            roughness="Only roughly." if request.model == "broken" else "",
        )

    def Reload(self, request: pb.ReloadRequest, context: grpc.ServicerContext) -> pb.ReloadResponse:
        self._begin("Reload", request, context)
        problem = pb.ConfigProblem(file="models.ini", line=3, key="nope", message="is no option")
        return pb.ReloadResponse(added=["new"], changed=["tiny"], unchanged_count=2, problems=[problem])

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self._begin("GetServerInfo", request, context)
        info = pb.GetServerInfoResponse(version="9.9.9", instance_id="i-1", features=["logs"])
        info.start_time.FromSeconds(1_700_000_000)
        info.devices.add(display_name="CUDA0: fake", total_bytes=10, free_bytes=4)
        return info

    def _begin(self, rpc: str, request: Message, context: grpc.ServicerContext) -> None:
        """Note the call, and raise what the test asked for."""
        self.calls.append(Call(rpc, request, dict(context.invocation_metadata())))
        if rpc in self.cancelled:
            self.finished.discard(rpc)
            context.add_callback(partial(self._ended, rpc))
        error = self.error or self.errors.get(rpc)
        if error is not None and self.error_count != 0:
            self.error_count -= 1
            self._abort(error, context)

    def _model(self, name: str, context: grpc.ServicerContext) -> model_pb2.Model:
        if name not in self.models:
            self._abort(ModelNotFoundError.of(name), context)
        return self.models[name]

    def _ended(self, rpc: str) -> None:
        if rpc not in self.finished:
            self.cancelled[rpc].set()

    def _abort(self, error: PaddockError, context: grpc.ServicerContext) -> NoReturn:
        self.finished.update(self.cancelled)
        status = to_status(error, request_id="r-1")
        context.abort_with_status(rpc_status.to_status(status))  # pyright: ignore[reportUnknownMemberType]

    def _wait_for_cancel(self, rpc: str, context: grpc.ServicerContext) -> None:
        done = threading.Event()
        if not context.add_callback(done.set):
            return
        if not done.wait(WAY_OUT_SECONDS):
            self._abort(make_error(Reason.INTERNAL, f"{rpc} was never cancelled."), context)

    def _load_progress(self) -> Iterator[pb.LoadResponse]:
        spawn, weights = pb.STAGE_SPAWN, pb.STAGE_WEIGHTS
        failure = model_pb2.Failure(reason=Reason.WORKER_CRASHED, message="Died once.")
        for stage, detail in (
            (spawn, {"started": pb.StageStarted(message="Starting a worker.")}),
            (spawn, {"warning": pb.StageWarning(failure=failure)}),
            (spawn, {"finished": pb.StageFinished()}),
            (weights, {"started": pb.StageStarted(message="Reading cold.gguf.")}),
            (weights, {"advanced": pb.StageAdvanced(fraction=0.5, completed_bytes=500, total_bytes=1000)}),
            (weights, {"advanced": pb.StageAdvanced()}),
            (weights, {}),  # a kind of a newer server
            (99, {"finished": pb.StageFinished(cached=True)}),  # a stage of a newer server
        ):
            event = pb.ProgressEvent(stage=stage, **detail)  # pyright: ignore[reportArgumentType]
            event.event_time.FromSeconds(1_700_000_000)
            yield pb.LoadResponse(progress=event)
        yield pb.LoadResponse()  # an event of a newer server

    def _deltas(
        self,
        request: pb.GenerateRequest,
        text: str,
        *,
        finish_reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED,
        stop_sequence: str = "",
    ) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            deltas=pb.Deltas(
                deltas=[
                    generation_pb2.Delta(
                        choice_index=index,
                        text=text,
                        token_count=1,
                        finish_reason=finish_reason,
                        stop_sequence=stop_sequence,
                    )
                    for index in range(request.choice_count or 1)
                ]
            )
        )


@dataclass(frozen=True)
class FakeServer:
    """A running server."""

    manager: FakeManager
    target: str
    grpc_server: grpc.Server

    def stop(self) -> None:
        """Stop at once; running calls are aborted."""
        self.grpc_server.stop(grace=None).wait(WAY_OUT_SECONDS)


@contextmanager
def running_server() -> Generator[FakeServer]:
    """Run a server on a free port of loopback."""
    manager = FakeManager()
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    model_manager_pb2_grpc.add_ModelManagerServicer_to_server(manager, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield FakeServer(manager, f"127.0.0.1:{port}", server)
    finally:
        server.stop(grace=None).wait(WAY_OUT_SECONDS)
