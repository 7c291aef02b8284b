"""The state machine of a model: (state, event) -> (state, effects). Pure.

    UNLOADED, FAILED -> ADMITTING -> STARTING -> READY -> DRAINING -> STOPPING -> UNLOADED
                          ^ |          |  ^        |                     ^  |
                          | |          v  |        |                     |  +-> FAILED (it took too long)
                          | +-> rest  BACKOFF <----+ (the worker died)   |
                          |            |           |                     |
                          |            +-> FAILED  |       an Unload of STARTING goes there too
                          |                        v
                          +-------- SLEEPING <- SUSPENDING

Every event is answered in every phase; one that comes too late changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paddock.errors import Reason
from paddock_server.manager import asking
from paddock_server.manager import failure as failures
from paddock_server.manager.messages import (
    AcquireAsked,
    AdmissionRefused,
    Admitted,
    AnswerSleep,
    Asleep,
    CallerLeft,
    ClearTimers,
    CloseAsked,
    Closed,
    Commit,
    DefaultsSet,
    DemandGone,
    EndLoad,
    EvictAsked,
    EvictionRefused,
    EvictionRelented,
    FileFound,
    FileGone,
    LeaseReturned,
    Leave,
    LoadAsked,
    LookAgain,
    NextLoad,
    Resume,
    Resumed,
    SetTimer,
    SleepAsked,
    StartFailed,
    StartWorker,
    TermsSet,
    Timer,
    TimerFired,
    UnloadAsked,
    Vanish,
    WakeWorker,
    WarnLoad,
    WorkerDied,
    WorkerReady,
    WorkerReaped,
    WorkerSlept,
)
from paddock_server.manager.state import (
    AT_REST,
    COMING_UP,
    NEVER,
    UNUSED,
    Cause,
    Phase,
)
from paddock_server.manager.turn import IDLE_TIMERS, Turn

if TYPE_CHECKING:
    from paddock_server.manager.messages import Effect, Event
    from paddock_server.manager.state import ActorState, Limits


class Step(NamedTuple):
    """What an event comes to."""

    state: ActorState
    effects: tuple[Effect, ...]
    """To be carried out in this order, after the state has been taken on."""

    why: str
    """Why the phase changed, for the log; empty when it did not."""


def step(state: ActorState, event: Event, now: float, limits: Limits) -> Step:
    """Answer an event. `now` is in seconds of the event loop's clock."""
    turn = Turn(state, now, limits)
    _HANDLERS[type(event)](turn, event)
    return Step(turn.state, tuple(turn.effects), turn.why)


def _admitted(turn: Turn, event: Admitted) -> None:
    state = turn.state
    if state.phase is not Phase.ADMITTING or event.ticket != state.ticket:
        return  # Whoever withdrew has left already, so the room is not lost.
    turn.to(Phase.STARTING, "admitted", stay=state.ticket, asleep=0)
    start = WakeWorker if state.asleep else StartWorker
    turn.do(ClearTimers((Timer.ADMISSION,)), start(state.load_number, state.options))


def _admission_refused(turn: Turn, event: AdmissionRefused) -> None:
    state = turn.state
    if state.phase is not Phase.ADMITTING or event.ticket != state.ticket:
        return
    if event.failure.reason != Reason.QUEUE_FULL:
        turn.fail(event.failure)
        return
    # Nothing is wrong with this model: the next request may find a place.
    turn.call_off(event.failure)
    turn.withdraw(Phase.UNLOADED, event.failure.reason)


def _evict_asked(turn: Turn, event: EvictAsked) -> None:
    state = turn.state
    if state.terms.pinned:
        turn.do(EvictionRefused(event.ticket))
    elif state.phase is Phase.SLEEPING and event.ticket == state.stay:
        turn.stop(Cause.EVICTION)
    elif state.asleep and state.phase is Phase.ADMITTING and event.ticket == state.stay:
        # Somebody who waits longer needs what its process takes. It queues again: each would else wait for
        # the other.
        if state.explicit:
            again = NextLoad(state.options, state.explicit, state.load_timeout_seconds, state.wish)
            turn.set(next_load=again)
        turn.stop(Cause.EVICTION)
    elif state.phase is not Phase.READY or event.ticket != state.stay:
        turn.do(EvictionRefused(event.ticket))
    elif state.leases == 0:
        turn.stop(Cause.EVICTION)
    elif event.when_drained:
        turn.drain(Cause.YIELD, NEVER)
    else:
        turn.do(EvictionRefused(event.ticket))


def _eviction_relented(turn: Turn, event: EvictionRelented) -> None:
    state = turn.state
    if state.phase is not Phase.DRAINING or state.cause is not Cause.YIELD or event.ticket != state.ticket:
        return
    _stay_after_all(turn)


