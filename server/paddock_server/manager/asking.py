"""What callers ask of a model: Load, a lease, Unload. The handlers of their events. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from paddock_server.manager import failure as failures
from paddock_server.manager.messages import (
    AnswerLoaded,
    AnswerSleep,
    AnswerUnload,
    ClearTimers,
    Conflict,
    Expect,
    Grant,
    JoinLoad,
    NextLoad,
    Refuse,
    RefuseLoad,
    Remember,
)
from paddock_server.manager.options import NO_WISH, Wish
from paddock_server.manager.state import AT_REST, COMING_UP, GOING_DOWN, NEVER, UNUSED, Cause, Phase
from paddock_server.manager.turn import IDLE_TIMERS

if TYPE_CHECKING:
    from paddock_server.manager.messages import (
        AcquireAsked,
        Caller,
        CallerLeft,
        DefaultsSet,
        DemandGone,
        LeaseReturned,
        LoadAsked,
        SleepAsked,
        UnloadAsked,
    )
    from paddock_server.manager.options import Options
    from paddock_server.manager.state import ActorState
    from paddock_server.manager.turn import Turn


def load_asked(turn: Turn, event: LoadAsked) -> None:
    """Answer a call of Load."""
    state = turn.state
    if state.closing:
        turn.do(RefuseLoad(event.caller, failures.shutting_down()))
    elif state.gone and state.phase in UNUSED:
        turn.do(RefuseLoad(event.caller, failures.model_not_found(state.model)))
    elif state.phase in UNUSED:
        turn.do(JoinLoad(event.caller))
        turn.begin(_wanted(turn, event), "load_asked")
    elif state.phase in COMING_UP:
        if _joins(turn, event, state.options):
            turn.set(explicit=state.explicit or event.explicit, wish=_kept(state.wish, event))
            if event.explicit:
                turn.do(Expect(turn.state.wish))
    elif state.phase is Phase.READY:
        _load_of_ready(turn, event)
    elif state.next_load is None:
        turn.do(JoinLoad(event.caller))
        _load_next(turn, _wanted(turn, event))
    elif _joins(turn, event, state.next_load.options):
        wish = _kept(state.next_load.wish, event)
        _load_next(turn, replace(state.next_load, wish=wish))


def _load_next(turn: Turn, load: NextLoad) -> None:
    """Begin a load once the worker is gone that is on its way out."""
    turn.set(next_load=load)
    if load.explicit:
        turn.do(Expect(load.wish))


def _kept(wish: Wish, event: LoadAsked) -> Wish:
    """Return what is set once a call has agreed to a load; one that takes any options sets none."""
    return wish if event.conflict is Conflict.KEEP else wish.and_then(event.wish)


def _wanted(turn: Turn, event: LoadAsked) -> NextLoad:
    state = turn.state
    if event.planned is not None:
        return replace(event.planned, explicit=event.explicit, timeout_seconds=event.timeout_seconds)
    wish = state.wish.and_then(event.wish) if state.asleep else event.wish
    return NextLoad(wish.filled(state.defaults), event.explicit, event.timeout_seconds, wish)


def _joins(turn: Turn, event: LoadAsked, options: Options) -> bool:
    fields = event.wish.conflicts(options, None)
    if fields and event.conflict is not Conflict.KEEP:
        turn.do(RefuseLoad(event.caller, failures.load_in_progress(turn.state.model, fields)))
        return False
    turn.do(JoinLoad(event.caller))
    return True


def _load_of_ready(turn: Turn, event: LoadAsked) -> None:
    state = turn.state
    fields = event.wish.conflicts(state.options, state.effective)
    if fields and event.conflict is Conflict.RELOAD:
        turn.do(JoinLoad(event.caller))
        _load_next(turn, _wanted(turn, event))
        turn.drain(Cause.RELOAD, turn.limits.drain_seconds)
    elif fields and event.conflict is Conflict.FAIL:
        turn.do(RefuseLoad(event.caller, failures.options_conflict(state.model, fields)))
    else:
        if event.conflict is not Conflict.KEEP:
            _set_in_place(turn, event.wish)
        turn.set(explicit=state.explicit or event.explicit, wish=_kept(state.wish, event))
        remember_load(turn)
        turn.do(AnswerLoaded(event.caller))


def _set_in_place(turn: Turn, wish: Wish) -> None:
    state = turn.state
    change = Wish({}, wish.in_place)
    if change.filled(state.options) == state.options:
        return
    turn.set(options=change.filled(state.options))
    if state.effective is not None:
        turn.set(effective=change.filled(state.effective))
    if state.leases == 0:
        turn.do(ClearTimers(IDLE_TIMERS))
        turn.idle()


def follow_defaults(turn: Turn, *, other_file: bool) -> None:
    """Bring a model in line with defaults that a reload has changed; what somebody has set stays.

    Only other files or load options cost a load: an idle time-out or the number of replicas changes in place.
    """
    state = turn.state
    if state.next_load is not None:
        options = state.next_load.wish.filled(state.defaults)
        turn.set(next_load=replace(state.next_load, options=options))
    options = state.wish.filled(state.defaults)
    in_place = Wish({}, options.in_place)
    if state.phase in AT_REST or (options == state.options and not other_file):
        return
    if state.phase in {Phase.SUSPENDING, Phase.SLEEPING}:
        turn.set(options=options)  # It reads its files and options anew when it wakes.
    elif options == in_place.filled(state.options) and not other_file:
        if state.phase is Phase.READY:
            _set_in_place(turn, in_place)
        else:
            turn.set(options=options)
    elif state.next_load is None and state.phase is not Phase.STOPPING:
        turn.set(outdated=options)
        if state.phase is Phase.READY:
            turn.catch_up()


def defaults_set(turn: Turn, event: DefaultsSet) -> None:
    """Take over other defaults: a load that is there takes those alone that need no other load."""
    state = turn.state
    turn.set(defaults=event.defaults)
    if state.next_load is not None:
        options = state.next_load.wish.filled(event.defaults)
        turn.set(next_load=replace(state.next_load, options=options))
    in_place = Wish({}, state.wish.filled(event.defaults).in_place)
    if state.phase is Phase.READY:
        _set_in_place(turn, in_place)
    elif state.phase not in AT_REST:
        turn.set(options=in_place.filled(state.options))


def remember_load(turn: Turn) -> None:
    """Keep an operator's load over a restart of the server: it has come to something."""
    state = turn.state
    if state.explicit:
        turn.set(remembered=state.wish)
        turn.do(Remember(state.wish))


