"""A model with replicas: which one a request goes to, what a Load asks of each, what the world sees. Pure.

A replica is named by its model and a number. Its id is for the manager alone; the first one's is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from paddock.v1 import model_pb2
from paddock_server.manager import failure as failures
from paddock_server.manager.messages import Conflict, NextLoad
from paddock_server.manager.options import NO_WISH
from paddock_server.manager.state import AT_REST, COMING_UP, GOING_DOWN, UNUSED, Phase

if TYPE_CHECKING:
    from collections.abc import Collection

    from paddock_server.manager.failure import Failure
    from paddock_server.manager.messages import LoadAsked
    from paddock_server.manager.options import Options, Wish
    from paddock_server.manager.state import ActorState

_SEPARATOR: Final = "\0"
"""Stands in no file name, and in no name that a configuration may give."""


def replica_id(model: str, number: int) -> str:
    """Return the id of a replica; `number` counts from 0."""
    return f"{model}{_SEPARATOR}{number}" if number else model


def model_of(replica: str) -> str:
    """Return the model a replica is of."""
    return replica.partition(_SEPARATOR)[0]


def shown_name(replica: str) -> str:
    """Return a replica as people read it: they count from 1, and the first goes by the model's name."""
    model, _, number = replica.partition(_SEPARATOR)
    return f"{model} (replica {int(number) + 1})" if number else model


# Where a request goes


class ReplicaView(NamedTuple):
    """What is known of a replica when a request comes."""

    phase: Phase
    serves: bool = False
    """Whether its worker serves, for all that is known."""

    demand: int = 0
    """Requests that use it, wait for it, or are on their way to it."""

    slot_count: int = 1
    held_off: bool = False
    """Whether it failed so lately that requests do not load it."""

    waiting: int = 0
    """Requests that wait for it."""

    retiring: bool = False
    """Whether it is one too many, and on its way out."""


HELD_OFF_SECONDS: Final = 10.0
"""Least time from a replica's load that failed to the next one that requests begin while others serve."""


def is_held_off(state: ActorState, now: float) -> bool:
    """Say whether a replica failed so lately that requests do not load it."""
    return state.refusal(now) is not None or (
        state.phase is Phase.FAILED and now < state.begun_at + HELD_OFF_SECONDS
    )


class Route(NamedTuple):
    """Where a request goes, by position."""

    replica: int
    load: tuple[int, ...] = ()
    """Which others are to be loaded, because there is demand for them."""


def route(replicas: Sequence[ReplicaView], tried: Collection[int] = ()) -> Route:
    """Choose the replica for a request: the least used that serves, else one that will soonest.

    `tried` have refused the request already; there must be another one.
    """
    left = {place: view for place, view in enumerate(replicas) if place not in tried}
    able = {place: view for place, view in left.items() if not view.retiring} or left
    spare = tuple(place for place, view in able.items() if view.phase in UNUSED and not view.held_off)
    place = min(able, key=lambda place: (_nearness(able[place]), able[place].demand, place))
    view = able[place]
    if view.serves:
        return Route(place, spare if view.demand >= view.slot_count else ())
    if place in spare:
        return Route(place, tuple(other for other in spare if other != place))
    return Route(place)


def may_try_another(replicas: Sequence[ReplicaView], tried: Collection[int]) -> bool:
    """Say whether a request that some have refused has a chance with another."""
    left = [view for place, view in enumerate(replicas) if place not in tried and not view.retiring]
    turned_out = any(replicas[place].retiring for place in tried)
    return bool(left) if turned_out else any(_nearness(view) <= _COMING for view in left)


def left_waiting(replicas: Sequence[ReplicaView]) -> tuple[int, ...]:
    """Return those whose waiting requests another is to serve: all that do not serve; those that load, only
    while another one has a free slot."""
    serving = [view for view in replicas if view.serves and not view.retiring]
    if not serving:
        return ()
    has_free_slot = any(view.demand < view.slot_count for view in serving)
    return tuple(
        place
        for place, view in enumerate(replicas)
        if view.waiting
        and not view.serves
        and (view.retiring or view.phase is not Phase.STARTING or has_free_slot)
    )


_COMING: Final = 1


def _nearness(view: ReplicaView) -> int:
    """Return how near a replica is to serving; 0 serves."""
    if view.serves:
        return 0
    if view.phase in COMING_UP or view.phase is Phase.READY:  # one of READY that has just died
        return _COMING
    if view.phase is Phase.SLEEPING and not view.held_off:
        return 2
    if view.phase in AT_REST and not view.held_off:
        return 3
    return 4 if view.phase in GOING_DOWN else 5


# What a Load asks of each


class LoadPlan(NamedTuple):
    """What a Load comes to."""

    replica_count: int
    begun: NextLoad
    """For replicas that have yet to begin, so that they come out like those that have."""


def is_about_one(states: Sequence[ActorState], wish: Wish) -> bool:
    """Say whether a Load is about a model with one replica and leaves it at that."""
    if len(states) > 1:
        return False
    state = states[0]
    options = state.defaults if state.phase in AT_REST else state.options
    return wish.filled(options).replica_count == 1


