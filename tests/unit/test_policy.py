"""Who gets in and who has to go: `policy.plan`, `options` and the admission behind it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paddock_server.manager import failure as failures
from paddock_server.manager.admission import Footprint, MemoryAdmission, device_bytes
from paddock_server.manager.options import Terms
from paddock_server.manager.policy import Plan, Resident, Standing, Waiting, eviction_costs, plan
from paddock_server.memory import RAM

PATIENCE = 10.0
NOW = 100.0


def sized(budget: int) -> MemoryAdmission:
    """An admission by bytes alone."""
    return MemoryAdmission(budget={RAM: budget})


def of(size: int, group: str = "", model: str = "") -> Footprint:
    return Footprint(((RAM, size),), group=group, model=model)


ONE = Footprint()
"""What a model costs where only their number counts."""


def resident(model: str, standing: Standing, last_use: float = 0.0, loaded_at: float = 0.0) -> Resident:
    return Resident(model, ONE, standing, last_use, loaded_at)


def planned(residents: list[Resident], waiting: list[Waiting], models_max: int) -> Plan:
    return plan(residents, waiting, MemoryAdmission(models_max), NOW, PATIENCE)


def fresh(model: str) -> Waiting:
    return Waiting(model, ONE, NOW)


def aged(model: str) -> Waiting:
    return Waiting(model, ONE, NOW - PATIENCE)


def test_everyone_gets_in_where_there_is_room() -> None:
    assert planned([], [fresh("a"), fresh("b")], 2) == Plan(admit=("a", "b"))


def test_no_limit_admits_everyone() -> None:
    residents = [resident(str(number), Standing.BUSY) for number in range(100)]
    assert planned(residents, [fresh("a")], 0) == Plan(admit=("a",))


def test_the_least_recently_used_idle_model_is_evicted() -> None:
    residents = [
        resident("newer", Standing.IDLE, last_use=2),
        resident("older", Standing.IDLE, last_use=1),
        resident("busy", Standing.BUSY, last_use=0),
    ]
    assert planned(residents, [fresh("a")], 3) == Plan(evict=("older",))


def test_nobody_is_evicted_while_somebody_is_leaving_anyway() -> None:
    residents = [resident("leaving", Standing.LEAVING), resident("idle", Standing.IDLE)]
    assert planned(residents, [fresh("a")], 2) == Plan()
    assert planned(residents, [fresh("a"), fresh("b")], 2) == Plan(evict=("idle",))


def test_an_idle_model_is_evicted_before_waiting_for_one_that_drains() -> None:
    residents = [resident("draining", Standing.DRAINING), resident("idle", Standing.IDLE)]
    assert planned(residents, [fresh("a")], 2) == Plan(evict=("idle",))
    assert planned([residents[0]], [fresh("a")], 1) == Plan()


def test_a_busy_model_is_no_victim_until_patience_ends() -> None:
    residents = [resident("busy", Standing.BUSY)]
    assert planned(residents, [fresh("a")], 1) == Plan(wake_at=NOW + PATIENCE)


def test_an_aged_waiter_makes_the_longest_resident_yield() -> None:
    residents = [
        resident("new", Standing.BUSY, last_use=1, loaded_at=50),
        resident("old", Standing.BUSY, last_use=99, loaded_at=10),
    ]
    assert planned(residents, [aged("a")], 2) == Plan(drain=("old",))


def test_a_loading_model_is_never_a_victim() -> None:
    assert planned([resident("loading", Standing.FIXED)], [aged("a")], 1) == Plan()


def test_one_yields_for_one_waiter() -> None:
    residents = [resident("yielding", Standing.YIELDING), resident("busy", Standing.BUSY)]
    assert planned(residents, [aged("a")], 2) == Plan()
    assert planned(residents, [aged("a"), aged("b")], 2) == Plan(drain=("busy",))


def test_a_yield_is_called_off_when_nobody_needs_it() -> None:
    residents = [resident("yielding", Standing.YIELDING)]
    assert planned(residents, [], 1) == Plan(relent=("yielding",))
    assert planned(residents, [fresh("a")], 1) == Plan(relent=("yielding",), wake_at=NOW + PATIENCE)


def test_a_yield_is_called_off_when_another_model_has_become_idle() -> None:
    residents = [resident("yielding", Standing.YIELDING), resident("idle", Standing.IDLE)]
    assert planned(residents, [aged("a")], 2) == Plan(evict=("idle",), relent=("yielding",))


def test_a_small_model_does_not_overtake_a_large_one() -> None:
    residents = [Resident("busy", of(6), Standing.BUSY)]
    waiting = [Waiting("large", of(8), NOW), Waiting("small", of(2), NOW)]
    assert plan(residents, waiting, sized(10), NOW, PATIENCE) == Plan(wake_at=NOW + PATIENCE)


def test_nobody_is_evicted_for_room_that_would_not_be_enough() -> None:
    residents = [Resident("idle", of(2), Standing.IDLE), Resident("busy", of(8), Standing.BUSY)]
    waiting = [Waiting("large", of(4), NOW)]
    assert plan(residents, waiting, sized(10), NOW, PATIENCE) == Plan(wake_at=NOW + PATIENCE)


def test_as_many_are_evicted_as_are_needed() -> None:
    residents = [Resident(name, of(3), Standing.IDLE, last_use=number) for number, name in enumerate("xyz")]
    waiting = [Waiting("large", of(6), NOW)]
    assert plan(residents, waiting, sized(10), NOW, PATIENCE) == Plan(evict=("x", "y"))


def test_the_cheapest_set_is_evicted_not_the_first_that_is_enough() -> None:
    residents = [
        Resident("oldest and small", of(2), Standing.IDLE, last_use=1, reload_seconds=8),
        Resident("large", of(6), Standing.IDLE, last_use=2, reload_seconds=9),
        Resident("medium", of(2), Standing.IDLE, last_use=3, reload_seconds=9),
    ]
    assert plan(residents, [Waiting("a", of(6), NOW)], sized(10), NOW, PATIENCE) == Plan(evict=("large",))


def test_what_loads_slowly_stays_longer_and_what_loads_fast_goes_first() -> None:
    slow = Resident("slow", ONE, Standing.IDLE, last_use=1, reload_seconds=60)
    fast = Resident("fast", ONE, Standing.IDLE, last_use=2, reload_seconds=1)
    assert planned([slow, fast], [fresh("a")], 2) == Plan(evict=("fast",))


def test_among_models_that_load_about_as_fast_the_least_recently_used_goes() -> None:
    older = Resident("older", ONE, Standing.IDLE, last_use=1.0, reload_seconds=0.35)
    newer = Resident("newer", ONE, Standing.IDLE, last_use=1.01, reload_seconds=0.3)
    assert planned([older, newer], [fresh("a")], 2) == Plan(evict=("older",))


def test_a_priority_makes_a_model_dearer() -> None:
    plain = resident("plain", Standing.IDLE, last_use=2)
    dear = Resident("dear", ONE, Standing.IDLE, last_use=1, priority=2)
    assert planned([plain, dear], [fresh("a")], 2) == Plan(evict=("plain",))
    assert eviction_costs([plain, dear])["dear"] == 2 * eviction_costs([plain, dear])["plain"]


def test_a_place_and_the_bytes_must_both_be_there() -> None:
    both = MemoryAdmission(2, {RAM: 10})
    assert both.fits([of(3)], of(7))
    assert not both.fits([of(3)], of(8))
    assert not both.fits([of(3), of(3)], of(1))


def test_a_device_without_a_limit_takes_anything() -> None:
    cost = Footprint((("GPU0", 100), (RAM, 5)))
    assert sized(10).fits([cost], cost)
    assert not MemoryAdmission(budget={"GPU0": 150}).fits([cost], cost)


def test_of_an_exclusive_group_one_is_there_at_a_time() -> None:
    residents = [Resident("b", of(1, "big", "b"), Standing.IDLE), Resident("x", of(1), Standing.IDLE)]
    big, small = Waiting("a", of(1, "big", "a"), NOW), Waiting("c", of(1, "small", "c"), NOW)
    assert plan(residents, [big], sized(10), NOW, PATIENCE) == Plan(evict=("b",))
    assert plan(residents, [small], sized(10), NOW, PATIENCE) == Plan(admit=("c",))


def test_replicas_of_a_model_of_an_exclusive_group_are_there_together() -> None:
    admission = sized(10)
    terms = Terms(group="big")
    one, other = (admission.predicted({RAM: 1}, terms, model) for model in ("a", "b"))
    assert admission.fits([one], one)
    assert admission.fits([admission.measured(one, 2)], one)
    assert not admission.fits([one], other)


def test_a_model_that_took_more_than_predicted_has_idle_ones_go() -> None:
    residents = [
        Resident("grown", of(9), Standing.BUSY),
        Resident("idle", of(3), Standing.IDLE),
        Resident("pinned", of(1), Standing.FIXED),
    ]
    assert plan(residents, [], sized(10), NOW, PATIENCE) == Plan(evict=("idle",))
    assert plan(residents[:1], [], sized(5), NOW, PATIENCE) == Plan(), "nothing can be done"


def test_what_is_measured_takes_the_place_of_what_was_predicted() -> None:
    admission = sized(10)
    gpu = Footprint((("GPU0", 4), (RAM, 5)), group="g")
    assert device_bytes(admission.measured(gpu, 7)) == {"GPU0": 4, RAM: 7}
    assert device_bytes(admission.measured(gpu, 0)) == {"GPU0": 4, RAM: 5}, "it could not be measured"
    assert device_bytes(admission.asleep(gpu, 2)) == {RAM: 2}
    assert admission.asleep(gpu, 2) == Footprint(((RAM, 2),), places=0)


def test_a_refusal_tells_what_is_needed_what_is_free_and_who_holds_what() -> None:
    figures = MemoryAdmission(0, {RAM: 10}).figures({"b": of(4)}, of(8))
    assert figures == {
        "needed_bytes.RAM": "8",
        "free_bytes.RAM": "6",
        "budget_bytes.RAM": "10",
        "held_by.b": "RAM=4",
    }


def test_a_refusal_reads_well() -> None:
    held = {"qwen2.5": Footprint(((RAM, 3 << 29), ("CUDA0", 1 << 20))), "asleep": Footprint()}
    figures = MemoryAdmission(2, {RAM: 2 << 30}).figures(held, of(2**30))

    assert failures.never_fits("m", figures).message == (
        "Model 'm' does not fit even when nothing else is loaded: models_max 2, needed 1.0 GiB of RAM, "
        "free 512 MiB of RAM, budget 2.0 GiB of RAM, qwen2.5 holds 1.5 GiB of RAM and 1.0 MiB of CUDA0, "
        "asleep holds a place."
    )


def test_of_many_candidates_none_goes_in_vain() -> None:
    small = [Resident(f"s{n:02}", of(1), Standing.IDLE, last_use=n) for n in range(12)]
    large = Resident("large", of(20), Standing.IDLE, last_use=0.5, reload_seconds=9)
    chosen = plan([*small, large], [Waiting("a", of(20), NOW)], sized(32), NOW, PATIENCE)
    assert chosen == Plan(evict=("large",))


standings = st.sampled_from(Standing)
residents_of = st.lists(
    st.tuples(standings, st.integers(1, 5), st.integers(0, 9), st.integers(0, 9)), max_size=6
)
waiting_of = st.lists(st.tuples(st.integers(1, 10), st.integers(0, 20)), max_size=5)


@given(residents_of, waiting_of, st.integers(10, 20))
def test_a_plan_keeps_the_budget_and_spares_the_busy(
    residents_in: list[tuple[Standing, int, int, int]], waiting_in: list[tuple[int, int]], budget: int
) -> None:
    residents = [
        Resident(f"r{index}", of(cost), standing, last_use, loaded_at)
        for index, (standing, cost, last_use, loaded_at) in enumerate(residents_in)
    ]
    waits = sorted((waited for _, waited in waiting_in), reverse=True)
    waiting = [
        Waiting(f"w{index}", of(cost), NOW - waits[index]) for index, (cost, _) in enumerate(waiting_in)
    ]
    admission = sized(budget)

    result = plan(residents, waiting, admission, NOW, PATIENCE)

    standing_of = {one.model: one.standing for one in residents}
    cost_of = {one.model: device_bytes(one.cost)[RAM] for one in [*residents, *waiting]}
    named = [*result.admit, *result.evict, *result.drain, *result.relent]
    assert len(named) == len(set(named))
    assert all(standing_of[model] is Standing.IDLE for model in result.evict)
    assert all(standing_of[model] is Standing.BUSY for model in result.drain)
    assert all(standing_of[model] is Standing.YIELDING for model in result.relent)
    assert list(result.admit) == [one.model for one in waiting][: len(result.admit)]
    held = sum(cost_of[one.model] for one in residents)
    if result.admit:
        assert held + sum(cost_of[model] for model in result.admit) <= budget
    if result.drain:
        assert any(one.since + PATIENCE <= NOW for one in waiting)
    if not waiting:
        assert not result.drain
        assert not result.evict or held > budget
