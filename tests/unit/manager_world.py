"""The pure parts of the manager, put together as the real ones are, with every message held back until told.

Actors, the manager loop's books, workers, timers and callers; time is a number. Whoever drives the world
chooses which message is delivered next, so every interleaving can be had. The world checks the rules at every
step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from paddock_server.manager import messages as m
from paddock_server.manager.admission import NO_EXCESS, MemoryAdmission
from paddock_server.manager.failure import Failure, model_not_found
from paddock_server.manager.loop import (
    Committed,
    Entered,
    Leaving,
    Left,
    Limited,
    Looked,
    LoopMessage,
    Slept,
    Stayed,
)
from paddock_server.manager.options import Options, Terms, Wish
from paddock_server.manager.replicas import model_of
from paddock_server.manager.residency import Look, Residency
from paddock_server.manager.state import COMING_UP, GOING_DOWN, ActorState, Cause, Limits, Phase
from paddock_server.manager.transitions import step
from paddock_server.memory import RAM

DEFAULTS = Options(
    context_size_tokens=2048, gpu_layer_count=-1, slot_count=4, thread_count=0, batch_size_tokens=512
)
NO_WISH = Wish({})
PATIENCE = 10.0
WAITERS_MAX = 4
LIMITS = Limits(waiters_max=WAITERS_MAX, drain_seconds=30, admission_timeout_seconds=600)
VOLUNTARY = frozenset({Cause.EVICTION, Cause.YIELD, Cause.IDLE})
"""Stops that must never cost anybody a request."""


class Worker(Enum):
    """What a worker is doing."""

    STARTING = auto()
    READY = auto()
    SUSPENDING = auto()
    ASLEEP = auto()
    STOPPING = auto()
    ENDING = auto()
    """It slept, and is being stopped."""


WITHOUT_MODEL = frozenset({Worker.ASLEEP, Worker.ENDING})


@dataclass
class Model:
    """An actor, its inbox, and what is around it."""

    state: ActorState
    inbox: deque[m.Event] = field(default_factory=deque[m.Event])
    timers: dict[m.Timer, tuple[float, int, bool]] = field(
        default_factory=dict[m.Timer, tuple[float, int, bool]]
    )
    """Deadline, serial, and whether it has fired."""
    workers: dict[int, Worker] = field(default_factory=dict[int, Worker])
    view: list[int] = field(default_factory=list[int])
    arrived: list[int] = field(default_factory=list[int])
    """Requests that wait for a lease, in the order the actor read them."""
    holders: dict[int, int] = field(default_factory=dict[int, int])
    """Callers with a lease, and the load it is of."""
    last_use: float = 0.0
    terms: Terms = field(default_factory=Terms)
    """What it was told last."""
    closed: bool = False
    size: int = 1
    """Bytes a load is predicted to take."""
    taken: int = 1
    """Bytes it really takes."""


ASLEEP_SIZE = 1
"""Bytes a worker takes that sleeps."""


class World:
    """Everything. Answers are kept by caller; a caller is a number."""

    def __init__(
        self,
        names: tuple[str, ...],
        models_max: int,
        waiting_max: int = 8,
        sizes: tuple[int, ...] = (),
        budget: int = 0,
    ) -> None:
        """With `sizes`, one of each name, the memory is limited to `budget`; 0 is no limit."""
        self.now = 1000.0
        self.models_max = models_max
        self.admission = MemoryAdmission(models_max, {RAM: budget} if budget else {})
        self.shrunk = False
        """Whether the limits have ever become smaller."""
        self.residency = Residency(
            self.admission,
            patience_seconds=PATIENCE,
            waiting_max=waiting_max,
        )
        self.loop_inbox: deque[LoopMessage] = deque()
        self.wake_at: float | None = None
        self.models: dict[str, Model] = {}
        self.pending: set[int] = set()
        self.answers: dict[int, str] = {}
        self.granted: list[int] = []
        self.expected: dict[str, Wish] = {}
        self.remembered: dict[str, Wish | None] = {}
        self._callers = 0
        self._serial = 0
        self._actors = 0
        self.sizes = dict(zip(names, sizes or (1,) * len(names), strict=True))
        self.budget = budget
        for name in names:
            self.add(name)

    # What outsiders do

    def add(self, name: str, problem: Failure | None = None) -> None:
        """A model's file appears."""
        state = ActorState(
            model=model_of(name),
            defaults=DEFAULTS,
            options=DEFAULTS,
            problem=problem,
            load_id_prefix=f"{name}-",
            ticket=self._actors << 32,
        )
        self._actors += 1
        size = self.sizes.setdefault(name, 1)
        self.models[name] = Model(state, size=size, taken=size)

    def tell(self, name: str, event: m.Event) -> None:
        """Put a message into an actor's inbox."""
        self.models[name].inbox.append(event)

    def load(
        self,
        name: str,
        wish: Wish = NO_WISH,
        conflict: m.Conflict = m.Conflict.FAIL,
        timeout: float | None = None,
    ) -> int:
        """Call Load; return the caller."""
        caller = self._caller()
        self.tell(name, m.LoadAsked(caller, wish, conflict, timeout))
        return caller

    def acquire(self, name: str, *, autoload: bool = True) -> int:
        """Ask for a lease; return the caller."""
        caller = self._caller()
        self.tell(name, m.AcquireAsked(caller, autoload))
        return caller

    def unload(
        self, name: str, *, force: bool = False, drain_seconds: float = 30.0, load_id: str = ""
    ) -> int:
        """Call Unload; return the caller."""
        caller = self._caller()
        self.tell(name, m.UnloadAsked(caller, force, drain_seconds, load_id))
        return caller

    def sleep(self, name: str) -> int:
        """Call Sleep; return the caller."""
        caller = self._caller()
        self.tell(name, m.SleepAsked(caller))
        return caller

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Pin a model or take the pin off."""
        self._set_terms(name, replace(self.models[name].terms, pinned=pinned))

    def group(self, name: str, group: str) -> None:
        """A reload puts a model, all replicas of it, into an exclusive group, or with "" into none."""
        for replica, model in self.models.items():
            if model_of(replica) == model_of(name):
                self._set_terms(replica, replace(model.terms, group=group))

    def _set_terms(self, name: str, terms: Terms) -> None:
        self.models[name].terms = terms
        self.tell(name, m.TermsSet(terms))

    def limit(self, models_max: int, budget: int) -> None:
        """A reload changes the limits; 0 is none."""
        self.loop_inbox.append(Limited(MemoryAdmission(models_max, {RAM: budget} if budget else {})))

    def abandon(self, name: str, caller: int) -> None:
        """A caller that waits for a lease goes away."""
        self.pending.discard(caller)
        self.answers[caller] = "left"
        self.tell(name, m.CallerLeft(caller))

    def give_back(self, name: str, caller: int) -> None:
        """A caller returns its lease."""
        self.tell(name, m.LeaseReturned(self.models[name].holders.pop(caller)))

    def worker_ready(self, name: str, load_number: int) -> None:
        """A worker finishes its load."""
        self.models[name].workers[load_number] = Worker.READY
        self.tell(name, m.WorkerReady(load_number, self.models[name].state.options))

    def worker_sleeps(self, name: str, load_number: int) -> None:
        """A worker has given its memory back."""
        self.models[name].workers[load_number] = Worker.ASLEEP
        self.tell(name, m.WorkerSlept(load_number))

    def worker_fails(self, name: str, load_number: int, reason: str) -> None:
        """A worker does not come up, or dies, or is reaped, whichever it is at."""
        model = self.models[name]
        at = model.workers.pop(load_number)
        failure = Failure(reason, "it failed")
        if at is Worker.STARTING:
            self.tell(name, m.StartFailed(load_number, failure))
        elif at in {Worker.READY, Worker.SUSPENDING, Worker.ASLEEP}:
            self.tell(name, m.WorkerDied(load_number, failure))
        else:
            self.tell(name, m.WorkerReaped(load_number))

    def pass_time(self, seconds: float) -> None:
        """Let time go by; timers that run out put their message into the inbox."""
        self.now += seconds
        for model in self.models.values():
            for timer, (deadline, serial, fired) in list(model.timers.items()):
                if deadline <= self.now and not fired:
                    model.timers[timer] = (deadline, serial, True)
                    model.inbox.append(m.TimerFired(timer, serial))
        if self.wake_at is not None and self.wake_at <= self.now:
            self._decide()

    # Delivery

    def deliver(self, name: str) -> None:
        """Have an actor read one message."""
        model = self.models[name]
        event = model.inbox.popleft()
        if isinstance(event, m.TimerFired):
            timer = model.timers.get(event.timer)
            if timer is None or timer[1] != event.serial:
                return
            del model.timers[event.timer]
        own: deque[m.Event] = deque([event])
        while own:
            self._step(name, own.popleft(), own)

    def deliver_to_loop(self) -> None:
        """Have the manager loop read one message and plan."""
        message = self.loop_inbox.popleft()
        match message:
            case Entered():
                refusal = self.residency.enter(message.model, message.ticket, message.cost, self.now)
                if refusal is not None and refusal.model in self.models:
                    self.tell(refusal.model, refusal.message)
            case Committed():
                self.residency.commit(message.model, message.ticket, message.resident_bytes)
            case Slept():
                self.residency.asleep(message.model, message.ticket, message.resident_bytes)
            case Leaving():
                self.residency.releasing(message.model, message.ticket)
            case Left():
                self.residency.leave(message.model, message.ticket)
            case Stayed():
                self.residency.refused(message.model, message.ticket)
            case Limited():
                self._take_over(message)
            case Looked():
                pass
        self._decide()

    def _take_over(self, message: Limited) -> None:
        assert isinstance(message.admission, MemoryAdmission)
        self.residency.limit(message.admission)
        self.admission = message.admission
        for old, new in (
            (self.models_max, self.admission.models_max),
            (self.budget, self.admission.budget.get(RAM, 0)),
        ):
            self.shrunk |= bool(new) and (not old or new < old)
        self.models_max, self.budget = self.admission.models_max, self.admission.budget.get(RAM, 0)

    def assert_within_limits(self) -> None:
        """To be called while nothing is under way: nobody who could go holds more than may be held."""
        held = self.residency.held
        states = {name: self.models[name].state for name in held}
        idle = {
            name
            for name, state in states.items()
            if state.phase in {Phase.READY, Phase.SLEEPING} and not state.leases and not state.terms.pinned
        }
        stay = [held[name].cost for name in held if name not in idle]
        everyone = [holding.cost for holding in held.values()]
        assert self.admission.excess(everyone) == self.admission.excess(stay)

    def calm(self) -> None:
        """Let messages be read and workers get on, in a fair order, until only leases and time go on."""
        self._repeat(self._happen_once)

    def settle(self) -> None:
        """Let everything happen, leases be returned and time go by, until nothing is left to do."""
        self._repeat(lambda: self._happen_once() or self._return_one() or self._wait_once())

    @staticmethod
    def _repeat(happen: Callable[[], bool]) -> None:
        for _ in range(10_000):
            if not happen():
                return
        message = "the world does not come to rest"
        raise AssertionError(message)

    def _happen_once(self) -> bool:
        for name in list(self.models):
            if name in self.models and self.models[name].inbox:
                self.deliver(name)
                return True
        if self.loop_inbox:
            self.deliver_to_loop()
            return True
        for name, model in self.models.items():
            for number, at in list(model.workers.items()):
                if at is Worker.STARTING:
                    self.worker_ready(name, number)
                    return True
                if at in {Worker.STOPPING, Worker.ENDING}:
                    self.worker_fails(name, number, "")
                    return True
                if at is Worker.SUSPENDING:
                    self.worker_sleeps(name, number)
                    return True
        return False

    def _return_one(self) -> bool:
        for name, model in self.models.items():
            for caller in model.holders:
                self.give_back(name, caller)
                return True
        return False

    def _wait_once(self) -> bool:
        phases = {model.state.phase for model in self.models.values()}
        restless = bool(self.pending) or bool(phases & (COMING_UP | GOING_DOWN))
        if restless:
            # Nobody uses anything and no message is on its way: only a pause between two starts may be why.
            assert Phase.BACKOFF in phases, "somebody waits for nothing but a time-out"
        return restless and self._pass_time_to_next()

    def _pass_time_to_next(self) -> bool:
        times = [
            deadline
            for model in self.models.values()
            for deadline, _, fired in model.timers.values()
            if not fired
        ]
        if self.wake_at is not None and self.wake_at > self.now:
            times.append(self.wake_at)
        if not times:
            return False
        self.pass_time(max(0.0, min(times) - self.now))
        return True

    def _decide(self) -> None:
        def look(name: str) -> Look | None:
            model = self.models.get(name)
            if model is None:
                return None
            state = model.state
            return Look(
                state.ticket,
                state.phase,
                state.cause,
                state.leases,
                model.last_use,
                state.ready_at,
                float(model.size),
                state.terms,
                state.stay,
            )

        orders, self.wake_at = self.residency.decide(look, self.now)
        held = {name: holding.cost for name, holding in self.residency.held.items()}
        overrun = self.admission.excess(held.values()) != NO_EXCESS
        wanted_by = {model_of(order.model) for order in orders if isinstance(order.message, m.Admitted)}
        wanted_by |= {model_of(name) for name in self.residency.waiting}
        for order in orders:
            if isinstance(order.message, m.Admitted):
                others = [cost for name, cost in held.items() if name != order.model]
                assert self.admission.fits(others, held[order.model]), "who is let in has room"
            if isinstance(order.message, m.EvictAsked) and not overrun:
                assert wanted_by - {model_of(order.model)}, "a replica never goes for another of its model"
            if order.model in self.models:
                self.tell(order.model, order.message)

    # One step, and its rules

    def _step(self, name: str, event: m.Event, own: deque[m.Event]) -> None:
        model = self.models[name]
        old = model.state
        if isinstance(event, m.CallerLeft) and event.caller in model.arrived:
            model.arrived.remove(int(str(event.caller)))
        if isinstance(event, m.AcquireAsked):
            model.arrived.append(int(str(event.caller)))
        new, effects, why = step(old, event, self.now, LIMITS)
        model.state = new
        if new.leases != old.leases:
            model.last_use = self.now
        assert (new.phase is old.phase) or why, "a change of phase needs a reason for the log"
        if isinstance(event, m.EvictAsked) and m.EvictionRefused(event.ticket) not in effects:
            assert new.phase in {Phase.DRAINING, Phase.STOPPING}, "a chosen victim grants nothing any more"
            assert not old.terms.pinned, "pinned models stay"
        for effect in effects:
            self._carry_out(name, effect, own)
        assert not new.leases or new.phase in {Phase.READY, Phase.DRAINING, Phase.STOPPING}
        assert not new.waiters or new.phase is not Phase.READY
        assert len(new.waiters) <= WAITERS_MAX

    def _carry_out(self, name: str, effect: m.Effect, own: deque[m.Event]) -> None:
        model = self.models[name]
        match effect:
            case m.Grant():
                assert model.state.phase is Phase.READY, "leases are only of loaded models"
                assert model.workers or model.inbox, "there was a worker, whose death is known at most"
                for caller in effect.callers:
                    self._grant(model, int(str(caller)), effect.load_number)
            case m.Refuse() | m.RefuseLoad():
                if effect.caller in model.arrived:
                    model.arrived.remove(int(str(effect.caller)))
                self._answer(int(str(effect.caller)), effect.failure.reason)
            case m.AnswerLoaded():
                self._answer(int(str(effect.caller)), "loaded")
            case m.JoinLoad():
                model.view.append(int(str(effect.caller)))
            case m.EndLoad():
                for caller in model.view:
                    self._answer(caller, "loaded" if effect.failure is None else effect.failure.reason)
                model.view = []
            case m.AnswerUnload():
                assert model.state.phase in {Phase.UNLOADED, Phase.FAILED}
                for caller in effect.callers:
                    self._answer(int(str(caller)), "unloaded")
            case m.StartWorker():
                assert not model.workers, "one worker for a model"
                self._start(model, effect.load_number)
            case m.WakeWorker():
                assert all(at is Worker.ASLEEP for at in model.workers.values()), "only sleepers are woken"
                model.workers.clear()
                self._start(model, effect.load_number)
            case m.SuspendWorker():
                # Leases of a worker that has died are void, whether they have been returned or not.
                used = effect.load_number in model.holders.values()
                assert not used, "a model with a lease is not put to sleep"
                if effect.load_number in model.workers:
                    model.workers[effect.load_number] = Worker.SUSPENDING
            case m.AnswerSleep():
                for caller in effect.callers:
                    self._answer(int(str(caller)), "slept")
            case m.StopWorker():
                self._stop_worker(name, model, effect)
            case m.SetTimer():
                self._serial += 1
                model.timers[effect.timer] = (self.now + effect.seconds, self._serial, False)
            case m.ClearTimers():
                for timer in effect.timers:
                    model.timers.pop(timer, None)
            case m.Resume():
                own.append(m.Resumed())
            case m.Vanish():
                assert not model.workers
                self._turn_away(name)
            case m.Closed():
                model.closed = True
            case m.Expect():
                self.expected[name] = effect.wish
            case m.Remember():
                self.remembered[name] = effect.wish
            case m.WarnLoad():
                pass
            case _:
                self._tell_loop(name, effect)

    def _grant(self, model: Model, caller: int, load_number: int) -> None:
        assert model.arrived[0] == caller, "first come, first served"
        model.arrived.pop(0)
        self.granted.append(caller)
        if self.answers.get(caller) == "left":
            model.inbox.append(m.LeaseReturned(load_number))
            return
        self._answer(caller, "granted")
        model.holders[caller] = load_number

    def _stop_worker(self, name: str, model: Model, effect: m.StopWorker) -> None:
        held = [caller for caller, number in model.holders.items() if number == effect.load_number]
        if model.state.cause in VOLUNTARY:
            assert not held, "a model with a lease is never evicted"
        if model.workers:
            (number,) = model.workers
            slept = model.workers[number] is Worker.ASLEEP
            model.workers[number] = Worker.ENDING if slept else Worker.STOPPING
        else:
            self.tell(name, m.WorkerReaped(effect.load_number))

    def _start(self, model: Model, load_number: int) -> None:
        model.workers[load_number] = Worker.STARTING
        awake = sum(
            at not in WITHOUT_MODEL for other in self.models.values() for at in other.workers.values()
        )
        enough = not self.models_max or awake <= self.models_max
        assert enough or self.shrunk, "no more workers than models_max"

    def _tell_loop(self, name: str, effect: m.Effect) -> None:
        model = self.models[name]
        match effect:
            case m.Enter():
                cost = self.admission.predicted({RAM: model.size}, model.state.terms, model_of(name))
                self.loop_inbox.append(Entered(name, effect.ticket, cost))
            case m.Commit():
                self.loop_inbox.append(Committed(name, effect.ticket, model.taken))
            case m.Asleep():
                self.loop_inbox.append(Slept(name, effect.ticket, ASLEEP_SIZE))
            case m.Releasing():
                self.loop_inbox.append(Leaving(name, effect.ticket))
            case m.Leave():
                self.loop_inbox.append(Left(name, effect.ticket))
            case m.EvictionRefused():
                self.loop_inbox.append(Stayed(name, effect.ticket))
            case m.LookAgain():
                self.loop_inbox.append(Looked())
            case _:
                message = f"nobody carries out {effect}"
                raise AssertionError(message)

    def _turn_away(self, name: str) -> None:
        """Do as an actor that has ended does with what is still in its inbox."""
        model = self.models.pop(name)
        for event in model.inbox:
            if isinstance(event, m.AcquireAsked | m.LoadAsked | m.UnloadAsked | m.SleepAsked):
                self._answer(int(str(event.caller)), model_not_found(name).reason)

    def _caller(self) -> int:
        self._callers += 1
        self.pending.add(self._callers)
        return self._callers

    def _answer(self, caller: int, answer: str) -> None:
        if self.answers.get(caller) == "left":
            return
        assert caller not in self.answers, f"caller {caller} was answered twice"
        self.answers[caller] = answer
        self.pending.discard(caller)