def plan_load(states: Sequence[ActorState], asked: LoadAsked) -> LoadPlan | Failure:
    """Decide for all replicas what a Load means; or return its refusal. `states` are of those that stay."""
    wish = asked.wish
    up = [state for state in states if state.phase in _UP or state.next_load is not None]
    if not up:
        asleep = [state.wish for state in states if state.phase is Phase.SLEEPING]
        return _plan((asleep[0] if asleep else NO_WISH).and_then(wish), states[0].defaults)
    live = min(up, key=lambda state: _LIVELIEST.get(state.phase, len(_LIVELIEST)))
    load = live.next_load or NextLoad(live.options, explicit=False, wish=live.wish)
    options = load.options
    fields = wish.conflicts(options, live.effective if live.next_load is None else None)
    recount = wish.replica_count not in {None, options.replica_count}
    conflicts = (*fields, *(["replica_count"] if recount else []))
    if conflicts and asked.conflict is Conflict.KEEP:
        return LoadPlan(options.replica_count, load)
    if conflicts and asked.conflict is Conflict.FAIL and live.phase is Phase.READY:
        return failures.options_conflict(live.model, conflicts)
    if (fields and any(state.phase is not Phase.READY for state in up)) or (
        recount and live.phase is not Phase.READY
    ):
        return failures.load_in_progress(live.model, conflicts)
    if fields:
        return _plan(wish, live.defaults)
    wanted = wish.filled(options)
    return LoadPlan(wanted.replica_count, NextLoad(wanted, explicit=False, wish=load.wish.and_then(wish)))


def to_be_checked(states: Sequence[ActorState], asked: LoadAsked) -> NextLoad | None:
    """Return the load that a Load would begin at the cost of what is loaded, so that it is only begun if it
    can ever fit; None where nothing would go for it, or where the manager loop finds out in time.

    One load beside others is refused by the loop before anybody goes. Several at once are refused there one
    by one, when others have gone for the first of them.
    """
    if not is_about_one(states, asked.wish):
        planned = plan_load(states, asked)
        if isinstance(planned, LoadPlan) and any(
            state.phase is not Phase.READY or state.options != planned.begun.options for state in states
        ):
            return planned.begun
        return None
    state, wish = states[0], asked.wish
    reloads = state.phase is Phase.READY and asked.conflict is Conflict.RELOAD
    if not (reloads and wish.conflicts(state.options, state.effective)):
        return None
    return NextLoad(wish.filled(state.defaults), explicit=False, wish=wish)


def _plan(wish: Wish, defaults: Options) -> LoadPlan:
    options = wish.filled(defaults)
    return LoadPlan(options.replica_count, NextLoad(options, explicit=False, wish=wish))


_UP: Final = COMING_UP | {Phase.READY, Phase.SUSPENDING}
_LIVELIEST: Final = {Phase.READY: 0, Phase.STARTING: 1, Phase.ADMITTING: 2, Phase.BACKOFF: 3}


# What the world sees

_STATES: Final = (
    model_pb2.MODEL_STATE_LOADED,
    model_pb2.MODEL_STATE_LOADING,
    model_pb2.MODEL_STATE_UNLOADING,
    model_pb2.MODEL_STATE_SLEEPING,
    model_pb2.MODEL_STATE_FAILED,
    model_pb2.MODEL_STATE_UNLOADED,
)
"""The state of a model is the first of these that one of its replicas is in."""

_RANKS: Final[Mapping[model_pb2.ModelState.ValueType, int]] = {
    state: rank for rank, state in enumerate(_STATES)
}

_PHASES: Final = (
    model_pb2.MEMORY_PHASE_PREDICTED,
    model_pb2.MEMORY_PHASE_RELEASING,
    model_pb2.MEMORY_PHASE_MEASURED,
)
"""Figures are as good as the worst of them: the sum of measured and predicted ones is predicted."""


def state_of(states: Sequence[model_pb2.ModelState.ValueType]) -> model_pb2.ModelState.ValueType:
    """Return the state of a model, from those of its replicas."""
    return min(states, key=_RANKS.__getitem__)


def merged(replicas: Sequence[model_pb2.Model]) -> model_pb2.Model:
    """Return a model, from its replicas: that of the best state, with what all have together.

    The first ones come first, those that are on their way out last.
    """
    if len(replicas) == 1:
        return replicas[0]
    shown = min(replicas, key=lambda one: _RANKS[one.state])
    model = model_pb2.Model()
    model.CopyFrom(shown)
    model.lease_count = sum(one.lease_count for one in replicas)
    model.waiting_request_count = sum(one.waiting_request_count for one in replicas)
    del model.workers[:]
    model.workers.extend(one.worker for one in replicas if one.HasField("worker"))
    if model.workers:
        model.worker.CopyFrom(model.workers[0])
    failed = [one for one in replicas if one.HasField("last_failure")]
    if failed:
        latest = max(failed, key=lambda one: one.last_failure.failure_time.ToNanoseconds())
        model.last_failure.CopyFrom(latest.last_failure)
    charged = [one.memory for one in replicas if one.HasField("memory")]
    if charged:
        model.memory.Clear()
        model.memory.phase = min((one.phase for one in charged), key=_PHASES.index)
        for one in charged:
            for device, size in one.bytes.items():
                model.memory.bytes[device] += size
    used = [one.last_use_time for one in replicas if one.HasField("last_use_time")]
    if used:
        model.last_use_time.CopyFrom(max(used, key=lambda time: time.ToNanoseconds()))
    _set_expiry(model, replicas)
    return model


def _set_expiry(model: model_pb2.Model, replicas: Sequence[model_pb2.Model]) -> None:
    """The model goes when its last replica does: never, while there is one that does not."""
    serving = [one for one in replicas if one.state == model_pb2.MODEL_STATE_LOADED]
    if all(one.HasField("expire_time") for one in serving) and serving:
        latest = max((one.expire_time for one in serving), key=lambda time: time.ToNanoseconds())
        model.expire_time.CopyFrom(latest)
    else:
        model.ClearField("expire_time")