def acquire_asked(turn: Turn, event: AcquireAsked) -> None:
    """Answer a request that wants a lease."""
    state = turn.state
    if state.closing:
        turn.do(Refuse(event.caller, failures.shutting_down()))
    elif state.phase is Phase.READY:
        grant(turn, (event.caller,), waited=False)
    elif state.phase in UNUSED:
        _acquire_at_rest(turn, event)
    elif state.phase in GOING_DOWN and state.next_load is None and not event.autoload:
        turn.do(Refuse(event.caller, failures.model_not_loaded(state.model)))
    elif len(state.waiters) >= turn.limits.waiters_max:
        turn.do(Refuse(event.caller, failures.queue_full(state.model, len(state.waiters))))
    else:
        turn.set(waiters=(*state.waiters, event.caller))


def _acquire_at_rest(turn: Turn, event: AcquireAsked) -> None:
    state = turn.state
    refusal = state.refusal(turn.now)
    if state.gone:
        turn.do(Refuse(event.caller, failures.model_not_found(state.model)))
    elif refusal is not None:
        turn.do(Refuse(event.caller, refusal))
    elif not event.autoload and state.phase is not Phase.SLEEPING:
        turn.do(Refuse(event.caller, failures.model_not_loaded(state.model)))
    else:
        turn.set(waiters=(*state.waiters, event.caller))
        turn.begin(autoload(state), "request")


def autoload(state: ActorState) -> NextLoad:
    """Return the load that requests begin: as it was before it fell asleep, as the operator had it, or with
    the defaults."""
    if state.asleep:
        return NextLoad(state.options, explicit=False, wish=state.wish)
    wish = NO_WISH if state.remembered is None else state.remembered
    return NextLoad(wish.filled(state.defaults), explicit=False, wish=wish)


def grant(turn: Turn, callers: tuple[Caller, ...], *, waited: bool) -> None:
    """Give callers leases of a ready model."""
    state = turn.state
    if state.leases == 0:
        turn.do(ClearTimers(IDLE_TIMERS))
    turn.set(leases=state.leases + len(callers))
    turn.do(Grant(callers, state.load_number, waited))


def caller_left(turn: Turn, event: CallerLeft) -> None:
    """Forget a request that does not wait any more; the last one takes its place in the queue with it."""
    state = turn.state
    if event.caller not in state.waiters:
        return
    turn.set(waiters=tuple(caller for caller in state.waiters if caller != event.caller))
    if not event.moved:
        demand_gone(turn)


