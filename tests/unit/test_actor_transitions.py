"""The rules of a model's life, one test each, on the pure transitions put together in `World`."""

from __future__ import annotations

import pytest

from paddock.errors import Reason
from paddock_server.manager import messages as m
from paddock_server.manager.failure import Failure
from paddock_server.manager.options import Terms, Wish
from paddock_server.manager.state import NEVER, Cause, Phase
from paddock_server.manager.transitions import step
from tests.unit.manager_world import DEFAULTS, LIMITS, NO_WISH, PATIENCE, WAITERS_MAX, Worker, World

EIGHT = Wish({"slot_count": 8})
CRASH = Reason.WORKER_CRASHED


@pytest.fixture
def world() -> World:
    return World(("a", "b"), models_max=1)


def phase(world: World, name: str = "a") -> Phase:
    return world.models[name].state.phase


def worker(world: World, name: str = "a") -> int:
    """The load number of the one worker there is."""
    (number,) = world.models[name].workers
    return number


def read(world: World, name: str = "a") -> None:
    """Have one actor read everything it has been sent."""
    while world.models[name].inbox:
        world.deliver(name)


def start(world: World, name: str = "a") -> None:
    """Bring a load as far as the start of its worker."""
    while Worker.STARTING not in world.models[name].workers.values():
        read(world, name)
        world.deliver_to_loop()
        read(world, name)


def loaded(world: World, name: str = "a") -> None:
    world.load(name)
    world.calm()
    assert phase(world, name) is Phase.READY


# Rule 1: "ensure ready" is one request


def test_ready_is_a_no_op_and_grants_at_once(world: World) -> None:
    loaded(world)
    number = worker(world)
    caller = world.acquire("a")
    read(world)
    assert world.answers[caller] == "granted"
    assert worker(world) == number


def test_unloaded_starts_and_grants_when_ready(world: World) -> None:
    caller = world.acquire("a")
    world.calm()
    assert world.answers[caller] == "granted"


def test_unloading_waits_then_starts(world: World) -> None:
    loaded(world)
    unload = world.unload("a")
    read(world)
    assert phase(world) is Phase.STOPPING
    caller = world.acquire("a")
    world.calm()
    assert (world.answers[unload], world.answers[caller]) == ("unloaded", "granted")


def test_failed_refuses_with_the_time_to_retry_after_while_backing_off(world: World) -> None:
    for _ in range(3):
        world.load("a")
        start(world)
        world.worker_fails("a", worker(world), Reason.LOAD_STALLED)
        read(world)
    # An operator's Load starts counting anew; its failure is the first of a row.
    world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.LOAD_STALLED)
    read(world)
    state = world.models["a"].state
    refusal = state.refusal(world.now)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_seconds) == (Reason.LOAD_STALLED, 1.0)
    refused = world.acquire("a")
    read(world)
    assert world.answers[refused] == Reason.LOAD_STALLED
    world.pass_time(1.0)
    tried = world.acquire("a")
    world.calm()
    assert world.answers[tried] == "granted"


def test_without_autoload_a_model_that_is_not_loaded_is_refused(world: World) -> None:
    caller = world.acquire("a", autoload=False)
    read(world)
    assert world.answers[caller] == Reason.MODEL_NOT_LOADED


def test_without_autoload_a_load_under_way_is_waited_for(world: World) -> None:
    world.load("a")
    read(world)
    caller = world.acquire("a", autoload=False)
    world.calm()
    assert world.answers[caller] == "granted"


def test_without_autoload_a_model_on_its_way_out_is_refused(world: World) -> None:
    loaded(world)
    world.unload("a")
    caller = world.acquire("a", autoload=False)
    read(world)
    assert world.answers[caller] == Reason.MODEL_NOT_LOADED


def test_a_bad_file_is_not_tried_again_by_requests(world: World) -> None:
    first = world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.MODEL_CORRUPT)
    world.pass_time(3600)
    second = world.acquire("a")
    read(world)
    assert (world.answers[first], world.answers[second]) == (Reason.MODEL_CORRUPT, Reason.MODEL_CORRUPT)
    assert not world.models["a"].workers


