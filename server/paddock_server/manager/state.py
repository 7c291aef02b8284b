"""What an actor knows. Pure values: only `transitions.step` makes new ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from paddock.v1 import model_pb2
from paddock_server.manager.failure import Failure
from paddock_server.manager.messages import Caller, NextLoad
from paddock_server.manager.options import NO_WISH, Options, Terms, Wish
from paddock_server.supervisor import RestartPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping


NEVER: Final = math.inf


class Phase(StrEnum):
    """Where a model is. Finer than `ModelState`, which is what the world sees of it."""

    UNLOADED = "unloaded"
    """No worker, no reservation."""

    ADMITTING = "admitting"
    """Waiting for room."""

    STARTING = "starting"
    """A worker starts or loads. From here to the end of STOPPING, room is reserved."""

    READY = "ready"
    """The worker serves. The only phase that grants leases."""

    BACKOFF = "backoff"
    """The worker died; the next one starts in a while."""

    SUSPENDING = "suspending"
    """The worker gives its memory back; no lease is granted."""

    SLEEPING = "sleeping"
    """The worker is there and holds no model. It loads again for the next request."""

    DRAINING = "draining"
    """Running requests end; no lease is granted."""

    STOPPING = "stopping"
    """The worker is being stopped."""

    FAILED = "failed"
    """No worker, no reservation; the last load failed."""


class Cause(StrEnum):
    """Why a model drains or stops."""

    UNLOAD = "unload"
    EVICTION = "eviction"
    YIELD = "yield"
    RELOAD = "reload"
    IDLE = "idle"
    SLEEP = "sleep"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"


PUBLIC_STATES: Final[Mapping[Phase, model_pb2.ModelState.ValueType]] = {
    Phase.UNLOADED: model_pb2.MODEL_STATE_UNLOADED,
    Phase.ADMITTING: model_pb2.MODEL_STATE_LOADING,
    Phase.STARTING: model_pb2.MODEL_STATE_LOADING,
    Phase.READY: model_pb2.MODEL_STATE_LOADED,
    Phase.BACKOFF: model_pb2.MODEL_STATE_LOADING,
    Phase.SUSPENDING: model_pb2.MODEL_STATE_UNLOADING,
    Phase.SLEEPING: model_pb2.MODEL_STATE_SLEEPING,
    Phase.DRAINING: model_pb2.MODEL_STATE_UNLOADING,
    Phase.STOPPING: model_pb2.MODEL_STATE_UNLOADING,
    Phase.FAILED: model_pb2.MODEL_STATE_FAILED,
}
"""What the world sees."""

AT_REST: Final = frozenset({Phase.UNLOADED, Phase.FAILED})
UNUSED: Final = AT_REST | {Phase.SLEEPING}
"""No model is in memory, and nothing is under way: a Load or a request begins a load."""

COMING_UP: Final = frozenset({Phase.ADMITTING, Phase.STARTING, Phase.BACKOFF})
GOING_DOWN: Final = frozenset({Phase.SUSPENDING, Phase.DRAINING, Phase.STOPPING})


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds the transitions keep to. Seconds."""

    waiters_max: int = 128
    drain_seconds: float = 30.0
    suspend_seconds: float = 30.0
    """How long a worker may take to give its memory back."""

    admission_timeout_seconds: float = 600.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    load_restart: RestartPolicy = field(default_factory=lambda: RestartPolicy(max_crash_count=2))


@dataclass(frozen=True, slots=True)
class ActorState:
    """One model's state. Times are in seconds of the event loop's clock."""

    model: str
    defaults: Options
    """Options of a load nobody set any for."""

    options: Options
    """What the current or latest load was started with; the defaults before the first."""

    load_id_prefix: str = ""
    """Makes load ids of different servers differ."""

    phase: Phase = Phase.UNLOADED
    ticket: int = 0
    """Names the latest stay in memory, from asking for room."""

    stay: int = 0
    """The ticket under which room is held: an earlier one while a sleeping model waits for room to wake."""

    load_number: int = 0

    asleep: int = 0
    """Load that the sleeping worker had; 0 when none sleeps."""

    effective: Options | None = None
    """What its worker made of it; None until it is loaded."""

    terms: Terms = field(default_factory=Terms)
    """On what terms it stays in memory, once it is there."""

    wish: Wish = NO_WISH
    """Which of `options` somebody has set; the others are the defaults."""

    remembered: Wish | None = None
    """What the operator set when loading the model, and wants it back with."""

    explicit: bool = False
    """Whether somebody called Load for the load: then it does not need a waiting request to go on."""

    load_timeout_seconds: float | None = None
    begun_at: float = 0.0
    ready_at: float = 0.0

    leases: int = 0
    waiters: tuple[Caller, ...] = ()
    """Requests that wait for a lease, first come first served."""

    next_load: NextLoad | None = None
    """A load that somebody called for while the worker was on its way out."""

    outdated: Options | None = None
    """What to load with anew once the load under way is done, because a reload has changed its options."""

    cause: Cause = Cause.UNLOAD
    """Why the model drains or stops; says nothing in other phases."""

    keep_until: float = 0.0
    """No idle time-out ends before: the latest that any request has asked for."""

    idle_since: float = 0.0
    """Since when idle time-outs count, while it is loaded without a lease: the end of its last use, its load,
    or the command that set them or took a pin off."""

    drain_until: float = NEVER
    unloads: tuple[Caller, ...] = ()
    """Callers of Unload, who are answered when the worker is gone."""

    sleeps: tuple[Caller, ...] = ()
    """Callers of Sleep, who are answered when the model sleeps, or will not."""

    aborted: int = 0
    """Requests the stop under way has aborted."""

    failure: Failure | None = None
    """Why the last load or the last worker failed."""

    held_until: float = 0.0
    """When requests may load the model again after a failure; `NEVER` until its file changes."""

    crash_count: int = 0
    """Crashes in a row."""

    restarting: bool = False
    """Whether the load replaces a worker that had served and died."""

    restart_count: int = 0
    """Workers that were replaced since somebody asked for the model."""

    problem: Failure | None = None
    """What the catalog found wrong with the file."""

    gone: bool = False
    """Whether the file has gone."""

    closing: bool = False
    """Whether the server stops."""

    @property
    def load_id(self) -> str:
        """The public name of the load; empty while unloaded."""
        if self.phase is Phase.UNLOADED:
            return ""
        return self.load_id_of(self.load_number)

    def load_id_of(self, load_number: int) -> str:
        """Return the public name of a load."""
        return f"{self.load_id_prefix}{load_number}"

    def refusal(self, now: float) -> Failure | None:
        """Return what requests are told that would load the model again too soon after a failure."""
        if self.failure is None or self.held_until <= now:
            return None
        return self.failure.after(None if self.held_until == NEVER else self.held_until - now)
