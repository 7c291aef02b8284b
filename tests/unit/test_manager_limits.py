"""Reloads that change limits: who is over them goes once it is idle, and nobody for nothing."""

from __future__ import annotations

import pytest

from paddock_server.manager.admission import NO_EXCESS, Excess, Footprint, MemoryAdmission
from paddock_server.manager.options import Terms
from paddock_server.manager.policy import Plan, Resident, Standing, plan
from paddock_server.manager.replicas import replica_id
from paddock_server.manager.state import Phase
from paddock_server.memory import RAM
from tests.unit.manager_world import World

NAMES = ("a", "b", "c")


def of(model: str, size: int = 1, group: str = "") -> Footprint:
    return Footprint(((RAM, size),), group=group, model=model)


def idle(
    model: str, last_use: float, size: int = 1, group: str = "", reload_seconds: float = 0.0
) -> Resident:
    return Resident(model, of(model, size, group), Standing.IDLE, last_use, reload_seconds=reload_seconds)


def planned(residents: list[Resident], models_max: int = 0, budget: int = 100) -> Plan:
    return plan(residents, [], MemoryAdmission(models_max, {RAM: budget}), now=50.0, patience=10.0)


def loaded(world: World) -> list[str]:
    return [name for name, model in world.models.items() if model.state.phase is Phase.READY]


@pytest.fixture
def world() -> World:
    """Three models that were loaded one after the other, with room for all."""
    world = World(NAMES, 3, sizes=(2, 2, 2), budget=6)
    for name in NAMES:
        world.load(name)
        world.calm()
        world.pass_time(1)
    assert loaded(world) == ["a", "b", "c"]
    return world


# The decision


def test_what_is_within_the_limits_has_no_excess_and_what_is_not_says_by_how_much() -> None:
    admission = MemoryAdmission(2, {RAM: 10, "GPU0": 4})
    held = [of("a", 6, "g"), of("b", 6, "g"), of("c", 1, "g"), Footprint(((RAM, 1),), places=0)]
    assert admission.excess([held[0], held[3]]) == NO_EXCESS
    assert admission.excess(held) == Excess({RAM: 4}, places=1, groups={"g": 2})
    assert MemoryAdmission().excess(held[3:] * 9) == NO_EXCESS
    assert MemoryAdmission().excess([of("a", group="g"), of("a", group="g")]) == NO_EXCESS, "replicas"


def test_of_places_too_many_the_cheapest_idle_models_go() -> None:
    residents = [idle("old", 1), idle("slow", 0, reload_seconds=90.0), idle("new", 3)]
    assert planned(residents, models_max=2) == Plan(evict=("old",))
    assert planned(residents, models_max=1) == Plan(evict=("old", "new"))


def test_of_an_exclusive_group_the_least_recently_used_go_whatever_their_loads_cost() -> None:
    residents = [idle("old", 1, group="g", reload_seconds=90.0), idle("new", 2, group="g"), idle("x", 0)]
    assert planned(residents) == Plan(evict=("old",))


def test_all_idle_models_of_a_group_go_beside_one_in_use() -> None:
    busy = Resident("busy", of("busy", group="g"), Standing.BUSY)
    assert set(planned([busy, idle("b", 1, group="g"), idle("c", 2, group="g")]).evict) == {"b", "c"}


def test_a_model_of_a_group_goes_with_all_its_replicas_or_not_at_all() -> None:
    first, second = (
        Resident(replica_id("a", number), of("a", group="g"), Standing.IDLE, last_use)
        for number, last_use in ((0, 1), (1, 9))
    )
    assert planned([first, second, idle("b", 5, group="g")]) == Plan(evict=("b",))
    assert set(planned([first, second, idle("b", 10, group="g")]).evict) == {first.model, second.model}


def test_idle_models_go_as_far_as_that_helps_and_not_beyond() -> None:
    busy = Resident("busy", of("busy", 8), Standing.BUSY)
    pinned = Resident("pinned", of("pinned", 8), Standing.FIXED)
    gpu = Resident("gpu", Footprint((("GPU0", 5),), model="gpu"), Standing.IDLE)
    assert planned([busy, pinned, idle("b", 1, 3), gpu], budget=10) == Plan(evict=("b",))
    assert planned([busy, pinned, gpu], budget=10) == Plan(), "what it has is not what is short"