def _terms_set(turn: Turn, event: TermsSet) -> None:
    pin_changes = event.terms.pinned != turn.state.terms.pinned
    turn.set(terms=event.terms)
    state = turn.state
    if event.terms.pinned and state.phase is Phase.DRAINING and state.cause is Cause.YIELD:
        turn.do(EvictionRefused(state.stay))
        _stay_after_all(turn)
    elif state.phase is Phase.READY and state.leases == 0:
        turn.do(ClearTimers(IDLE_TIMERS))
        turn.idle()
    else:
        if pin_changes and state.phase in {Phase.SUSPENDING, Phase.SLEEPING}:
            turn.do(ClearTimers((Timer.IDLE,)))
            turn.idle_asleep()
        turn.do(LookAgain())


def _stay_after_all(turn: Turn) -> None:
    """Serve on instead of yielding to another model."""
    state = turn.state
    if state.next_load is not None and state.next_load.options != state.options:
        # The model is to be loaded anew anyway.
        turn.drain_no_longer_than(Cause.RELOAD, turn.limits.drain_seconds)
        return
    waiters = state.waiters
    called = state.next_load is not None
    wish = state.wish if state.next_load is None else state.next_load.wish
    turn.to(
        Phase.READY,
        "eviction_relented",
        waiters=(),
        next_load=None,
        explicit=state.explicit or called,
        wish=wish,
    )
    if called:
        asking.remember_load(turn)
        turn.do(EndLoad(None))
    if waiters:
        asking.grant(turn, waiters, waited=True)
    turn.do(LookAgain())
    if state.outdated is not None:
        turn.do(Resume())


def _worker_ready(turn: Turn, event: WorkerReady) -> None:
    state = turn.state
    if state.phase is not Phase.STARTING or event.load_number != state.load_number:
        return
    waiters = state.waiters
    turn.to(
        Phase.READY,
        "loaded",
        effective=event.effective,
        waiters=(),
        leases=0,
        ready_at=turn.now,
        held_until=0.0,
        # A restart keeps it: the model would forget within a second why its worker died.
        failure=state.failure if state.restarting else None,
        restart_count=state.restart_count + state.restarting,
    )
    turn.do(ClearTimers((Timer.LOAD,)), Commit(state.ticket), EndLoad(None))
    asking.remember_load(turn)
    if waiters:
        asking.grant(turn, waiters, waited=True)
    else:
        turn.idle()
    if state.outdated is not None:
        turn.do(Resume())


def _start_failed(turn: Turn, event: StartFailed) -> None:
    state = turn.state
    if state.phase is not Phase.STARTING or event.load_number != state.load_number:
        return
    if event.failure.reason != Reason.WORKER_CRASHED:
        turn.set(crash_count=state.crash_count + 1)
        turn.fail(event.failure)
        return
    policy = turn.limits.restart if state.restarting else turn.limits.load_restart
    _restart(turn, event.failure, policy.after_crash(state.crash_count, served_seconds=0.0))


def _worker_died(turn: Turn, event: WorkerDied) -> None:
    state = turn.state
    if state.asleep and event.load_number == state.asleep:
        _sleeper_died(turn, event)
        return
    if event.load_number != state.load_number:
        return
    if state.phase in {Phase.DRAINING, Phase.SUSPENDING}:
        turn.set(failure=event.failure)
        turn.rest(Phase.UNLOADED, event.failure.reason)
    elif state.phase is Phase.READY:
        turn.set(
            leases=0, load_number=state.load_number + 1, effective=None, restarting=True, begun_at=turn.now
        )
        turn.do(ClearTimers(IDLE_TIMERS))
        served_seconds = turn.now - state.ready_at
        _restart(
            turn,
            event.failure,
            turn.limits.restart.after_crash(state.crash_count, served_seconds=served_seconds),
        )


def _sleeper_died(turn: Turn, event: WorkerDied) -> None:
    """A sleeping worker is no loss: the next load starts another."""
    state = turn.state
    if state.phase is Phase.SLEEPING:
        turn.set(failure=event.failure)
        turn.rest(Phase.UNLOADED, event.failure.reason)
    elif state.phase is Phase.ADMITTING:
        turn.set(asleep=0)
        turn.do(Leave(state.stay))


def _worker_slept(turn: Turn, event: WorkerSlept) -> None:
    state = turn.state
    if state.phase is not Phase.SUSPENDING or event.load_number != state.load_number:
        return
    turn.to(Phase.SLEEPING, "memory_given_back", asleep=state.load_number, sleeps=(), explicit=False)
    turn.do(ClearTimers((Timer.SUSPEND,)), Asleep(state.stay))
    if state.sleeps:
        turn.do(AnswerSleep(state.sleeps))
    turn.do(Resume())


def _restart(turn: Turn, failure: Any, restart: Any) -> None:
    """Start a worker again after a crash, or give up."""
    turn.set(crash_count=restart.crash_count)
    if restart.gives_up:
        turn.fail(failures.crash_loop(failure, turn.state.model, restart.crash_count))
        return
    turn.to(Phase.BACKOFF, failure.reason, failure=failure)
    turn.do(WarnLoad(failure), SetTimer(Timer.RESTART, restart.delay_seconds))