def demand_gone(turn: Turn, event: DemandGone | None = None) -> None:
    """Give up a place in the queue that nobody waits for."""
    del event
    state = turn.state
    if state.phase is Phase.ADMITTING and not state.waiters and not state.explicit:
        turn.withdraw(Phase.UNLOADED, "nobody_waits")


def lease_returned(turn: Turn, event: LeaseReturned) -> None:
    """Count a request out."""
    state = turn.state
    if event.load_number != state.load_number or state.leases == 0:
        return
    keep_until = max(state.keep_until, turn.now + event.keep_alive_seconds)
    turn.set(leases=state.leases - 1, keep_until=keep_until)
    if turn.state.leases:
        return
    if state.phase is Phase.READY:
        turn.idle()
    elif state.phase is Phase.DRAINING:
        turn.stop(state.cause)


def sleep_asked(turn: Turn, event: SleepAsked) -> None:
    """Answer a call of Sleep. A model that is not loaded has nothing to give back."""
    state = turn.state
    if state.phase is Phase.READY and state.leases:
        turn.do(Refuse(event.caller, failures.model_in_use(state.model, state.leases)))
    elif state.phase is Phase.READY:
        turn.set(sleeps=(event.caller,))
        turn.suspend()
    elif state.phase is Phase.SUSPENDING:
        turn.set(sleeps=(*state.sleeps, event.caller))
    elif state.phase is Phase.SLEEPING:
        turn.do(AnswerSleep((event.caller,)))
    else:
        turn.do(Refuse(event.caller, failures.model_not_loaded(state.model)))


def unload_asked(turn: Turn, event: UnloadAsked) -> None:
    """Answer a call of Unload. It calls off whatever was asked for before it."""
    state = turn.state
    if event.only_load_id and state.load_id and event.only_load_id != state.load_id:
        turn.do(
            Refuse(event.caller, failures.load_id_mismatch(state.model, event.only_load_id, state.load_id))
        )
        return
    turn.set(remembered=None)
    turn.do(Remember(None))
    if state.phase is Phase.UNLOADED:
        turn.do(AnswerUnload((event.caller,), 0))
        return
    turn.set(unloads=(*state.unloads, event.caller), crash_count=0)
    if state.held_until != NEVER:
        turn.set(held_until=0.0)
    _UNLOADS[state.phase](turn, event)


def _unload_of_failed(turn: Turn, event: UnloadAsked) -> None:
    del event
    turn.rest(Phase.UNLOADED, Cause.UNLOAD)


def _unload_of_waiting(turn: Turn, event: UnloadAsked) -> None:
    del event
    turn.set(aborted=turn.call_off(failures.load_aborted(turn.state.model)))
    if turn.state.asleep:
        turn.stop(Cause.UNLOAD)
    else:
        turn.rest(Phase.UNLOADED, Cause.UNLOAD)


def _unload_of_starting(turn: Turn, event: UnloadAsked) -> None:
    del event
    turn.set(aborted=turn.call_off(failures.load_aborted(turn.state.model)))
    turn.stop(Cause.UNLOAD)


def _unload_of_ready(turn: Turn, event: UnloadAsked) -> None:
    if event.force:
        turn.abort_leases(Cause.UNLOAD)
    else:
        turn.drain(Cause.UNLOAD, event.drain_seconds)


def _unload_of_draining(turn: Turn, event: UnloadAsked) -> None:
    turn.set(aborted=turn.state.aborted + turn.call_off(failures.load_aborted(turn.state.model)))
    if event.force:
        turn.abort_leases(Cause.UNLOAD)
    else:
        turn.drain_no_longer_than(Cause.UNLOAD, event.drain_seconds)


def _unload_of_stopping(turn: Turn, event: UnloadAsked) -> None:
    del event
    turn.set(
        aborted=turn.state.aborted + turn.call_off(failures.load_aborted(turn.state.model)),
        cause=Cause.UNLOAD,
    )


_UNLOADS: Final[dict[Phase, Callable[[Turn, UnloadAsked], None]]] = {
    Phase.FAILED: _unload_of_failed,
    Phase.ADMITTING: _unload_of_waiting,
    Phase.BACKOFF: _unload_of_waiting,
    Phase.STARTING: _unload_of_starting,
    Phase.READY: _unload_of_ready,
    Phase.SUSPENDING: _unload_of_starting,
    Phase.SLEEPING: _unload_of_starting,
    Phase.DRAINING: _unload_of_draining,
    Phase.STOPPING: _unload_of_stopping,
}