@pytest.mark.parametrize("event", [m.FileFound(DEFAULTS, None), m.LoadAsked(999, NO_WISH)])
def test_a_bad_file_is_tried_again_when_it_changes_or_an_operator_loads_it(
    world: World, event: m.Event
) -> None:
    world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.MODEL_CORRUPT)
    world.tell("a", event)
    caller = world.acquire("a")
    world.calm()
    assert world.answers[caller] == "granted"


def test_an_unload_does_not_make_a_bad_file_good(world: World) -> None:
    world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.MODEL_CORRUPT)
    world.unload("a")
    caller = world.acquire("a")
    world.calm()
    assert (phase(world), world.answers[caller]) == (Phase.UNLOADED, Reason.MODEL_CORRUPT)


def test_a_file_the_catalog_found_a_problem_with_fails_before_any_worker(world: World) -> None:
    world.add("bad", Failure(Reason.MODEL_CORRUPT, "bad magic"))
    load, request = world.load("bad"), world.acquire("bad")
    world.calm()
    assert (world.answers[load], world.answers[request]) == (Reason.MODEL_CORRUPT, Reason.MODEL_CORRUPT)
    assert phase(world, "bad") is Phase.FAILED


# Rule 2: a load belongs to the actor


def test_ten_callers_share_one_load_and_its_end(world: World) -> None:
    callers = [world.load("a") for _ in range(10)]
    world.calm()
    assert [world.answers[caller] for caller in callers] == ["loaded"] * 10
    assert world.models["a"].state.load_number == 1


def test_unload_aborts_a_load_for_everyone(world: World) -> None:
    load, request = world.load("a"), world.acquire("a")
    start(world)
    unload = world.unload("a")
    read(world)
    assert (world.answers[load], world.answers[request]) == (Reason.LOAD_ABORTED, Reason.LOAD_ABORTED)
    assert unload in world.pending
    world.calm()
    assert world.answers[unload] == "unloaded"
    assert phase(world) is Phase.UNLOADED


def test_a_worker_that_is_ready_too_late_does_not_bring_an_aborted_load_back(world: World) -> None:
    world.load("a")
    start(world)
    world.unload("a")
    world.worker_ready("a", worker(world))
    read(world)
    assert phase(world) is Phase.STOPPING


def test_a_load_with_other_options_is_refused_while_one_runs(world: World) -> None:
    world.load("a")
    read(world)
    other = world.load("a", EIGHT)
    kept = world.load("a", EIGHT, m.Conflict.KEEP)
    world.calm()
    assert world.answers[other] == Reason.LOAD_IN_PROGRESS
    assert world.answers[kept] == "loaded"


@pytest.mark.parametrize(
    ("conflict", "answer"),
    [(m.Conflict.FAIL, Reason.OPTIONS_CONFLICT), (m.Conflict.KEEP, "loaded"), (m.Conflict.RELOAD, "loaded")],
)
def test_each_conflict_policy(world: World, conflict: m.Conflict, answer: str) -> None:
    loaded(world)
    caller = world.load("a", EIGHT, conflict)
    world.calm()
    assert world.answers[caller] == answer
    reloaded = conflict is m.Conflict.RELOAD
    assert world.models["a"].state.options.slot_count == (8 if reloaded else 4)
    assert world.models["a"].state.load_number == (2 if reloaded else 1)


def test_a_reload_waits_for_running_requests(world: World) -> None:
    loaded(world)
    request = world.acquire("a")
    read(world)
    caller = world.load("a", EIGHT, m.Conflict.RELOAD)
    world.calm()
    assert phase(world) is Phase.DRAINING
    world.give_back("a", request)
    world.calm()
    assert world.answers[caller] == "loaded"


def test_options_left_out_agree_with_whatever_is_loaded(world: World) -> None:
    world.load("a", EIGHT)
    world.calm()
    caller = world.load("a", NO_WISH)
    read(world)
    assert world.answers[caller] == "loaded"


