"""A catalog and workers in memory, which do what a test tells them, when it tells them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from paddock.errors import ModelNotFoundError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import CatalogEntry, CatalogError, CatalogProblem, ModelFacts, Problem
from paddock_server.manager import ManagerConfig, ModelManager
from paddock_server.manager.admission import MemoryAdmission
from paddock_server.manager.prediction import NoPrediction, Prediction
from paddock_server.memory import RAM
from paddock_server.supervisor import LogLine, WorkerCrashedError, WorkerExit
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from paddock_server.manager.options import Options
    from paddock_server.supervisor import Generation, WorkerSpec

FACTS = ModelFacts(
    architecture="llama",
    general_type="model",
    name="Fake",
    quantization="Q8_0",
    parameter_count=1000,
    parameters_by_type={"Q8_0": 1000},
    tensor_count=1,
    tensor_bytes=1000,
    trained_context_tokens=512,
    embedding_length=64,
    block_count=1,
    head_count=1,
    kv_head_count=1,
    key_length=64,
    value_length=64,
    vocabulary_size=300,
    has_chat_template=True,
    chat_template="{{ messages }}",
    pooling=None,
    is_embedding_model=False,
    file_type=7,
    split=None,
)


def entry(model: str, *, problem: CatalogProblem | None = None, size_bytes: int = 1000) -> CatalogEntry:
    return CatalogEntry(
        id=model,
        path=Path("/models") / f"{model}.gguf",
        relative_path=f"{model}.gguf",
        shard_paths=(),
        mmproj_path=None,
        size_bytes=size_bytes,
        modified_ns=1,
        facts=None if problem else FACTS,
        problem=problem,
    )


LOCAL_PATH_FIELD = "source.local.path"


class FakeCatalog:
    """Has the entries it is given; `hidden` ones are found by their path only."""

    def __init__(self, *models: str) -> None:
        self.entries = {model: entry(model) for model in models}
        self.hidden: dict[str, CatalogEntry] = {}
        self.scan_count = 0
        self.fault: CatalogError | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        return ()

    def scan(self, *, reread: bool = False) -> dict[str, CatalogEntry]:
        del reread
        self.scan_count += 1
        if self.fault is not None:
            raise self.fault
        return dict(self.entries)

    def resolve_local(self, path: str) -> CatalogEntry:
        for found in (*self.entries.values(), *self.hidden.values()):
            if found.relative_path == path:
                return found
        message = f"{path!r} is in none of the configured model directories"
        raise CatalogError(LOCAL_PATH_FIELD, message)

    def touch(self, model: str) -> None:
        """The file is replaced by a good one."""
        self.entries[model] = replace(entry(model), modified_ns=self.entries[model].modified_ns + 1)


class FakeWorker:
    """Loads when told to, dies when told to."""

    def __init__(self, spec: WorkerSpec, pid: int) -> None:
        self.spec = spec
        self.load_id = spec.load_id
        self.pid = pid
        self.start_time = 1_700_000_000.0
        self.exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self.heartbeat: worker_pb2.Heartbeat | None = worker_pb2.Heartbeat(
            active_sequence_count=2, queued_request_count=1, kv_cache_used_tokens=7
        )
        self.frame: worker_pb2.Load | None = None
        self.outcome: asyncio.Future[worker_pb2.Ready] = asyncio.get_running_loop().create_future()
        self.progress: Callable[[worker_pb2.LoadProgress], None] | None = None
        self.sleep_count = 0
        self.wakes_slowly = False
        self.stop_reasons: list[str] = []
        self.reaping = asyncio.Event()
        self.reaping.set()

    def resident_bytes(self) -> int:
        return 4096

    def log_tail(self) -> tuple[str, ...]:
        return self.spec.log.tail(20)

    def say(self, *lines: str) -> None:
        """Write to the log."""
        self.spec.log.extend(LogLine(1.0, self.load_id, self.pid, line) for line in lines)

    async def load(
        self,
        request: worker_pb2.Load,
        on_progress: Callable[[worker_pb2.LoadProgress], None],
        *,
        size_bytes: int,
    ) -> worker_pb2.Ready:
        del size_bytes
        self.frame, self.progress = request, on_progress
        if self.sleep_count and not self.wakes_slowly:
            self.become_ready()
        return await asyncio.shield(self.outcome)

    def advance(self, stage: worker_pb2.LoadStage.ValueType, fraction: float) -> None:
        """Report progress."""
        assert self.progress is not None
        self.progress(worker_pb2.LoadProgress(stage=stage, fraction=fraction))

    def become_ready(self) -> None:
        """End the load well."""
        assert self.frame is not None
        self.outcome.set_result(
            worker_pb2.Ready(
                context_size_tokens=self.frame.context_size_tokens or 512,
                slot_count=self.frame.slot_count,
                gpu_layer_count=0,
                thread_count=2,
                batch_size_tokens=self.frame.batch_size_tokens,
            )
        )

    def fail(self, error: PaddockError) -> None:
        """End the load badly; the process ends with it."""
        self._exit(WorkerExit(0, "", intended=True, log_tail=self.log_tail()))
        self.outcome.set_exception(error)

    def die(self, signal: str = "SIGKILL") -> WorkerExit:
        """Crash."""
        worker_exit = WorkerExit(None, signal, intended=False, log_tail=self.log_tail())
        self._exit(worker_exit)
        if self.progress is not None and not self.outcome.done():
            self.outcome.set_exception(WorkerCrashedError.of(self.spec.model_id, worker_exit))
        return worker_exit

    async def sleep(self) -> None:
        self.frame = None
        self.outcome = asyncio.get_running_loop().create_future()
        self.sleep_count += 1

    def begin_load(self, load_id: str) -> None:
        self.load_id = load_id

    def abort_load(self) -> None:
        if not self.outcome.done():
            self.fail(make_error(Reason.LOAD_ABORTED, "aborted"))

    def generate(self, request: pb.GenerateRequest) -> Generation:
        raise NotImplementedError

    async def call(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        raise NotImplementedError

    async def stop(self, *, grace_seconds: float, reason: str) -> WorkerExit:
        del grace_seconds
        self.stop_reasons.append(reason)
        await self.reaping.wait()
        self._exit(WorkerExit(0, "", intended=True, log_tail=()))
        return self.exited.result()

    def _exit(self, worker_exit: WorkerExit) -> None:
        if not self.exited.done():
            self.exited.set_result(worker_exit)


class FakeLauncher:
    """Starts fake workers. Those of `slow` models wait for the test; the others load at once."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.slow: set[str] = set()
        self.fault: Exception | None = None
        self.started = asyncio.Condition()

    async def start(self, spec: WorkerSpec) -> FakeWorker:
        if self.fault is not None:
            raise self.fault
        worker = FakeWorker(spec, 1000 + len(self.workers))
        self.workers.append(worker)
        if spec.model_id not in self.slow:
            asyncio.get_running_loop().call_soon(self._ready_when_loading, worker)
        async with self.started:
            self.started.notify_all()
        return worker

    def _ready_when_loading(self, worker: FakeWorker) -> None:
        if worker.outcome.done():
            return
        if worker.frame is None:
            asyncio.get_running_loop().call_soon(self._ready_when_loading, worker)
        else:
            worker.become_ready()

    async def worker(self, number: int = 0) -> FakeWorker:
        """Wait for a worker to be loading or loaded, counted from 0."""
        async with self.started:
            await self.started.wait_for(lambda: len(self.workers) > number)
        worker = self.workers[number]
        await until(lambda: worker.frame is not None or worker.exited.done())
        return worker


