"""One step of an actor while it is being taken: the moves that several events share. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from paddock.errors import Reason
from paddock_server.manager import failure as failures
from paddock_server.manager.messages import (
    AnswerSleep,
    AnswerUnload,
    ClearTimers,
    EndLoad,
    Enter,
    Expect,
    Leave,
    LookAgain,
    NextLoad,
    Refuse,
    Releasing,
    Resume,
    SetTimer,
    StopWorker,
    SuspendWorker,
    Timer,
)
from paddock_server.manager.state import NEVER, Cause, Phase

if TYPE_CHECKING:
    from paddock_server.manager.failure import Failure
    from paddock_server.manager.messages import Effect
    from paddock_server.manager.state import ActorState, Limits

_ALL_TIMERS: Final = tuple(Timer)
IDLE_TIMERS: Final = (Timer.IDLE, Timer.SLEEP)
"""Run while a loaded model has no lease."""


class Turn:
    """A state on its way to the next one, and the effects collected on the way."""

    def __init__(self, state: ActorState, now: float, limits: Limits) -> None:
        self.state = state
        self.now = now
        self.limits = limits
        self.effects: list[Effect] = []
        self.why = ""

    def set(self, **changes: Any) -> None:
        """Change fields of the state."""
        self.state = replace(self.state, **changes)

    def do(self, *effects: Effect) -> None:
        """Add effects."""
        self.effects.extend(effects)

    def to(self, phase: Phase, why: str, **changes: Any) -> None:
        """Change the phase, with the reason for the log."""
        self.why = why
        self.set(phase=phase, **changes)

    def begin(self, load: NextLoad, why: str) -> None:
        """Begin a load at rest: ask for room."""
        state = self.state
        self.to(
            Phase.ADMITTING,
            why,
            keep_until=0.0,
            ticket=state.ticket + 1,
            load_number=state.load_number + 1,
            options=load.options,
            wish=load.wish,
            effective=None,
            explicit=load.explicit,
            load_timeout_seconds=load.timeout_seconds,
            begun_at=self.now,
            next_load=None,
            outdated=None,
            restarting=False,
            restart_count=0,
        )
        if state.asleep:
            self.do(ClearTimers(IDLE_TIMERS))
        else:
            self.set(stay=0)
        if load.explicit:
            self.set(crash_count=0, held_until=0.0)
            self.do(Expect(load.wish))
        if state.problem is not None:
            self.fail(state.problem)
            return
        self.do(Enter(self.state.ticket, load.options))
        if load.timeout_seconds is None:
            self.do(SetTimer(Timer.ADMISSION, self.limits.admission_timeout_seconds))
        else:
            self.do(SetTimer(Timer.LOAD, load.timeout_seconds))

    def idle(self) -> None:
        """Note that a loaded model has no lease left."""
        self.set(idle_since=self.now)
        state = self.state
        least = state.keep_until - self.now
        options = state.options
        times = (
            (Timer.IDLE, options.idle_timeout_seconds),
            (Timer.SLEEP, options.sleep_timeout_seconds),
        )
        for timer, seconds in times:
            if seconds > 0 and not state.terms.pinned:
                self.do(SetTimer(timer, max(seconds, least)))
        self.do(LookAgain())

    def idle_asleep(self) -> None:
        """Have the process of a model that sleeps go when the idle time-out passes from now on."""
        idle = self.state.options.idle_timeout_seconds
        if idle > 0 and not self.state.terms.pinned:
            self.do(SetTimer(Timer.IDLE, idle))

    def suspend(self) -> None:
        """Have the worker give its memory back."""
        self.to(Phase.SUSPENDING, Cause.SLEEP)
        self.do(
            ClearTimers((Timer.SLEEP,)),
            SetTimer(Timer.SUSPEND, self.limits.suspend_seconds),
            SuspendWorker(self.state.load_number),
        )

    def drain(self, cause: Cause, seconds: float) -> None:
        """Let the running requests end, then stop. With `NEVER` they may take as long as they like."""
        if self.state.leases == 0:
            self.stop(cause)
            return
        self.to(Phase.DRAINING, cause, cause=cause, drain_until=self.now + seconds)
        self.do(ClearTimers(IDLE_TIMERS))
        if seconds != NEVER:
            self.do(SetTimer(Timer.DRAIN, seconds))

    def drain_no_longer_than(self, cause: Cause, seconds: float) -> None:
        """Bring a drain under way to an end for another cause, at the earlier of the two times."""
        self.set(cause=cause)
        if self.now + seconds < self.state.drain_until:
            self.set(drain_until=self.now + seconds)
            self.do(SetTimer(Timer.DRAIN, seconds))

    def catch_up(self) -> None:
        """Load a model that is ready anew, if a reload has changed what it is to be loaded with."""
        options = self.state.outdated
        if options is not None:
            next_load = NextLoad(options, explicit=self.state.explicit, wish=self.state.wish)
            self.set(next_load=next_load, outdated=None)
            self.drain(Cause.RELOAD, self.limits.drain_seconds)

    def abort_leases(self, cause: Cause) -> None:
        """Stop at once; the requests that still run are aborted."""
        self.set(aborted=self.state.aborted + self.state.leases)
        self.stop(cause)

    def stop(self, cause: Cause) -> None:
        """Stop the worker. From here on nothing brings this load back."""
        waits = self.state.phase is Phase.ADMITTING
        self.to(Phase.STOPPING, cause, cause=cause, drain_until=NEVER)
        reason = Reason.SHUTTING_DOWN if self.state.closing else Reason.MODEL_UNLOADED
        self.do(
            ClearTimers(_ALL_TIMERS),
            Releasing(self.state.stay),
            StopWorker(self.state.load_number, reason),
        )
        if waits:
            self.do(Leave(self.state.ticket))

    def rest(self, phase: Phase, why: str) -> None:
        """Come to rest: no worker, no reservation. Then see who wants the model next."""
        state = self.state
        self.to(
            phase,
            why,
            leases=0,
            unloads=(),
            sleeps=(),
            aborted=0,
            drain_until=NEVER,
            explicit=False,
            asleep=0,
            stay=0,
        )
        self.do(ClearTimers(_ALL_TIMERS), Leave(state.stay or state.ticket))
        if state.unloads:
            self.do(AnswerUnload(state.unloads, state.aborted))
        if state.sleeps:
            self.do(AnswerSleep(state.sleeps))
        self.do(Resume())

    def withdraw(self, phase: Phase, why: str) -> None:
        """Come to rest without having got room. A worker that sleeps goes on sleeping."""
        if not self.state.asleep:
            self.rest(phase, why)
            return
        self.to(Phase.SLEEPING, why, explicit=False)
        self.do(ClearTimers(_ALL_TIMERS), Leave(self.state.ticket))
        self.idle_asleep()
        self.do(Resume())

    def fail(self, failure: Failure) -> None:
        """End the load under way with a failure: tell everyone who waits for it, and keep it."""
        self.hold(failure)
        self.do(EndLoad(failure))
        self.refuse_waiters(self.state.refusal(self.now) or failure)
        self.withdraw(Phase.FAILED, failure.reason)

    def hold(self, failure: Failure) -> None:
        """Keep a failure, and requests off until trying again makes sense."""
        policy = self.limits.restart
        if failure.is_permanent:
            delay = NEVER
        elif failure.reason == Reason.CRASH_LOOP:
            delay = policy.max_delay_seconds
        else:
            delay = policy.delay_seconds(self.state.crash_count)
        self.set(failure=failure, held_until=self.now + delay)

    def refuse_waiters(self, failure: Failure) -> None:
        """Tell every waiting request why it gets no lease."""
        self.do(*(Refuse(caller, failure) for caller in self.state.waiters))
        self.set(waiters=())

    def call_off(self, failure: Failure) -> int:
        """Call off what is wanted after or from the load under way; return how many requests that aborts."""
        aborted = len(self.state.waiters)
        self.refuse_waiters(failure)
        self.do(EndLoad(failure))
        self.set(next_load=None)
        return aborted

    def stall(self, stage: str) -> None:
        """End a load that takes too long."""
        state = self.state
        seconds = state.load_timeout_seconds
        if seconds is None:
            seconds = self.limits.admission_timeout_seconds
        failure = failures.load_stalled(state.model, stage, seconds)
        self.set(crash_count=state.crash_count + 1)
        if state.phase is not Phase.STARTING:
            self.fail(failure)
            return
        self.hold(failure)
        self.call_off(failure)
        self.stop(Cause.TIMEOUT)
