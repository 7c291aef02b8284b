"""The actor of a model: one task, one inbox, and the only writer of the model's state.

It holds no rule: `transitions.step` decides, and the actor carries out what it decided. Nothing here waits
for anything but the inbox; what takes time runs in a `WorkerRun` and reports by message.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

import structlog

from paddock.errors import Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogEntry
from paddock_server.manager import failure as failures
from paddock_server.manager import messages as m
from paddock_server.manager.admission import Admission
from paddock_server.manager.config import ManagerConfig
from paddock_server.manager.lease import Lease
from paddock_server.manager.loop import (
    Committed,
    Entered,
    Leaving,
    Left,
    Looked,
    LoopMessage,
    Slept,
    Stayed,
)
from paddock_server.manager.options import Options, Wish, load_frame
from paddock_server.manager.prediction import Prediction, Predictor
from paddock_server.manager.progress import LoadView, Subscription
from paddock_server.manager.residency import Holding, Look
from paddock_server.manager.run import Progressed, RunPlan, Spawned, WorkerLauncher, WorkerRun
from paddock_server.manager.snapshot import Clocks, Times, model_proto, visible
from paddock_server.manager.state import ActorState, Limits, Phase
from paddock_server.manager.transitions import step
from paddock_server.supervisor import LogRing, WorkerSpec
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Hashable

    from structlog.typing import FilteringBoundLogger

    from paddock_server.manager.run import LiveWorker

log: FilteringBoundLogger = structlog.get_logger()

_STAGES: Final = {
    worker_pb2.LOAD_STAGE_WEIGHTS: (pb.STAGE_WEIGHTS, "Reading the weights."),
    worker_pb2.LOAD_STAGE_WARMUP: (pb.STAGE_WARMUP, "Allocating the KV cache and running the first batch."),
}


class Home(Protocol):
    """What an actor belongs to: one model, of which it is one replica."""

    number: int
    """Number of the replica, from 0."""

    def show(self) -> None:
        """Tell the watchers: what they see of the replica has changed."""
        ...

    def completed(self, model: model_pb2.Model, entry: CatalogEntry) -> model_pb2.Model:
        """Add to a model as it is shown what is known of a download of it."""
        ...

    def stepped(self, old: ActorState, new: ActorState) -> None:
        """Learn of a step, once it has been carried out."""
        ...

    def remember(self, wish: Wish | None) -> None:
        """Keep an operator's load over a restart, or forget it."""
        ...

    def vanished(self) -> None:
        """Learn that the replica is gone for good."""
        ...


class Loop(Protocol):
    """What an actor needs of the manager loop."""

    def tell(self, message: LoopMessage) -> None:
        """Put a message into its inbox."""
        ...


@dataclass(slots=True)
class Rules:
    """What loads go by. Shared by all actors; written by the manager, when settings change."""

    config: ManagerConfig
    limits: Limits
    admission: Admission


@dataclass(frozen=True, slots=True)
class Tools:
    """What an actor works with."""

    launcher: WorkerLauncher
    rules: Rules
    predictor: Predictor
    loop: Loop
    held: Callable[[], Holding | None]
    """What it holds of the memory, by the books of the manager loop."""


@dataclass(frozen=True, slots=True, eq=False)
class Acquiring:
    """A request that waits for a lease, and since when, by the event loop's clock."""

    reply: asyncio.Future[Lease]
    since: float
    keep_alive_seconds: float = 0.0
    """How long the model is to be kept after the request."""


@dataclass(frozen=True, slots=True)
class EntryFound:
    """The catalog has a new or changed entry for the model."""

    entry: CatalogEntry
    event: m.FileFound


@dataclass(frozen=True, slots=True, eq=False)
class CatchUp:
    """Somebody waits until everything before it has been read."""

    read: asyncio.Event


Message: TypeAlias = m.Event | Spawned | Progressed | EntryFound | CatchUp