def test_another_idle_timeout_needs_no_other_load(world: World) -> None:
    loaded(world)
    caller = world.load("a", Wish({}, {"idle_timeout_seconds": 5.0}))
    read(world)
    assert world.answers[caller] == "loaded"
    assert world.models["a"].state.load_number == 1
    world.pass_time(5.0)
    read(world)
    assert phase(world) is Phase.STOPPING


def test_a_load_that_takes_too_long_stalls_and_its_worker_goes(world: World) -> None:
    caller = world.load("a", timeout=20)
    start(world)
    world.pass_time(20)
    read(world)
    assert (world.answers[caller], phase(world)) == (Reason.LOAD_STALLED, Phase.STOPPING)
    late = world.acquire("a")
    world.calm()
    assert phase(world) is Phase.READY, "a first failure does not keep the next request off"
    assert world.answers[late] == "granted"


def test_a_request_is_refused_once_a_load_that_failed_twice_is_gone(world: World) -> None:
    world.load("a", timeout=20)
    start(world)
    world.worker_fails("a", worker(world), CRASH)
    read(world)
    world.pass_time(0)
    read(world)
    world.pass_time(20)
    read(world)
    assert phase(world) is Phase.STOPPING
    caller = world.acquire("a")
    world.calm()
    assert (world.answers[caller], phase(world)) == (Reason.LOAD_STALLED, Phase.FAILED)


def test_a_load_that_finds_no_room_in_time_stalls(world: World) -> None:
    loaded(world)
    world.acquire("a")
    read(world)
    caller = world.load("b", timeout=5)
    world.calm()
    world.pass_time(5)
    world.calm()
    assert world.answers[caller] == Reason.LOAD_STALLED
    assert phase(world, "a") is Phase.READY


# Rules 3 and 4: leases, victims, the queue


def test_a_model_with_a_lease_is_not_evicted(world: World) -> None:
    loaded(world)
    world.acquire("a")
    read(world)
    waiting = world.acquire("b")
    world.calm()
    assert waiting in world.pending
    assert phase(world) is Phase.READY


