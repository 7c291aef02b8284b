"""Models that sleep, are kept or are pinned: the rules, one test each, on the pure transitions in `World`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddock.errors import Reason
from paddock_server.manager import messages as m
from paddock_server.manager.admission import device_bytes
from paddock_server.manager.options import Wish
from paddock_server.manager.replicas import replica_id
from paddock_server.manager.state import Phase
from paddock_server.memory import RAM
from tests.unit.manager_world import ASLEEP_SIZE, LIMITS, NO_WISH, PATIENCE, Worker, World

SLEEPY = Wish({}, {"sleep_timeout_seconds": 10.0})
BOTH = Wish({}, {"sleep_timeout_seconds": 10.0, "idle_timeout_seconds": 100.0})
CRASH = Reason.WORKER_CRASHED


@pytest.fixture
def world() -> World:
    return World(("a", "b"), models_max=1, sizes=(4, 5), budget=8)


def phase(world: World, name: str = "a") -> Phase:
    return world.models[name].state.phase


def read(world: World, name: str = "a") -> None:
    while world.models[name].inbox:
        world.deliver(name)


def loaded(world: World, name: str = "a", wish: Wish = NO_WISH) -> None:
    caller = world.load(name, wish)
    world.calm()
    assert world.answers[caller] == "loaded"


def asleep(world: World, name: str = "a", wish: Wish = NO_WISH) -> None:
    loaded(world, name, wish)
    caller = world.sleep(name)
    world.calm()
    assert world.answers[caller] == "slept"
    assert phase(world, name) is Phase.SLEEPING


def used(world: World, name: str, keep_alive_seconds: float = 0.0) -> None:
    caller = world.acquire(name)
    world.calm()
    world.models[name].holders.pop(caller)
    world.tell(name, m.LeaseReturned(world.models[name].state.load_number, keep_alive_seconds))
    world.calm()


def test_an_idle_model_falls_asleep_and_the_next_request_wakes_it(world: World) -> None:
    loaded(world, wish=SLEEPY)
    world.pass_time(10.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING
    caller = world.acquire("a")
    world.calm()
    assert world.answers[caller] == "granted"


def test_a_model_wakes_with_the_options_it_fell_asleep_with(world: World) -> None:
    asleep(world, wish=Wish({"slot_count": 8}))
    world.acquire("a")
    world.calm()
    assert world.models["a"].state.options.slot_count == 8


def test_load_wakes_a_sleeping_model_and_says_so_to_everyone_who_calls_it(world: World) -> None:
    asleep(world)
    callers = [world.load("a"), world.load("a")]
    world.calm()
    assert [world.answers[caller] for caller in callers] == ["loaded", "loaded"]


def test_every_awakening_is_a_load_of_its_own(world: World) -> None:
    asleep(world)
    before = world.models["a"].state.load_id
    world.load("a")
    world.calm()
    assert world.models["a"].state.load_id != before


def test_a_sleeping_model_holds_what_its_process_takes_and_no_place(world: World) -> None:
    asleep(world)
    assert device_bytes(world.residency.held["a"].cost) == {RAM: ASLEEP_SIZE}
    loaded(world, "b")
    assert phase(world) is Phase.SLEEPING


def test_waking_waits_for_room_like_any_load(world: World) -> None:
    asleep(world)
    holder = world.acquire("b")
    world.calm()
    waiting = world.acquire("a")
    world.calm()
    assert phase(world) is Phase.ADMITTING
    assert waiting in world.pending
    world.give_back("b", holder)
    world.calm()
    assert world.answers[waiting] == "granted"
    assert phase(world, "b") is Phase.UNLOADED


def test_who_gives_up_waiting_leaves_the_model_asleep(world: World) -> None:
    asleep(world)
    world.acquire("b")
    world.calm()
    waiting = world.acquire("a")
    world.calm()
    world.abandon("a", waiting)
    world.calm()
    assert phase(world) is Phase.SLEEPING
    assert device_bytes(world.residency.held["a"].cost) == {RAM: ASLEEP_SIZE}
    assert not world.residency.waiting


def test_a_model_in_use_is_not_put_to_sleep(world: World) -> None:
    loaded(world, wish=SLEEPY)
    world.acquire("a")
    world.calm()
    caller = world.sleep("a")
    world.pass_time(60.0)
    world.calm()
    assert world.answers[caller] == Reason.MODEL_IN_USE
    assert phase(world) is Phase.READY


def test_only_a_loaded_model_can_be_put_to_sleep(world: World) -> None:
    caller = world.sleep("a")
    world.calm()
    assert world.answers[caller] == Reason.MODEL_NOT_LOADED


def test_a_request_that_comes_while_it_falls_asleep_wakes_it_again(world: World) -> None:
    loaded(world)
    world.sleep("a")
    read(world)
    assert phase(world) is Phase.SUSPENDING
    caller = world.acquire("a")
    world.calm()
    assert world.answers[caller] == "granted"


@pytest.mark.parametrize("at", [Phase.SUSPENDING, Phase.SLEEPING])
def test_unload_stops_a_sleeping_worker(world: World, at: Phase) -> None:
    loaded(world)
    sleep = world.sleep("a")
    read(world)
    if at is Phase.SLEEPING:
        world.calm()
    unload = world.unload("a")
    world.calm()
    assert (world.answers[unload], world.answers[sleep]) == ("unloaded", "slept")
    assert not world.models["a"].workers
    assert not world.residency.held


def test_unload_stops_a_sleeping_worker_that_waits_for_room_to_wake(world: World) -> None:
    asleep(world)
    world.acquire("b")
    world.calm()
    waiting = world.load("a")
    read(world)
    unload = world.unload("a")
    world.calm()
    assert (world.answers[unload], world.answers[waiting]) == ("unloaded", Reason.LOAD_ABORTED)
    assert not world.models["a"].workers
    assert "a" not in world.residency.held
    assert not world.residency.waiting


def test_a_sleeping_model_is_unloaded_when_its_idle_time_out_passes(world: World) -> None:
    loaded(world, wish=BOTH)
    world.pass_time(10.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING
    world.pass_time(90.0)
    world.calm()
    assert phase(world) is Phase.UNLOADED


def test_a_sleeper_that_dies_is_no_loss(world: World) -> None:
    asleep(world)
    number = world.models["a"].state.asleep
    world.worker_fails("a", number, CRASH)
    world.calm()
    assert phase(world) is Phase.UNLOADED
    caller = world.acquire("a")
    world.calm()
    assert world.answers[caller] == "granted"


def test_a_sleeper_that_dies_while_it_waits_for_room_is_replaced(world: World) -> None:
    asleep(world)
    holder = world.acquire("b")
    world.calm()
    waiting = world.acquire("a")
    world.calm()
    world.worker_fails("a", world.models["a"].state.asleep, CRASH)
    world.calm()
    assert "a" not in world.residency.held
    world.give_back("b", holder)
    world.calm()
    assert world.answers[waiting] == "granted"


def test_a_worker_that_does_not_fall_asleep_is_stopped(world: World) -> None:
    loaded(world)
    caller = world.sleep("a")
    read(world)
    world.pass_time(LIMITS.suspend_seconds)
    read(world)
    assert phase(world) is Phase.STOPPING
    world.calm()
    assert phase(world) is Phase.UNLOADED
    assert world.answers[caller] == "slept"


def test_a_sleeping_model_gives_way_when_even_its_process_is_too_much() -> None:
    world = World(("a", "b"), models_max=0, sizes=(4, 8), budget=8)
    asleep(world)
    loaded(world, "b")
    assert phase(world) is Phase.UNLOADED


def test_keep_alive_holds_off_the_idle_time_outs_and_the_longest_counts(world: World) -> None:
    loaded(world, wish=SLEEPY)
    used(world, "a", keep_alive_seconds=60.0)
    used(world, "a", keep_alive_seconds=5.0)
    world.pass_time(59.0)
    world.calm()
    assert phase(world) is Phase.READY
    world.pass_time(1.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING


def test_keep_alive_never_shortens_an_idle_time_out(world: World) -> None:
    loaded(world, wish=SLEEPY)
    used(world, "a", keep_alive_seconds=1.0)
    world.pass_time(9.0)
    world.calm()
    assert phase(world) is Phase.READY


def test_a_model_that_is_kept_alive_is_evicted_like_any_other(world: World) -> None:
    loaded(world)
    used(world, "a", keep_alive_seconds=1000.0)
    loaded(world, "b")
    assert phase(world) is Phase.UNLOADED


def test_a_pinned_model_neither_sleeps_nor_goes(world: World) -> None:
    loaded(world, wish=BOTH)
    world.pin("a")
    world.calm()
    world.pass_time(1000.0)
    world.calm()
    assert phase(world) is Phase.READY
    world.pin("a", pinned=False)
    world.calm()
    world.pass_time(10.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING


def test_a_model_pinned_while_it_sleeps_is_not_unloaded_for_idleness(world: World) -> None:
    loaded(world, wish=BOTH)
    world.pass_time(10.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING
    world.pin("a")
    world.calm()
    world.pass_time(1000.0)
    world.calm()
    assert phase(world) is Phase.SLEEPING
    world.pin("a", pinned=False)
    world.calm()
    world.pass_time(100.0)
    world.calm()
    assert phase(world) is Phase.UNLOADED


def test_who_does_not_fit_beside_pinned_models_is_refused_with_their_names(world: World) -> None:
    loaded(world)
    world.pin("a")
    world.calm()
    caller = world.acquire("b")
    world.calm()
    assert world.answers[caller] == Reason.INSUFFICIENT_MEMORY
    failure = world.models["b"].state.failure
    assert failure is not None
    assert failure.metadata["pinned"] == "a"
    assert failure.metadata["needed_bytes.RAM"] == "5"
    assert failure.metadata["free_bytes.RAM"] == "4"


def test_a_model_pinned_while_it_yields_stays(world: World) -> None:
    loaded(world)
    world.acquire("a")
    world.calm()
    waiting = world.acquire("b")
    world.calm()
    world.pass_time(PATIENCE)
    read(world)
    assert phase(world) is Phase.DRAINING
    world.pin("a")
    world.calm()
    assert phase(world) is Phase.READY
    assert world.answers[waiting] == Reason.INSUFFICIENT_MEMORY


def test_a_model_that_takes_more_than_predicted_has_idle_ones_evicted() -> None:
    world = World(("a", "b"), models_max=0, sizes=(4, 4), budget=8)
    loaded(world)
    world.models["b"].taken = 7
    loaded(world, "b")
    assert (phase(world), phase(world, "b")) == (Phase.UNLOADED, Phase.READY)


def test_a_server_that_stops_takes_sleepers_along(world: World) -> None:
    asleep(world)
    world.tell("a", m.CloseAsked(30.0))
    world.calm()
    assert world.models["a"].closed
    assert not world.models["a"].workers


def test_a_sleeping_model_whose_file_goes_is_gone(world: World) -> None:
    asleep(world)
    world.tell("a", m.FileGone())
    world.calm()
    assert "a" not in world.models


def test_a_sleeping_model_that_waits_to_wake_is_stopped_when_a_reload_does_not_find_it(world: World) -> None:
    asleep(world)
    waking = world.load("a")
    world.tell("a", m.FileGone(reloading=True))
    world.calm()
    assert "a" not in world.models
    assert not world.residency.held
    assert world.answers[waking] == Reason.MODEL_NOT_FOUND


def test_a_late_word_of_an_earlier_sleep_changes_nothing(world: World) -> None:
    loaded(world)
    before = world.models["a"].state
    world.tell("a", m.WorkerSlept(before.load_number))
    world.calm()
    assert replace(world.models["a"].state) == before
    assert Worker.READY in world.models["a"].workers.values()


def test_a_replica_that_does_not_fit_beside_another_and_a_pinned_model_is_refused() -> None:
    second = replica_id("a", 1)
    world = World(("a", "b", second), models_max=2)
    loaded(world)
    loaded(world, "b")
    world.pin("b")
    world.calm()
    caller = world.acquire(second)
    world.calm()
    assert world.answers[caller] == Reason.INSUFFICIENT_MEMORY
    failure = world.models[second].state.failure
    assert failure is not None
    assert (failure.metadata["replica_count"], failure.metadata["pinned"]) == ("1", "b")
    assert "'b', which is pinned" in failure.message
