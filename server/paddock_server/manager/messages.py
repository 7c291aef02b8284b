"""What an actor is told (events) and what it decides to do (effects).

Events come into an actor's inbox; `transitions.step` turns each into a new state and effects; the actor
carries the effects out. A caller is whatever the answer goes to: the pure parts only hold it and hand it
back.

Two numbers keep late messages apart from timely ones: the ticket names one stay in memory (from asking for
admission to being reaped), the load number one load of that stay (a worker that is restarted gets the next).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import TypeAlias

from paddock_server.manager.failure import Failure
from paddock_server.manager.options import NO_WISH, Options, Terms, Wish

Caller: TypeAlias = Hashable


class Conflict(Enum):
    """What to do when a model is loaded with other options than asked for."""

    FAIL = auto()
    KEEP = auto()
    RELOAD = auto()


class Timer(StrEnum):
    """The clocks an actor may have running, one of each at most."""

    ADMISSION = "admission"
    LOAD = "load"
    RESTART = "restart"
    DRAIN = "drain"
    IDLE = "idle"
    SLEEP = "sleep"
    SUSPEND = "suspend"


# Events


@dataclass(frozen=True, slots=True)
class NextLoad:
    """A load to begin: now, or as soon as the worker that is being stopped is gone."""

    options: Options
    explicit: bool
    timeout_seconds: float | None = None
    wish: Wish = NO_WISH
    """Which of the options somebody has set; the others are the defaults."""


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """Somebody calls Load."""

    caller: Caller
    wish: Wish
    conflict: Conflict = Conflict.FAIL
    timeout_seconds: float | None = None
    explicit: bool = True
    """Whether an operator wants it, so that it is to come back after a restart of the server."""

    planned: NextLoad | None = None
    """What a load that begins is to be, where that is decided for several replicas together; else it is what
    the wish leaves of the defaults."""


@dataclass(frozen=True, slots=True)
class AcquireAsked:
    """A request wants a lease."""

    caller: Caller
    autoload: bool


@dataclass(frozen=True, slots=True)
class CallerLeft:
    """A request that asked for a lease does not want it any more."""

    caller: Caller
    moved: bool = False
    """Whether it waits at another replica instead: then there is demand for this one still."""


@dataclass(frozen=True, slots=True)
class DemandGone:
    """Nobody waits for the model any more, at any replica."""


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """A request is through with the model."""

    load_number: int
    keep_alive_seconds: float = 0.0
    """How long it wants the model kept from now on, whatever the idle time-outs say."""


@dataclass(frozen=True, slots=True)
class SleepAsked:
    """Somebody calls Sleep."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class TermsSet:
    """The terms have changed on which the model stays in memory."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """Somebody calls Unload."""

    caller: Caller
    force: bool
    drain_seconds: float
    only_load_id: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """There is room for the model, and it is reserved."""

    ticket: int


@dataclass(frozen=True, slots=True)
class AdmissionRefused:
    """There will be no room for the model."""

    ticket: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """Another model wants the room. With `when_drained` it waits for the running requests."""

    ticket: int
    when_drained: bool


@dataclass(frozen=True, slots=True)
class EvictionRelented:
    """The other model does not want the room any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The worker serves."""

    load_number: int
    effective: Options


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The worker could not be started or could not load; nothing is left of it."""

    load_number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class WorkerSlept:
    """The worker has given its memory back and waits to load again."""

    load_number: int


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A worker that served or slept is gone, and nobody had asked for it."""

    load_number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class WorkerReaped:
    """The worker that was to be stopped is gone."""

    load_number: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer has run out. `serial` tells the timer set last from one that was too late to clear."""

    timer: Timer
    serial: int = 0

    stage: str = "spawn"
    """Stage a load with a worker is at, for what is said of it when it stalls."""


@dataclass(frozen=True, slots=True)
class FileFound:
    """The model's file is there, and is new or other than before."""

    defaults: Options
    problem: Failure | None
    reloading: bool = False
    """Whether a load under way is to be brought in line with it."""

    other_file: bool = False
    """While reloading: whether a worker has read other files than are there now."""


@dataclass(frozen=True, slots=True)
class DefaultsSet:
    """The server's own settings have changed: times count at once, the rest from the next load on."""

    defaults: Options


@dataclass(frozen=True, slots=True)
class FileGone:
    """The model's file is not there any more."""

    reloading: bool = False
    """Whether a load under way is to end."""