def test_an_idle_model_makes_room_as_soon_as_its_last_lease_is_returned(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    read(world)
    waiting = world.acquire("b")
    world.calm()
    world.give_back("a", holder)
    world.calm()
    assert (world.answers[waiting], phase(world)) == ("granted", Phase.UNLOADED)


def test_a_victim_that_was_used_meanwhile_refuses_and_another_is_found(world: World) -> None:
    world = World(("a", "b", "c"), models_max=2)
    loaded(world, "a")
    loaded(world, "b")
    waiting = world.acquire("c")
    read(world, "c")
    world.deliver_to_loop()
    assert list(world.models["a"].inbox) == [m.EvictAsked(1, when_drained=False)]
    # The request was sent later but is read first.
    world.models["a"].inbox.appendleft(m.AcquireAsked(world.acquire("a"), autoload=True))
    world.models["a"].inbox.pop()
    world.calm()
    assert world.answers[waiting] == "granted"
    assert (phase(world, "a"), phase(world, "b")) == (Phase.READY, Phase.UNLOADED)


def test_a_chosen_victim_grants_nothing_and_its_callers_wait_for_the_next_load(world: World) -> None:
    loaded(world)
    first = world.acquire("b")
    read(world, "b")
    world.deliver_to_loop()
    second = world.acquire("a")
    read(world)
    assert phase(world) is Phase.STOPPING
    assert second in world.pending
    world.settle()
    assert (world.answers[first], world.answers[second]) == ("granted", "granted")


def test_traffic_on_a_resident_model_cannot_starve_a_swap(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    world.calm()
    waiting = world.acquire("b")
    seconds = 0.0
    while waiting in world.pending:
        successor = world.acquire("a")
        world.calm()
        world.give_back("a", holder)
        world.calm()
        world.pass_time(1.0)
        seconds += 1.0
        assert seconds < 2 * PATIENCE, "it waits for ever"
        if world.answers.get(successor) == "granted":
            holder = successor
    assert seconds >= PATIENCE
    assert world.answers[waiting] == "granted"
    world.settle()
    assert not world.pending, "those who were kept off are served after it"


def test_a_yielding_model_serves_on_when_the_one_that_wanted_its_room_has_gone(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    read(world)
    waiting = world.acquire("b")
    world.calm()
    world.pass_time(PATIENCE)
    world.calm()
    assert (phase(world), world.models["a"].state.cause) == (Phase.DRAINING, Cause.YIELD)
    kept_off = world.acquire("a")
    world.calm()
    assert kept_off in world.pending
    world.abandon("b", waiting)
    world.calm()
    assert (world.answers[kept_off], phase(world), phase(world, "b")) == (
        "granted",
        Phase.READY,
        Phase.UNLOADED,
    )
    world.give_back("a", holder)
    world.give_back("a", kept_off)
    world.calm()
    assert phase(world) is Phase.READY
    again = world.acquire("b")
    world.calm()
    assert world.answers[again] == "granted", "once let off, it is idle like any other"


def test_a_load_called_for_while_yielding_is_answered_when_the_model_stays(world: World) -> None:
    loaded(world)
    world.acquire("a")
    waiting = world.acquire("b")
    world.calm()
    world.pass_time(PATIENCE)
    world.calm()
    caller = world.load("a")
    world.calm()
    world.abandon("b", waiting)
    world.calm()
    assert (world.answers[caller], phase(world)) == ("loaded", Phase.READY)


def test_the_last_waiter_to_leave_takes_its_place_in_the_queue_with_it(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    waiting = [world.acquire("b"), world.acquire("b")]
    world.calm()
    for caller in waiting:
        world.abandon("b", caller)
        world.calm()
    assert world.residency.waiting == ()
    world.give_back("a", holder)
    world.calm()
    assert (phase(world), phase(world, "b")) == (Phase.READY, Phase.UNLOADED)


def test_a_load_once_begun_goes_on_without_its_caller(world: World) -> None:
    caller = world.acquire("a")
    start(world)
    world.abandon("a", caller)
    world.calm()
    assert phase(world) is Phase.READY


def test_a_queued_load_of_an_operator_needs_no_waiter(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    caller = world.load("b")
    request = world.acquire("b")
    world.calm()
    world.abandon("b", request)
    world.give_back("a", holder)
    world.calm()
    assert (world.answers[caller], phase(world, "b")) == ("loaded", Phase.READY)


def test_waiting_requests_are_served_first_come_first_served(world: World) -> None:
    callers = [world.acquire("a") for _ in range(WAITERS_MAX)]
    world.calm()
    assert world.granted == callers


def test_a_lease_of_a_worker_that_died_does_not_count_for_the_next(world: World) -> None:
    loaded(world)
    old = world.acquire("a")
    read(world)
    world.worker_fails("a", worker(world), CRASH)
    world.acquire("a")
    read(world)
    world.pass_time(0)
    world.calm()
    world.give_back("a", old)
    read(world)
    assert world.models["a"].state.leases == 1


def test_a_victim_that_has_died_meanwhile_is_looked_at_again(world: World) -> None:
    loaded(world)
    world.acquire("b")
    read(world, "b")
    world.deliver_to_loop()
    world.models["a"].inbox.appendleft(m.WorkerDied(1, Failure(CRASH, "it died")))
    world.models["a"].workers.clear()
    world.settle()
    assert phase(world, "b") is Phase.READY


def test_the_queue_of_a_model_is_bounded(world: World) -> None:
    callers = [world.acquire("a") for _ in range(WAITERS_MAX + 1)]
    read(world)
    assert [world.answers.get(caller) for caller in callers] == [None] * WAITERS_MAX + [Reason.QUEUE_FULL]


def test_the_queue_for_room_is_bounded() -> None:
    world = World(("a", "b", "c"), models_max=1, waiting_max=1)
    loaded(world)
    world.acquire("a")
    read(world)
    callers = [world.acquire("b"), world.acquire("c")]
    world.calm()
    assert [world.answers.get(caller) for caller in callers] == [None, Reason.QUEUE_FULL]
    assert phase(world, "c") is Phase.UNLOADED


def test_an_idle_model_goes_after_its_time(world: World) -> None:
    world.load("a", Wish({}, {"idle_timeout_seconds": 5.0}))
    world.calm()
    holder = world.acquire("a")
    world.calm()
    world.pass_time(60)
    world.calm()
    world.give_back("a", holder)
    world.calm()
    world.pass_time(4.9)
    world.calm()
    assert phase(world) is Phase.READY
    world.pass_time(0.1)
    world.calm()
    assert phase(world) is Phase.UNLOADED


# Rule 6: stopping


def test_unload_drains_then_aborts_what_is_left(world: World) -> None:
    loaded(world)
    ending, staying = world.acquire("a"), world.acquire("a")
    read(world)
    unload = world.unload("a", drain_seconds=5)
    read(world)
    world.give_back("a", ending)
    world.calm()
    assert phase(world) is Phase.DRAINING
    world.pass_time(5)
    read(world)
    assert (phase(world), world.models["a"].state.aborted) == (Phase.STOPPING, 1)
    assert staying in world.models["a"].holders
    world.calm()
    assert world.answers[unload] == "unloaded"


def test_a_forced_unload_aborts_at_once_and_joins_a_drain(world: World) -> None:
    loaded(world)
    world.acquire("a")
    read(world)
    drain = world.unload("a")
    read(world)
    force = world.unload("a", force=True)
    read(world)
    assert (phase(world), world.models["a"].state.aborted) == (Phase.STOPPING, 1)
    world.calm()
    assert (world.answers[drain], world.answers[force]) == ("unloaded", "unloaded")


def test_a_second_unload_may_shorten_the_drain_and_not_lengthen_it(world: World) -> None:
    loaded(world)
    world.acquire("a")
    world.unload("a", drain_seconds=20)
    world.unload("a", drain_seconds=500)
    world.unload("a", drain_seconds=5)
    read(world)
    world.pass_time(5)
    read(world)
    assert phase(world) is Phase.STOPPING


def test_unload_of_an_unloaded_model_succeeds(world: World) -> None:
    caller = world.unload("a", load_id="a-77")
    read(world)
    assert world.answers[caller] == "unloaded"


def test_unload_of_a_failed_model_puts_it_to_rest(world: World) -> None:
    world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.LOAD_STALLED)
    caller = world.unload("a")
    world.calm()
    assert (world.answers[caller], phase(world)) == ("unloaded", Phase.UNLOADED)
    assert world.models["a"].state.failure is not None


def test_an_unload_that_means_an_earlier_load_changes_nothing(world: World) -> None:
    loaded(world)
    stale = world.unload("a", load_id="a-0")
    current = world.unload("a", load_id="a-1")
    read(world)
    assert world.answers[stale] == Reason.LOAD_ID_MISMATCH
    assert current in world.pending


def test_unload_calls_off_what_was_asked_for_before_it_and_not_what_comes_after(world: World) -> None:
    loaded(world)
    world.unload("a")
    read(world)
    load, request = world.load("a"), world.acquire("a")
    again = world.unload("a")
    later = world.acquire("a")
    world.calm()
    assert (world.answers[load], world.answers[request]) == (Reason.LOAD_ABORTED, Reason.LOAD_ABORTED)
    assert (world.answers[again], world.answers[later]) == ("unloaded", "granted")


# Rule 9: crashes


def test_a_worker_that_dies_is_replaced_and_new_requests_wait_for_it(world: World) -> None:
    loaded(world)
    holder = world.acquire("a")
    read(world)
    world.worker_fails("a", worker(world), CRASH)
    read(world)
    assert phase(world) is Phase.BACKOFF
    waiting = world.acquire("a")
    world.give_back("a", holder)
    read(world)
    assert world.models["a"].state.leases == 0, "the lease was of the worker that died"
    world.pass_time(0)
    world.calm()
    state = world.models["a"].state
    assert world.answers[waiting] == "granted"
    assert (state.restart_count, state.load_number, state.leases) == (1, 2, 1)
    assert state.failure is not None, "why the worker died stays to be seen"


def test_a_worker_that_keeps_dying_is_given_up_with_the_reason(world: World) -> None:
    loaded(world)
    waiting = 0
    delays: list[float] = []
    for _ in range(4):
        world.worker_fails("a", worker(world), CRASH)
        read(world)
        waiting = world.acquire("a")
        read(world)
        (deadline, _, _) = world.models["a"].timers[m.Timer.RESTART]
        delays.append(deadline - world.now)
        world.pass_time(delays[-1])
        read(world)
    assert delays == [0, 1, 2, 4]
    world.worker_fails("a", worker(world), CRASH)
    world.calm()
    state = world.models["a"].state
    assert (state.phase, world.answers[waiting]) == (Phase.FAILED, Reason.CRASH_LOOP)
    assert state.failure is not None
    assert (state.failure.reason, state.held_until - world.now) == (Reason.CRASH_LOOP, 60)
    assert world.residency.held == {}


def test_five_healthy_minutes_forgive_earlier_crashes(world: World) -> None:
    loaded(world)
    for _ in range(10):
        world.pass_time(300)
        world.worker_fails("a", worker(world), CRASH)
        read(world)
        world.pass_time(0)
        world.calm()
    assert (phase(world), world.models["a"].state.restart_count) == (Phase.READY, 10)


def test_a_first_load_that_crashes_is_tried_once_more_and_then_given_up(world: World) -> None:
    caller = world.load("a")
    start(world)
    world.worker_fails("a", worker(world), CRASH)
    read(world)
    assert caller in world.pending
    world.pass_time(0)
    read(world)
    world.worker_fails("a", worker(world), CRASH)
    read(world)
    assert (world.answers[caller], phase(world)) == (Reason.CRASH_LOOP, Phase.FAILED)


def test_unload_ends_the_pause_between_two_starts(world: World) -> None:
    loaded(world)
    world.worker_fails("a", worker(world), CRASH)
    read(world)
    caller = world.unload("a")
    world.calm()
    assert (world.answers[caller], phase(world)) == ("unloaded", Phase.UNLOADED)
    assert world.residency.held == {}


def test_a_worker_that_dies_while_it_drains_is_gone_and_not_restarted(world: World) -> None:
    loaded(world)
    world.acquire("a")
    caller = world.unload("a")
    read(world)
    world.worker_fails("a", worker(world), CRASH)
    world.calm()
    assert (world.answers[caller], phase(world)) == ("unloaded", Phase.UNLOADED)


def test_a_load_that_succeeds_forgets_the_failure_of_the_one_before(world: World) -> None:
    world.acquire("a")
    start(world)
    world.worker_fails("a", worker(world), Reason.LOAD_STALLED)
    read(world)
    assert world.models["a"].state.failure is not None
    loaded(world)
    assert world.models["a"].state.failure is None


# Rule 10, files, the end


def test_an_operators_load_is_remembered_until_an_unload(world: World) -> None:
    world.acquire("b")
    world.calm()
    world.load("a", EIGHT)
    world.settle()
    assert world.remembered.keys() == {"a"}
    assert world.remembered["a"] == EIGHT
    world.unload("a")
    world.calm()
    assert world.remembered == {"a": None}


def test_requests_load_a_model_as_the_operator_had_it(world: World) -> None:
    world.load("a", EIGHT)
    world.calm()
    world.acquire("b")
    world.settle()
    assert phase(world) is Phase.UNLOADED
    world.acquire("a")
    world.settle()
    assert world.models["a"].state.options.slot_count == 8


def test_a_model_whose_file_goes_serves_on_and_vanishes_when_unloaded(world: World) -> None:
    loaded(world)
    world.tell("a", m.FileGone())
    served = world.acquire("a")
    world.calm()
    assert world.answers[served] == "granted"
    world.give_back("a", served)
    world.unload("a")
    world.calm()
    assert "a" not in world.models


def test_those_who_wait_for_a_model_whose_file_has_gone_are_told(world: World) -> None:
    loaded(world)
    world.unload("a")
    read(world)
    load, request = world.load("a"), world.acquire("a")
    world.tell("a", m.FileGone())
    world.calm()
    assert (world.answers[load], world.answers[request]) == (Reason.MODEL_NOT_FOUND, Reason.MODEL_NOT_FOUND)


def test_a_file_that_comes_back_in_time_is_no_loss(world: World) -> None:
    loaded(world)
    world.tell("a", m.FileGone())
    world.tell("a", m.FileFound(DEFAULTS, None))
    world.unload("a")
    world.calm()
    assert phase(world) is Phase.UNLOADED


@pytest.mark.parametrize(
    "how_far", ["unloaded", "queued", "starting", "backoff", "ready", "draining", "failed"]
)
def test_the_server_can_stop_at_any_time(world: World, how_far: str) -> None:
    match how_far:
        case "queued":
            world.load("a")
            read(world)
        case "starting":
            world.load("a")
            start(world)
        case "backoff" | "ready" | "draining":
            loaded(world)
            world.acquire("a")
            read(world)
            if how_far == "backoff":
                world.worker_fails("a", worker(world), CRASH)
            if how_far == "draining":
                world.unload("a")
            read(world)
        case "failed":
            world.load("a")
            start(world)
            world.worker_fails("a", worker(world), Reason.MODEL_CORRUPT)
        case _:
            pass
    for name in world.models:
        world.tell(name, m.CloseAsked(5.0))
    late = [world.load("a"), world.acquire("a")]
    world.calm()
    world.pass_time(5.0)
    world.calm()
    assert [world.answers[caller] for caller in late] == [Reason.SHUTTING_DOWN] * 2
    assert not world.pending
    assert all(model.closed and not model.workers for model in world.models.values())


def test_who_drains_as_the_server_stops_and_is_told_again_to_be_quick_ends_at_once() -> None:
    world = World(("a",), models_max=1)
    world.acquire("a")
    start(world)
    world.worker_ready("a", worker(world))
    world.calm()
    model = world.models["a"]
    world.tell("a", m.CloseAsked(1000.0))
    world.calm()
    assert model.state.phase is Phase.DRAINING
    world.tell("a", m.CloseAsked(0.0))
    read(world)
    assert model.state.phase is Phase.STOPPING
    world.calm()
    assert model.closed


def test_every_event_is_answered_in_every_phase() -> None:
    """A table of all pairs: none raises, and a phase that changes says why."""
    world = World(("a",), models_max=1)
    base = world.models["a"].state
    failure = Failure(CRASH, "it died")
    events: list[m.Event] = [
        m.LoadAsked(1, EIGHT, m.Conflict.RELOAD),
        m.AcquireAsked(2, autoload=True),
        m.CallerLeft(3),
        m.DemandGone(),
        m.LeaseReturned(0),
        m.SleepAsked(5),
        m.TermsSet(Terms(pinned=True)),
        m.UnloadAsked(4, force=False, drain_seconds=1),
        m.Admitted(0),
        m.AdmissionRefused(0, failure),
        m.EvictAsked(0, when_drained=True),
        m.EvictionRelented(0),
        m.WorkerReady(0, DEFAULTS),
        m.StartFailed(0, failure),
        m.WorkerSlept(0),
        m.WorkerDied(0, failure),
        m.WorkerReaped(0),
        *(m.TimerFired(timer) for timer in m.Timer),
        m.FileFound(DEFAULTS, None),
        m.DefaultsSet(DEFAULTS),
        m.FileGone(),
        m.CloseAsked(1),
        m.Resumed(),
    ]
    assert {type(event) for event in events} == set(m.Event.__args__)
    for at in Phase:
        for event in events:
            state = type(base)(model="a", defaults=DEFAULTS, options=DEFAULTS, phase=at, failure=failure)
            result = step(state, event, 0.0, LIMITS)
            assert result.state.phase is at or result.why
            assert result.state.held_until <= NEVER
