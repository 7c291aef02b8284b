"""What is decided about replicas: where requests go, what a Load asks of each, what the world sees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddock.errors import Reason
from paddock.v1 import model_pb2
from paddock_server.manager.admission import Footprint, MemoryAdmission
from paddock_server.manager.failure import Failure
from paddock_server.manager.messages import AdmissionRefused, Admitted, Conflict, LoadAsked
from paddock_server.manager.options import Wish
from paddock_server.manager.policy import Resident, Standing, Waiting, plan
from paddock_server.manager.replicas import (
    LoadPlan,
    ReplicaView,
    Route,
    is_about_one,
    left_waiting,
    may_try_another,
    merged,
    model_of,
    plan_load,
    replica_id,
    route,
    shown_name,
    state_of,
)
from paddock_server.manager.residency import Look, Residency
from paddock_server.manager.state import ActorState, Cause, Phase
from tests.unit.manager_world import DEFAULTS, NO_WISH

THREE = replace(DEFAULTS, replica_count=3)


def serving(demand: int, slots: int = 4) -> ReplicaView:
    return ReplicaView(Phase.READY, serves=True, demand=demand, slot_count=slots)


AT_REST = ReplicaView(Phase.UNLOADED)
ASLEEP = ReplicaView(Phase.SLEEPING)
LOADING = ReplicaView(Phase.STARTING)
DEAD = ReplicaView(Phase.READY, serves=False)
RESTARTING = ReplicaView(Phase.BACKOFF)
FAILED = ReplicaView(Phase.FAILED, held_off=True)
GOING = ReplicaView(Phase.STOPPING)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([serving(2), serving(1), serving(1)], Route(1)),
        ([serving(1), serving(1)], Route(0)),
        ([LOADING, serving(3)], Route(1)),
        ([DEAD, serving(3)], Route(1)),
        ([DEAD, AT_REST], Route(0)),
        ([LOADING._replace(demand=2), LOADING._replace(demand=1)], Route(1)),
        ([AT_REST, AT_REST, AT_REST], Route(0, (1, 2))),
        ([AT_REST, ASLEEP], Route(1, (0,))),
        ([GOING, AT_REST], Route(1)),
        ([FAILED, GOING], Route(1)),
        ([FAILED, AT_REST], Route(1)),
        ([FAILED, FAILED], Route(0)),
        ([serving(9)._replace(retiring=True), RESTARTING], Route(1)),
        ([serving(1)._replace(retiring=True), serving(0)._replace(retiring=True)], Route(1)),
    ],
)
def test_a_request_goes_to_the_least_used_that_serves_else_to_one_that_soonest_will(
    replicas: list[ReplicaView], expected: Route
) -> None:
    assert route(replicas) == expected


def test_replicas_at_rest_are_loaded_when_every_slot_of_the_others_is_taken() -> None:
    assert route([serving(3), AT_REST, ASLEEP]) == Route(0)
    assert route([serving(4), AT_REST, ASLEEP]) == Route(0, (1, 2))
    assert route([serving(4), serving(3), AT_REST]) == Route(1)
    assert route([serving(4), FAILED]) == Route(0), "not one that has just failed"


def test_a_refused_request_is_tried_only_where_there_is_a_chance() -> None:
    assert may_try_another([FAILED, serving(1)], {0})
    assert may_try_another([FAILED, LOADING], {0})
    assert route([serving(0), LOADING], {0}) == Route(1)
    assert not may_try_another([FAILED, AT_REST], {0})
    assert not may_try_another([FAILED, LOADING], {0, 1})
    assert may_try_another([GOING._replace(retiring=True), AT_REST], {0}), "it was turned out, not refused"


def test_requests_leave_a_replica_that_cannot_serve_them_and_one_that_loads_for_a_free_slot() -> None:
    waiting = [one._replace(waiting=1) for one in (RESTARTING, LOADING, DEAD, GOING)]
    assert left_waiting([*waiting, serving(4)]) == (0, 2, 3)
    assert left_waiting([*waiting, serving(3)]) == (0, 1, 2, 3)
    assert left_waiting([LOADING._replace(waiting=1, retiring=True), serving(4)]) == (0,)
    assert left_waiting([*waiting, LOADING]) == (), "nobody else serves either"


# Load


def state(phase: Phase, **changes: object) -> ActorState:
    return replace(ActorState("m", DEFAULTS, DEFAULTS, phase=phase), **changes)


def asked(wish: Wish, conflict: Conflict = Conflict.FAIL) -> LoadAsked:
    return LoadAsked(1, wish, conflict)


def count(number: int) -> Wish:
    return Wish({}, {"replica_count": number})


def planned(states: list[ActorState], load: LoadAsked) -> LoadPlan:
    found = plan_load(states, load)
    assert isinstance(found, LoadPlan)
    return found


def refused(states: list[ActorState], load: LoadAsked) -> Failure:
    found = plan_load(states, load)
    assert isinstance(found, Failure)
    return found


def test_a_load_of_a_model_at_rest_takes_the_number_asked_for_else_the_default() -> None:
    resting = [state(Phase.UNLOADED, defaults=THREE)]
    assert planned(resting, asked(NO_WISH)).replica_count == 3
    assert planned(resting, asked(count(2))).replica_count == 2
    assert planned(resting, asked(count(2))).begun.wish.in_place == {"replica_count": 2}


def test_another_number_conflicts_unless_the_caller_says_otherwise() -> None:
    loaded = [state(Phase.READY, options=THREE)] * 3
    failure = refused(loaded, asked(count(2)))
    assert (failure.reason, failure.metadata["fields"]) == (Reason.OPTIONS_CONFLICT, "replica_count")
    assert planned(loaded, asked(count(2), Conflict.KEEP)).replica_count == 3
    assert planned(loaded, asked(count(2), Conflict.RELOAD)).replica_count == 2
    assert planned(loaded, asked(count(3))).replica_count == 3
    loading = [state(Phase.STARTING, options=THREE)] * 3
    assert refused(loading, asked(count(2), Conflict.RELOAD)).reason == Reason.LOAD_IN_PROGRESS


def test_a_replica_at_rest_comes_up_as_those_that_serve_are() -> None:
    eight = replace(DEFAULTS, slot_count=8, replica_count=2)
    states = [state(Phase.UNLOADED), state(Phase.READY, options=eight)]
    assert planned(states, asked(NO_WISH)).begun.options == eight
    keep = planned(states, asked(Wish({"slot_count": 2}), Conflict.KEEP))
    assert keep.begun.options == eight
    anew = planned(states, asked(Wish({"slot_count": 2}), Conflict.RELOAD))
    assert anew.begun.options == replace(DEFAULTS, slot_count=2)
    assert anew.begun.wish == Wish({"slot_count": 2})


def test_other_options_are_refused_for_all_replicas_at_once() -> None:
    states = [state(Phase.UNLOADED), state(Phase.READY, options=replace(DEFAULTS, replica_count=2))]
    failure = refused(states, asked(Wish({"slot_count": 8})))
    assert failure.metadata["fields"] == "slot_count"
    states.append(state(Phase.STARTING))
    busy = refused(states, asked(Wish({"slot_count": 8}), Conflict.RELOAD))
    assert busy.reason == Reason.LOAD_IN_PROGRESS


def test_a_model_with_one_replica_is_its_actors_affair() -> None:
    assert is_about_one([state(Phase.READY)], Wish({"slot_count": 8}))
    assert is_about_one([state(Phase.UNLOADED)], count(1))
    assert not is_about_one([state(Phase.UNLOADED)], count(2))
    assert not is_about_one([state(Phase.UNLOADED, defaults=THREE)], NO_WISH)
    assert not is_about_one([state(Phase.READY)] * 2, NO_WISH)


# What the world sees


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["FAILED", "LOADED"], "LOADED"),
        (["FAILED", "LOADING"], "LOADING"),
        (["SLEEPING", "UNLOADING"], "UNLOADING"),
        (["UNLOADED", "SLEEPING"], "SLEEPING"),
        (["UNLOADED", "FAILED"], "FAILED"),
        (["UNLOADED", "UNLOADED"], "UNLOADED"),
    ],
)
def test_a_model_is_in_the_best_state_of_its_replicas(names: list[str], expected: str) -> None:
    states = [model_pb2.ModelState.Value(f"MODEL_STATE_{name}") for name in names]
    assert state_of(states) == model_pb2.ModelState.Value(f"MODEL_STATE_{expected}")


def test_every_public_state_has_a_place() -> None:
    for public in model_pb2.ModelState.values()[1:]:
        assert state_of([public]) == public


def replica(name: str, pid: int, **fields: object) -> model_pb2.Model:
    value = model_pb2.ModelState.Value(f"MODEL_STATE_{name}")
    model = model_pb2.Model(id="m", state=value, lease_count=1, waiting_request_count=2, **fields)  # pyright: ignore[reportArgumentType]  # fields of a test
    model.last_use_time.seconds = pid
    if pid:
        model.worker.pid = pid
        model.workers.add(pid=pid)
    return model


def test_a_model_is_shown_with_what_its_replicas_have_together() -> None:
    first, second = replica("LOADING", 0, load_id="x-1"), replica("LOADED", 7, load_id="y-1")
    first.last_failure.reason = "WORKER_CRASHED"
    first.memory.bytes["RAM"], second.memory.bytes["RAM"] = 3, 4
    first.memory.phase, second.memory.phase = (
        model_pb2.MEMORY_PHASE_PREDICTED,
        model_pb2.MEMORY_PHASE_MEASURED,
    )
    model = merged([first, second])
    assert (model.state, model.load_id) == (model_pb2.MODEL_STATE_LOADED, "y-1")
    assert (model.lease_count, model.waiting_request_count) == (2, 4)
    assert [worker.pid for worker in model.workers] == [7]
    assert model.worker.pid == 7
    assert model.last_failure.reason == "WORKER_CRASHED"
    assert dict(model.memory.bytes) == {"RAM": 7}
    assert model.memory.phase == model_pb2.MEMORY_PHASE_PREDICTED
    assert model.last_use_time.seconds == 7


def test_a_model_expires_when_its_last_replica_does() -> None:
    first, second = replica("LOADED", 1), replica("LOADED", 2)
    first.expire_time.seconds = 10
    assert not merged([first, second]).HasField("expire_time")
    second.expire_time.seconds = 20
    assert merged([first, second]).expire_time.seconds == 20


def test_ids_are_for_the_manager_and_names_for_people() -> None:
    assert replica_id("m", 0) == "m"
    ids = [replica_id("m", number) for number in range(16)]
    assert len(set(ids)) == 16
    assert {model_of(one) for one in ids} == {"m"}
    assert [shown_name(one) for one in ids[:2]] == ["m", "m (replica 2)"]


# Room


def test_no_replica_goes_for_another_one_of_its_model() -> None:
    cost = Footprint()
    mine, other = replica_id("m", 1), "o"
    admission = MemoryAdmission(2)
    waiting = [Waiting(mine, cost, 0.0)]
    residents = [Resident("m", cost, Standing.IDLE, last_use=1), Resident(other, cost, Standing.IDLE, 2)]
    assert plan(residents, waiting, admission, 0.0, 10.0).evict == (other,)
    busy = [Resident("m", cost, Standing.BUSY), Resident(replica_id("m", 2), cost, Standing.IDLE)]
    late = plan(busy, waiting, admission, 100.0, 10.0)
    assert (late.evict, late.drain) == ((), ())


def test_a_replica_that_others_of_its_model_leave_no_room_is_refused() -> None:
    residency = Residency(MemoryAdmission(1), patience_seconds=10, waiting_max=8)
    looks = {"m": Look(1, Phase.READY, Cause.UNLOAD, 1, 0.0, 0.0)}
    residency.enter("m", 1, Footprint(), 0.0)
    (order,), _ = residency.decide(looks.get, 0.0)
    assert isinstance(order.message, Admitted)
    residency.enter(replica_id("m", 1), 1, Footprint(), 0.0)
    (order,), _ = residency.decide(looks.get, 0.0)
    assert order.model == replica_id("m", 1)
    assert isinstance(order.message, AdmissionRefused)
    failure = order.message.failure
    assert (failure.reason, failure.metadata["model"]) == (Reason.INSUFFICIENT_MEMORY, "m")
    assert "\0" not in failure.message + "".join(failure.metadata)
    assert not residency.waiting