def test_with_many_candidates_none_goes_in_vain_for_a_limit() -> None:
    residents = [idle(f"m{number:02}", number) for number in range(15)]
    assert len(planned(residents, models_max=12).evict) == 3


# The books, after a reload


def test_fewer_places_after_a_reload_have_the_least_recently_used_idle_model_go(world: World) -> None:
    world.limit(2, 0)
    world.calm()
    assert loaded(world) == ["b", "c"]
    world.assert_within_limits()


def test_a_smaller_budget_after_a_reload_has_idle_models_go(world: World) -> None:
    world.limit(0, 3)
    world.calm()
    assert loaded(world) == ["c"]


def test_a_model_in_use_goes_once_it_is_idle(world: World) -> None:
    callers = {name: world.acquire(name) for name in NAMES}
    world.calm()
    world.limit(1, 0)
    world.calm()
    assert loaded(world) == ["a", "b", "c"]
    for name in ("c", "a"):
        world.give_back(name, callers[name])
        world.calm()
    assert loaded(world) == ["b"], "whoever is idle first goes"
    world.give_back("b", callers["b"])
    world.calm()
    assert loaded(world) == ["b"]


def test_a_pinned_model_stays_over_the_limits_and_that_is_known(world: World) -> None:
    world.pin("a")
    world.calm()
    world.limit(1, 0)
    world.calm()
    assert (loaded(world), world.residency.pinned_over_limits) == (["a"], ())
    world.limit(0, 1)
    world.calm()
    assert (loaded(world), world.residency.pinned_over_limits) == (["a"], ("a",))
    world.pin("a", pinned=False)
    world.calm()
    assert (loaded(world), world.residency.pinned_over_limits) == ([], ())


def test_models_that_a_reload_puts_into_one_exclusive_group_do_not_stay_together(world: World) -> None:
    world.group("a", "g")
    world.calm()
    assert loaded(world) == ["a", "b", "c"]
    world.group("c", "g")
    world.calm()
    assert loaded(world) == ["b", "c"]
    world.load("a")
    world.calm()
    assert loaded(world) == ["a", "b"]


def test_a_model_that_leaves_its_group_makes_room_for_who_waits(world: World) -> None:
    for name in NAMES:
        world.group(name, "g")
    world.calm()
    assert loaded(world) == ["c"]
    user = world.acquire("c")
    world.calm()
    waiter = world.load("a")
    world.calm()
    assert waiter in world.pending
    world.group("c", "")
    world.calm()
    assert (loaded(world), world.answers[user], world.answers[waiter]) == (["a", "c"], "granted", "loaded")


def test_who_waits_and_no_longer_fits_beside_nothing_is_refused(world: World) -> None:
    users = [world.acquire(name) for name in ("b", "c")]
    world.unload("a")
    world.calm()
    world.limit(2, 0)
    waiter = world.load("a")
    world.calm()
    assert waiter in world.pending
    world.limit(2, 1)
    world.calm()
    assert world.answers[waiter] == "INSUFFICIENT_MEMORY"
    assert all(world.answers[user] == "granted" for user in users)


def test_a_model_that_sleeps_is_in_no_group(world: World) -> None:
    world.sleep("a")
    world.calm()
    world.group("a", "g")
    world.group("b", "g")
    world.calm()
    assert world.models["a"].state.phase is Phase.SLEEPING
    assert loaded(world) == ["b", "c"]


def test_a_changed_group_changes_the_cost_of_a_model_that_is_awake_alone() -> None:
    admission = MemoryAdmission()
    awake = of("a", group="g")
    assert admission.on_terms(awake, Terms(group="other")) == of("a", group="other")
    asleep = admission.asleep(awake, 5)
    assert admission.on_terms(asleep, Terms(group="other")) == asleep