@dataclass(frozen=True, slots=True)
class CloseAsked:
    """The server stops."""

    drain_seconds: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The model is at rest again: see who wants it next. An actor tells it to itself."""


Event: TypeAlias = (
    LoadAsked
    | AcquireAsked
    | CallerLeft
    | DemandGone
    | LeaseReturned
    | SleepAsked
    | TermsSet
    | UnloadAsked
    | Admitted
    | AdmissionRefused
    | EvictAsked
    | EvictionRelented
    | WorkerReady
    | StartFailed
    | WorkerSlept
    | WorkerDied
    | WorkerReaped
    | TimerFired
    | FileFound
    | DefaultsSet
    | FileGone
    | CloseAsked
    | Resumed
)


# Effects


@dataclass(frozen=True, slots=True)
class Enter:
    """Ask the manager loop for room."""

    ticket: int
    options: Options


@dataclass(frozen=True, slots=True)
class Commit:
    """Tell the manager loop that the model is loaded, so that it can be measured."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Releasing:
    """Tell the manager loop that the room will be free as soon as the worker is gone."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Give the room back, or the place in the queue for it."""

    ticket: int


@dataclass(frozen=True, slots=True)
class EvictionRefused:
    """Tell the manager loop that the model stays: it is in use."""

    ticket: int


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Tell the manager loop that the model has become idle, or stays after all."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker and have it load."""

    load_number: int
    options: Options


@dataclass(frozen=True, slots=True)
class SuspendWorker:
    """Have the worker give its memory back and stay."""

    load_number: int


@dataclass(frozen=True, slots=True)
class WakeWorker:
    """Have a worker that sleeps load again."""

    load_number: int
    options: Options


@dataclass(frozen=True, slots=True)
class Asleep:
    """Tell the manager loop that the model sleeps, so that it can be measured."""

    ticket: int


@dataclass(frozen=True, slots=True)
class AnswerSleep:
    """Tell callers of Sleep what has become of the model."""

    callers: tuple[Caller, ...]


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Stop the worker, in whatever it is doing; streams that still run end with `reason`."""

    load_number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Give each caller a lease."""

    callers: tuple[Caller, ...]
    load_number: int
    waited: bool = False
    """Whether they waited for the model to be loaded."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a caller of acquire or Unload why not."""

    caller: Caller
    failure: Failure


@dataclass(frozen=True, slots=True)
class JoinLoad:
    """Show a caller of Load the load that runs or is to come."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class AnswerLoaded:
    """Tell a caller of Load that the model is loaded already."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class RefuseLoad:
    """Tell a caller of Load why not."""

    caller: Caller
    failure: Failure


@dataclass(frozen=True, slots=True)
class WarnLoad:
    """Tell everyone who watches the load of something that does not end it."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class EndLoad:
    """End the load for everyone who watches it: well, or with a failure."""

    failure: Failure | None


@dataclass(frozen=True, slots=True)
class AnswerUnload:
    """Tell callers of Unload that the model is unloaded."""

    callers: tuple[Caller, ...]
    aborted: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Start a timer; one that runs already starts over."""

    timer: Timer
    seconds: float


@dataclass(frozen=True, slots=True)
class ClearTimers:
    """Stop timers; those that do not run are none the worse for it."""

    timers: tuple[Timer, ...]


@dataclass(frozen=True, slots=True)
class Expect:
    """Keep over a restart that an operator's load is on its way, and the options that were set."""

    wish: Wish


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep what the operator wants of the model over a restart: the options that were set, or None for
    nothing."""

    wish: Wish | None


@dataclass(frozen=True, slots=True)
class Resume:
    """Tell yourself `Resumed`."""


@dataclass(frozen=True, slots=True)
class Vanish:
    """The model is gone for good."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The actor has nothing left to do before the server stops."""


Effect: TypeAlias = (
    Enter
    | Commit
    | Releasing
    | Leave
    | EvictionRefused
    | LookAgain
    | StartWorker
    | SuspendWorker
    | WakeWorker
    | Asleep
    | AnswerSleep
    | StopWorker
    | Grant
    | Refuse
    | JoinLoad
    | AnswerLoaded
    | RefuseLoad
    | WarnLoad
    | EndLoad
    | AnswerUnload
    | SetTimer
    | ClearTimers
    | Expect
    | Remember
    | Resume
    | Vanish
    | Closed
)