class ContextPredictor(NoPrediction):
    """Predicts that a load takes a byte for every token of its context."""

    def predict(self, entry: CatalogEntry, options: Options, *, keeps_slots: bool = False) -> Prediction:
        del entry, keeps_slots
        return Prediction({RAM: options.context_size_tokens}, options)


class Server:
    """A manager with its fakes."""

    def __init__(self, *models: str, budget: int = 0, **config: Any) -> None:
        """With a `budget` of bytes of main memory, every token of a context takes one."""
        self.catalog = FakeCatalog(*models)
        self.launcher = FakeLauncher()
        settings = ManagerConfig(**config)
        self.manager = ModelManager(
            catalog=self.catalog,
            launcher=self.launcher,
            config=settings,
            admission=MemoryAdmission(settings.models_max, {RAM: budget} if budget else {}),
            predictor=ContextPredictor() if budget else None,
        )

    async def __aenter__(self) -> Self:
        await self.manager.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.manager.stop(drain_seconds=0)


async def loads(manager: ModelManager, model: str, **request: Any) -> list[pb.LoadResponse]:
    """Call Load and return everything it sends."""
    return [event async for event in manager.subscribe_load(pb.LoadRequest(model=model, **request))]


async def scan(manager: ModelManager) -> None:
    """Have the manager look at the directories again, as it does for a model it does not know."""
    with contextlib.suppress(ModelNotFoundError):
        await manager.acquire("unknown")


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds."""
    deadline = asyncio.get_running_loop().time() + 10
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, "it never comes true"
        await asyncio.sleep(0)
