"""One worker from its start to its end: the slow work of an actor, in tasks that report by message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from paddock.errors import PaddockError, Reason
from paddock_server.manager import failure as failures
from paddock_server.manager.messages import (
    StartFailed,
    WorkerDied,
    WorkerReady,
    WorkerReaped,
    WorkerSlept,
)
from paddock_server.manager.options import Options, effective_options
from paddock_server.supervisor import WorkerSpec
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock.v1 import model_manager_pb2 as pb
    from paddock_server.manager.messages import Event
    from paddock_server.supervisor import Generation, WorkerExit

log: FilteringBoundLogger = structlog.get_logger()

ABORT_SECONDS = 10.0
"""How long an aborted load may take to end by itself: the supervisor's own bound for it, and a margin."""


class LiveWorker(Protocol):
    """What the manager needs of `supervisor.Worker`."""

    pid: int
    start_time: float
    exited: asyncio.Future[WorkerExit]

    @property
    def heartbeat(self) -> worker_pb2.Heartbeat | None:
        """The latest sign of life."""
        ...

    def resident_bytes(self) -> int:
        """Return the memory the process has resident."""
        ...

    def log_tail(self) -> tuple[str, ...]:
        """Return the last lines the process wrote."""
        ...

    async def load(
        self,
        request: worker_pb2.Load,
        on_progress: Callable[[worker_pb2.LoadProgress], None],
        *,
        size_bytes: int,
    ) -> worker_pb2.Ready:
        """Load the model. Raises `PaddockError`."""
        ...

    def begin_load(self, load_id: str) -> None:
        """Say which load comes next, after `sleep`; its log lines carry the id."""
        ...

    def abort_load(self) -> None:
        """Have the load given up."""
        ...

    def generate(self, request: pb.GenerateRequest) -> Generation:
        """Return a generation, which starts when it is entered."""
        ...

    async def call(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        """Ask a question and wait for its answer. Raises `PaddockError`."""
        ...

    def sleep(self) -> Coroutine[Any, Any, None]:
        """Have the model freed and the process stay; `load` may be called again. Raises `PaddockError`."""
        ...

    async def stop(self, *, grace_seconds: float, reason: str) -> WorkerExit:
        """End the worker. Idempotent and bounded."""
        ...


class WorkerLauncher(Protocol):
    """What the manager needs of `supervisor.Launcher`."""

    async def start(self, spec: WorkerSpec) -> LiveWorker:
        """Start a worker. Raises `PaddockError`; leaves nothing behind then, nor when cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class Spawned:
    """The worker has introduced itself and begins to load."""

    load_number: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """The load advanced."""

    load_number: int
    stage: worker_pb2.LoadStage.ValueType
    fraction: float


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What to run."""

    load_number: int
    spec: WorkerSpec
    frame: worker_pb2.Load
    options: Options
    size_bytes: int
    stop_grace_seconds: float


class WorkerRun:
    """One worker. Tells the actor `Spawned`, `Progressed`*, then `WorkerReady` or `StartFailed`.

    After `WorkerReady` comes `WorkerDied` if it dies. After `sleep` comes `WorkerSlept`, and after `wake` the
    same as at first, but for `Spawned`. After `stop`, whenever that is, comes `WorkerReaped`; what else is
    still on its way then has lost its meaning.
    """

    def __init__(
        self, launcher: WorkerLauncher, plan: RunPlan, tell: Callable[[Event | Spawned | Progressed], None]
    ) -> None:
        self._launcher = launcher
        self._plan = plan
        self._tell = tell
        self.worker: LiveWorker | None = None
        self._start_task = self._begin(self._start())
        self._sleep_task: asyncio.Task[None] | None = None
        self._stop_task: asyncio.Task[None] | None = None
        self._served = False

    @property
    def death(self) -> WorkerDied | None:
        """The end of a worker that served, as soon as it is known and before the message about it is read."""
        worker = self.worker
        if worker is None or not worker.exited.done() or self._stop_task is not None:
            return None
        return WorkerDied(self._plan.load_number, self._failure_of_exit(worker.exited))

    def sleep(self) -> None:
        """Have the worker give its memory back."""
        self._sleep_task = asyncio.create_task(
            self._live_worker().sleep(), name=f"sleep-{self._plan.spec.load_id}"
        )
        self._sleep_task.add_done_callback(self._on_slept)

    def wake(self, plan: RunPlan) -> None:
        """Have a worker that sleeps load again."""
        self._plan = plan
        worker = self._live_worker()
        worker.begin_load(plan.spec.load_id)
        self._start_task = self._begin(self._load(worker))

    def stop(self, reason: str) -> None:
        """Stop the worker, whatever it is doing."""
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop(reason), name=f"stop-{self._plan.spec.load_id}")
            self._stop_task.add_done_callback(self._on_stopped)

    def _begin(self, work: Coroutine[Any, Any, worker_pb2.Ready]) -> asyncio.Task[worker_pb2.Ready]:
        task = asyncio.create_task(work, name=f"load-{self._plan.spec.load_id}")
        task.add_done_callback(self._on_started)
        return task

    async def _start(self) -> worker_pb2.Ready:
        plan = self._plan
        self.worker = await self._launcher.start(plan.spec)
        self._tell(Spawned(plan.load_number))
        return await self._load(self.worker)

    async def _load(self, worker: LiveWorker) -> worker_pb2.Ready:
        plan = self._plan
        loaded = False
        try:
            ready = await worker.load(plan.frame, self._on_progress, size_bytes=plan.size_bytes)
            loaded = True
            return ready
        finally:
            if not loaded:
                await worker.stop(grace_seconds=plan.stop_grace_seconds, reason=Reason.LOAD_ABORTED)

    def _on_progress(self, progress: worker_pb2.LoadProgress) -> None:
        self._tell(Progressed(self._plan.load_number, progress.stage, progress.fraction))

    def _on_started(self, task: asyncio.Task[worker_pb2.Ready]) -> None:
        number = self._plan.load_number
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._tell(WorkerReady(number, effective_options(self._plan.options, task.result())))
            if self.worker is not None and not self._served:
                self._served = True
                self.worker.exited.add_done_callback(self._on_exited)
            return
        if isinstance(error, PaddockError):
            tail = self.worker.log_tail() if self.worker is not None else ()
            self._tell(StartFailed(number, failures.failure_of(error, log_tail=tail)))
            return
        log.error("load_bug", model=self._plan.spec.model_id, load_id=self._plan.spec.load_id, exc_info=error)
        self._tell(StartFailed(number, failures.internal(self._plan.spec.model_id)))

    def _live_worker(self) -> LiveWorker:
        if self.worker is None:
            text = "this run has no worker yet"
            raise RuntimeError(text)
        return self.worker

    def _on_slept(self, task: asyncio.Task[None]) -> None:
        """Report that the worker sleeps. Of one that died instead, or was stopped, another message tells."""
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            self._tell(WorkerSlept(self._plan.load_number))
        elif error is not None and not isinstance(error, PaddockError):
            spec = self._plan.spec
            log.error("sleep_bug", model=spec.model_id, load_id=spec.load_id, exc_info=error)

    def _on_exited(self, exited: asyncio.Future[WorkerExit]) -> None:
        if self._stop_task is None and not exited.cancelled():
            self._tell(WorkerDied(self._plan.load_number, self._failure_of_exit(exited)))

    def _failure_of_exit(self, exited: asyncio.Future[WorkerExit]) -> failures.Failure:
        model = self._plan.spec.model_id
        error = exited.exception()
        if error is None:
            return failures.crash(model, exited.result())
        log.error("worker_watch_bug", model=model, load_id=self._plan.spec.load_id, exc_info=error)
        return failures.internal(model)

    async def _stop(self, reason: str) -> None:
        if not self._start_task.done():
            if self.worker is not None:
                self.worker.abort_load()
                await asyncio.wait({self._start_task}, timeout=ABORT_SECONDS)
            self._start_task.cancel()
            await asyncio.wait({self._start_task})
        if self.worker is not None:
            await self.worker.stop(grace_seconds=self._plan.stop_grace_seconds, reason=reason)

    def _on_stopped(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error(
                "stop_bug", model=self._plan.spec.model_id, load_id=self._plan.spec.load_id, exc_info=error
            )
        self._tell(WorkerReaped(self._plan.load_number))