class Actor:
    """One replica of a model. Everyone else tells it things and looks at what it publishes."""

    def __init__(
        self, entry: CatalogEntry, state: ActorState, tools: Tools, home: Home, log_ring: LogRing
    ) -> None:
        """`log_ring` takes what the workers write."""
        self.entry = entry
        self.state = state
        self.log_ring = log_ring
        self._tools = tools
        self._home = home
        self._loop = asyncio.get_running_loop()
        self._shown_entry = entry
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._run: WorkerRun | None = None
        self._view: LoadView | None = None
        self._timers: dict[m.Timer, tuple[asyncio.TimerHandle, int]] = {}
        self._serial = 0
        self._own: deque[m.Event] = deque()
        self._times = Times()
        self._last_use = 0.0
        self._load_seconds = 0.0
        self._unread_requests = 0
        self._predicting: asyncio.Task[Prediction] | None = None
        self._prediction: Prediction | None = None
        """Of the stay in memory under way, or the latest."""
        self._ended = False
        self.closed = asyncio.Event()
        """Set when the actor has nothing left to do before the server stops."""

    def tell(self, message: Message) -> None:
        """Put a message into the inbox."""
        if self._ended:
            self._turn_away(message, self._end_failure())
        else:
            self._unread_requests += isinstance(message, m.AcquireAsked)
            self._inbox.put_nowait(message)

    @property
    def demand(self) -> int:
        """Requests that use the replica, wait for it, or are in its inbox."""
        return self.state.leases + len(self.state.waiters) + self._unread_requests

    @property
    def serves(self) -> bool:
        """Whether its worker serves, for all that is known; the message about its death may be behind."""
        return self.state.phase is Phase.READY and self._run is not None and self._run.death is None

    @property
    def look(self) -> Look:
        """What the manager loop plans with. A moment old at most, and never acted on without asking."""
        state = self.state
        return Look(
            state.ticket,
            state.phase,
            state.cause,
            state.leases,
            last_use=max(self._last_use, state.ready_at),
            loaded_at=state.ready_at,
            reload_seconds=self._load_seconds,
            terms=state.terms,
            stay=state.stay,
        )

    @property
    def worker(self) -> LiveWorker | None:
        """The worker, from its hello to its end."""
        return self._run.worker if self._run is not None else None

    def snapshot(self) -> model_pb2.Model:
        """Return the model as the world would see it now if this replica were all of it."""
        held = self._tools.held()
        model = model_proto(self.entry, self.state, self.worker, self._times, held, self._clocks())
        return self._home.completed(model, self.entry)

    def _clocks(self) -> Clocks:
        return Clocks(time.time(), self._loop.time())

    async def caught_up(self) -> None:
        """Wait until everything told so far has been read."""
        told = asyncio.Event()
        self.tell(CatchUp(told))
        await told.wait()

    async def run(self) -> None:
        """Read the inbox until cancelled. Whatever ends it, nobody is left waiting for an answer."""
        message: Message = m.Resumed()
        try:
            while True:
                message = await self._inbox.get()
                self._receive(message)
        finally:
            self._end(message)

    def _end(self, last: Message) -> None:
        """Turn everybody away. `last` is the message a bug was met at, if one was."""
        self._ended = True
        failure = self._end_failure()
        self._clear_timers(m.ClearTimers(tuple(m.Timer)))
        for caller in (*self.state.waiters, *self.state.unloads, *self.state.sleeps):
            self._refuse(m.Refuse(caller, failure))
        self._end_load(m.EndLoad(failure))
        self._turn_away(last, failure)
        while not self._inbox.empty():
            self._turn_away(self._inbox.get_nowait(), failure)
        if self._run is not None:
            self._run.stop(failure.reason)
            self._run = None
        self._tools.loop.tell(Left(self.state.model, self.state.ticket))
        if failure.reason == Reason.INTERNAL:
            self.state = replace(self.state, phase=Phase.FAILED, failure=failure)
            self._home.show()
        self.closed.set()

    def _end_failure(self) -> failures.Failure:
        if self.state.closing:
            return failures.shutting_down()
        if self.state.gone:
            return failures.model_not_found(self.state.model)
        return failures.internal(self.state.model)

    def _turn_away(self, message: Message, failure: failures.Failure) -> None:
        match message:
            case m.AcquireAsked() | m.UnloadAsked() | m.SleepAsked():
                self._refuse(m.Refuse(message.caller, failure))
            case m.LoadAsked():
                _subscription(message.caller).fail(failure)
            case CatchUp():
                message.read.set()
            case _:
                pass

    def _receive(self, message: Message) -> None:
        match message:
            case Spawned():
                self._on_spawned(message)
            case Progressed():
                self._on_progressed(message)
            case m.TimerFired():
                if self._is_current(message):
                    stage = self._view.stage_name if self._view is not None else message.stage
                    self._advance(replace(message, stage=stage))
            case CatchUp():
                message.read.set()
            case EntryFound():
                self.entry = message.entry
                self._advance(message.event)
            case m.AcquireAsked() | m.LoadAsked():
                self._unread_requests -= isinstance(message, m.AcquireAsked)
                self._notice_death()
                self._advance(message)
            case _:
                self._advance(message)

    def _notice_death(self) -> None:
        """Learn of a worker's death before a request is sent to it: the message about it may be behind."""
        if self.state.phase is Phase.READY and self._run is not None:
            death = self._run.death
            if death is not None:
                self._advance(death)

    def _advance(self, event: m.Event) -> None:
        self._own.append(event)
        while self._own:
            self._step(self._own.popleft())

    def _step(self, event: m.Event) -> None:
        old = self.state
        new, effects, why = step(old, event, self._loop.time(), self._tools.rules.limits)
        self.state = new
        if new.phase is not old.phase:
            self._on_phase(old, why)
        if new.failure is not old.failure:
            self._times = replace(self._times, failed=time.time())
        if new.leases != old.leases:
            self._last_use = self._loop.time()
            self._times = replace(self._times, last_use=time.time())
        if visible(new) != visible(old) or self.entry is not self._shown_entry:
            self._shown_entry = self.entry
            self._home.show()
        for effect in effects:
            self._carry_out(effect)
        self._home.stepped(old, new)

    def _on_phase(self, old: ActorState, why: str) -> None:
        new = self.state
        fields = {
            "model": new.model,
            "load_id": new.load_id or old.load_id,
            "from": str(old.phase),
            "to": str(new.phase),
            "why": str(why),
        }
        if self._home.number:
            fields["replica"] = str(self._home.number)
        if new.phase in _AFTER_FAILURE and new.failure is not None:
            log.warning("model_state_changed", **fields, failure=new.failure.message)
        else:
            log.info("model_state_changed", **fields)
        if new.phase is Phase.READY and old.phase is Phase.STARTING:
            self._load_seconds = new.ready_at - new.begun_at
            self._times = replace(self._times, loaded=time.time())
        if new.phase in _WITHOUT_WORKER:
            self._run = None

    # What the worker reports about its load; it changes nothing but what is shown.

    def _on_spawned(self, message: Spawned) -> None:
        if self._is_starting(message.load_number):
            self._begin_stage(worker_pb2.LOAD_STAGE_WEIGHTS)

    def _on_progressed(self, message: Progressed) -> None:
        if self._is_starting(message.load_number) and message.stage in _STAGES:
            stage = self._begin_stage(message.stage)
            total_bytes = self.entry.size_bytes if stage == pb.STAGE_WEIGHTS else 0
            self._current_view().advance(stage, message.fraction, total_bytes)

    def _is_starting(self, load_number: int) -> bool:
        return self.state.phase is Phase.STARTING and self.state.load_number == load_number

    def _begin_stage(self, worker_stage: worker_pb2.LoadStage.ValueType) -> pb.Stage.ValueType:
        stage, message = _STAGES[worker_stage]
        view = self._current_view()
        if view.stage < stage:
            view.begin(stage, message)
        return stage

    def _current_view(self) -> LoadView:
        if self._view is None:
            self._view = LoadView(self._loop.time)
        return self._view

    # Timers

    def _is_current(self, message: m.TimerFired) -> bool:
        timer = self._timers.get(message.timer)
        if timer is None or timer[1] != message.serial:
            return False
        del self._timers[message.timer]
        return True

    def _set_timer(self, effect: m.SetTimer) -> None:
        self._clear_timers(m.ClearTimers((effect.timer,)))
        self._serial += 1
        message = m.TimerFired(effect.timer, self._serial)
        self._timers[effect.timer] = (
            self._loop.call_later(effect.seconds, self.tell, message),
            self._serial,
        )

    def _clear_timers(self, effect: m.ClearTimers) -> None:
        for timer in effect.timers:
            running = self._timers.pop(timer, None)
            if running is not None:
                running[0].cancel()

    # Effects

    def _carry_out(self, effect: m.Effect) -> None:
        tools = self._tools
        model = self.state.model
        match effect:
            case m.Enter():
                self._enter(effect)
            case m.Commit():
                self._commit(effect)
            case m.StartWorker():
                self._start_worker(effect)
            case m.WakeWorker():
                self._wake_worker(effect)
            case m.SuspendWorker():
                if self._run is not None:
                    self._run.sleep()
            case m.Asleep():
                tools.loop.tell(Slept(model, effect.ticket, self._resident_bytes()))
            case m.AnswerSleep():
                self._answer_sleep(effect)
            case m.StopWorker():
                self._stop_worker(effect)
            case m.Grant():
                self._grant(effect)
            case m.Refuse():
                self._refuse(effect)
            case m.EndLoad():
                self._end_load(effect)
            case m.AnswerUnload():
                self._answer_unload(effect)
            case m.SetTimer():
                self._set_timer(effect)
            case m.ClearTimers():
                self._clear_timers(effect)
            case m.Releasing():
                tools.loop.tell(Leaving(model, effect.ticket))
            case m.Leave():
                tools.loop.tell(Left(model, effect.ticket))
            case m.EvictionRefused():
                tools.loop.tell(Stayed(model, effect.ticket))
            case m.LookAgain():
                if self.state.phase is Phase.READY:
                    self._commit(m.Commit(self.state.stay))
                tools.loop.tell(Looked())
            case m.Remember():
                self._home.remember(effect.wish)
            case m.Vanish():
                self._home.vanished()
            case m.JoinLoad():
                self._current_view().attach(_subscription(effect.caller))
            case m.AnswerLoaded():
                _subscription(effect.caller).finish(self._loaded(already=True))
            case m.RefuseLoad():
                _subscription(effect.caller).fail(effect.failure)
            case m.WarnLoad():
                self._current_view().warn(effect.failure)
            case m.Resume():
                self._own.append(m.Resumed())
            case m.Closed():
                self.closed.set()

    def _enter(self, effect: m.Enter) -> None:
        view = self._current_view()
        view.begin(pb.STAGE_RESOLVE, self.entry.relative_path)
        view.end_stage(cached=True)
        view.begin(pb.STAGE_ADMIT, "Making sure that it fits into memory.")
        work = asyncio.to_thread(self._tools.predictor.predict, self.entry, effect.options)
        task = self._predicting = asyncio.create_task(work, name=f"predict-{self.state.load_id}")
        task.add_done_callback(lambda done: self._on_predicted(effect.ticket, done))

    def _on_predicted(self, ticket: int, task: asyncio.Task[Prediction]) -> None:
        """Queue for room, unless the load has been called off since."""
        if task.cancelled() or self.state.phase is not Phase.ADMITTING or self.state.ticket != ticket:
            return
        error = task.exception()
        if error is not None:
            log.error("prediction_bug", model=self.state.model, exc_info=error)
            self.tell(m.AdmissionRefused(ticket, failures.internal(self.state.model)))
            return
        self._prediction = task.result()
        admission = self._tools.rules.admission
        cost = admission.predicted(self._prediction.device_bytes, self.state.terms, self.state.model)
        self._tools.loop.tell(Entered(self.state.model, ticket, cost))

    def _commit(self, effect: m.Commit) -> None:
        resident_bytes = self._resident_bytes()
        self._tools.loop.tell(Committed(self.state.model, effect.ticket, resident_bytes))
        if self._prediction is not None:
            self._tools.predictor.learn(self._prediction, resident_bytes)

    def _resident_bytes(self) -> int:
        worker = self.worker
        return worker.resident_bytes() if worker is not None else 0

    def _start_worker(self, effect: m.StartWorker) -> None:
        self._current_view().begin(pb.STAGE_SPAWN, "Starting the worker process.")
        plan = self._run_plan(effect.load_number, effect.options)
        self._run = WorkerRun(self._tools.launcher, plan, self.tell)

    def _wake_worker(self, effect: m.WakeWorker) -> None:
        if self._run is None:  # It died, and the message about it is on its way.
            self._start_worker(m.StartWorker(effect.load_number, effect.options))
            return
        view = self._current_view()
        view.begin(pb.STAGE_SPAWN, "The worker process has slept.")
        view.end_stage(cached=True)
        self._begin_stage(worker_pb2.LOAD_STAGE_WEIGHTS)
        self._run.wake(self._run_plan(effect.load_number, effect.options))

    def _run_plan(self, load_number: int, options: Options) -> RunPlan:
        config = self._tools.rules.config
        sized = self._prediction.options if self._prediction is not None else options
        return RunPlan(
            load_number=load_number,
            spec=WorkerSpec(self.state.model, self.state.load_id_of(load_number), self.log_ring),
            frame=load_frame(str(self.entry.path), sized, config),
            options=sized,
            size_bytes=self.entry.size_bytes,
            stop_grace_seconds=config.stop_grace_seconds,
        )

    def _stop_worker(self, effect: m.StopWorker) -> None:
        if self._run is not None:
            self._run.stop(effect.reason)

    def _grant(self, effect: m.Grant) -> None:
        worker = self.worker
        now = self._loop.time()
        for caller in effect.callers:
            acquiring = cast("Acquiring", caller)
            if acquiring.reply.done() or worker is None:
                self.tell(m.LeaseReturned(effect.load_number))
                continue
            acquiring.reply.set_result(
                Lease(
                    model_id=self.state.model,
                    load_id=self.state.load_id_of(effect.load_number),
                    worker=worker,
                    load_wait_seconds=now - acquiring.since if effect.waited else 0.0,
                    release=self._release(effect.load_number, acquiring.keep_alive_seconds),
                )
            )

    def _release(self, load_number: int, keep_alive_seconds: float) -> Callable[[], None]:
        return lambda: self.tell(m.LeaseReturned(load_number, keep_alive_seconds))

    def _refuse(self, effect: m.Refuse) -> None:
        caller = effect.caller
        reply = caller.reply if isinstance(caller, Acquiring) else cast("asyncio.Future[Any]", caller)
        if not reply.done():
            reply.set_exception(effect.failure.error())

    def _end_load(self, effect: m.EndLoad) -> None:
        view, self._view = self._view, None
        if view is None:
            return
        if effect.failure is None:
            view.end(self._loaded(already=False))
        else:
            view.fail(effect.failure)

    def _loaded(self, *, already: bool) -> pb.LoadResponse:
        response = pb.LoadResponse()
        response.loaded.model.CopyFrom(self.snapshot())
        response.loaded.already_loaded = already
        response.loaded.load_duration.FromNanoseconds(int(self._load_seconds * 1e9))
        return response

    def _answer_sleep(self, effect: m.AnswerSleep) -> None:
        response = pb.SleepResponse(model=self.snapshot())
        for caller in effect.callers:
            reply = cast("asyncio.Future[pb.SleepResponse]", caller)
            if not reply.done():
                reply.set_result(response)

    def _answer_unload(self, effect: m.AnswerUnload) -> None:
        response = pb.UnloadResponse(model=self.snapshot(), aborted_request_count=effect.aborted)
        for caller in effect.callers:
            reply = cast("asyncio.Future[pb.UnloadResponse]", caller)
            if not reply.done():
                reply.set_result(response)


_AFTER_FAILURE: Final = frozenset({Phase.FAILED, Phase.BACKOFF})
_WITHOUT_WORKER: Final = frozenset({Phase.UNLOADED, Phase.FAILED, Phase.BACKOFF})


def _subscription(caller: Hashable) -> Subscription:
    return cast("Subscription", caller)