def _worker_reaped(turn: Turn, event: WorkerReaped) -> None:
    state = turn.state
    if state.phase is not Phase.STOPPING or event.load_number not in {state.load_number, state.asleep}:
        return
    turn.rest(Phase.FAILED if state.cause is Cause.TIMEOUT else Phase.UNLOADED, "stopped")


def _timer_fired(turn: Turn, event: TimerFired) -> None:
    state = turn.state
    match event.timer, state.phase:
        case Timer.ADMISSION | Timer.LOAD, Phase.ADMITTING:
            turn.stall("admit")
        case Timer.LOAD, Phase.STARTING:
            turn.stall(event.stage)
        case Timer.LOAD, Phase.BACKOFF:
            turn.stall("restart")
        case Timer.RESTART, Phase.BACKOFF:
            turn.to(Phase.STARTING, "backoff_over")
            turn.do(StartWorker(state.load_number, state.options))
        case Timer.DRAIN, Phase.DRAINING:
            turn.abort_leases(state.cause)
        case Timer.IDLE, Phase.READY if state.leases == 0:
            turn.stop(Cause.IDLE)
        case Timer.IDLE, Phase.SUSPENDING | Phase.SLEEPING:
            turn.stop(Cause.IDLE)
        case Timer.SLEEP, Phase.READY if state.leases == 0:
            turn.suspend()
        case Timer.SUSPEND, Phase.SUSPENDING:
            turn.stop(Cause.SLEEP)
        case _:
            pass


def _file_found(turn: Turn, event: FileFound) -> None:
    turn.set(defaults=event.defaults, problem=event.problem, gone=False, held_until=0.0)
    if event.reloading:
        asking.follow_defaults(turn, other_file=event.other_file)


def _file_gone(turn: Turn, event: FileGone) -> None:
    turn.set(gone=True)
    phase = turn.state.phase
    if phase in UNUSED:
        turn.do(Resume())
    elif event.reloading and phase is Phase.READY:
        turn.drain(Cause.RELOAD, turn.limits.drain_seconds)
    elif event.reloading and phase in COMING_UP:
        turn.call_off(failures.model_not_found(turn.state.model))
        if phase is Phase.STARTING or turn.state.asleep:
            turn.stop(Cause.RELOAD)
        else:
            turn.rest(Phase.UNLOADED, Cause.RELOAD)


def _close_asked(turn: Turn, event: CloseAsked) -> None:
    if turn.state.closing:
        if turn.state.phase is Phase.DRAINING and event.drain_seconds == 0:  # told again, to be quick
            turn.abort_leases(Cause.SHUTDOWN)
        return
    turn.set(closing=True)
    phase = turn.state.phase
    if phase in AT_REST:
        turn.do(Resume())
        return
    if phase is Phase.READY:
        turn.drain(Cause.SHUTDOWN, event.drain_seconds)
        return
    turn.call_off(failures.shutting_down())
    if phase is Phase.DRAINING:
        turn.drain_no_longer_than(Cause.SHUTDOWN, event.drain_seconds)
    elif phase in {Phase.STARTING, Phase.SUSPENDING, Phase.SLEEPING} or turn.state.asleep:
        turn.stop(Cause.SHUTDOWN)
    elif phase is not Phase.STOPPING:
        turn.rest(Phase.UNLOADED, Cause.SHUTDOWN)


def _resumed(turn: Turn, event: Resumed) -> None:
    del event
    state = turn.state
    if state.phase is Phase.READY:
        turn.catch_up()
    if state.phase is Phase.SLEEPING and state.gone:
        turn.stop(Cause.UNLOAD)
        return
    if state.phase not in UNUSED:
        return
    if state.closing:
        turn.do(Closed())
    elif state.gone:
        turn.call_off(failures.model_not_found(state.model))
        turn.do(Vanish())
    elif state.next_load is not None:
        turn.begin(state.next_load, "load_asked")
    elif state.waiters:
        refusal = state.refusal(turn.now)
        if refusal is None:
            turn.begin(asking.autoload(state), "request")
        else:
            turn.refuse_waiters(refusal)


_HANDLERS: Final[dict[type[Event], Callable[[Turn, Any], None]]] = {
    LoadAsked: asking.load_asked,
    AcquireAsked: asking.acquire_asked,
    CallerLeft: asking.caller_left,
    DemandGone: asking.demand_gone,
    LeaseReturned: asking.lease_returned,
    SleepAsked: asking.sleep_asked,
    TermsSet: _terms_set,
    UnloadAsked: asking.unload_asked,
    Admitted: _admitted,
    AdmissionRefused: _admission_refused,
    EvictAsked: _evict_asked,
    EvictionRelented: _eviction_relented,
    WorkerReady: _worker_ready,
    StartFailed: _start_failed,
    WorkerSlept: _worker_slept,
    WorkerDied: _worker_died,
    WorkerReaped: _worker_reaped,
    TimerFired: _timer_fired,
    FileFound: _file_found,
    DefaultsSet: asking.defaults_set,
    FileGone: _file_gone,
    CloseAsked: _close_asked,
    Resumed: _resumed,
}
"""One handler for each event."""
