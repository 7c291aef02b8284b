"""Who gets in and who has to go: `policy.plan`, `options` and the admission behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from paddock_server.manager.admission import Cost, CountAdmission
from paddock_server.manager.policy import Plan, Resident, Standing, Waiting, plan

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.options import Options

PATIENCE = 10.0
NOW = 100.0


class Bytes:
    """An admission by size, as the memory ledger will be: nothing else needs to know what a cost is."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def predicted(self, entry: CatalogEntry, options: Options) -> Cost:
        del options
        return entry.size_bytes

    def measured(self, predicted: Cost, resident_bytes: int) -> Cost:
        del predicted
        return resident_bytes

    def fits(self, held: Iterable[Cost], cost: Cost) -> bool:
        return sum(int(str(one)) for one in held) + int(str(cost)) <= self.budget

    def figures(self, cost: Cost) -> Mapping[str, str]:
        return {"needed_bytes": str(cost), "budget_bytes": str(self.budget)}


def resident(model: str, standing: Standing, last_use: float = 0.0, loaded_at: float = 0.0) -> Resident:
    return Resident(model, 1, standing, last_use, loaded_at)


def planned(residents: list[Resident], waiting: list[Waiting], models_max: int) -> Plan:
    return plan(residents, waiting, CountAdmission(models_max), NOW, PATIENCE)


def fresh(model: str) -> Waiting:
    return Waiting(model, 1, NOW)


def aged(model: str) -> Waiting:
    return Waiting(model, 1, NOW - PATIENCE)


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
    residents = [Resident("busy", 6, Standing.BUSY)]
    waiting = [Waiting("large", 8, NOW), Waiting("small", 2, NOW)]
    assert plan(residents, waiting, Bytes(10), NOW, PATIENCE) == Plan(wake_at=NOW + PATIENCE)


def test_nobody_is_evicted_for_room_that_would_not_be_enough() -> None:
    residents = [Resident("idle", 2, Standing.IDLE), Resident("busy", 8, Standing.BUSY)]
    waiting = [Waiting("large", 4, NOW)]
    assert plan(residents, waiting, Bytes(10), NOW, PATIENCE) == Plan(wake_at=NOW + PATIENCE)


def test_as_many_are_evicted_as_are_needed() -> None:
    residents = [Resident(name, 3, Standing.IDLE, last_use=number) for number, name in enumerate("xyz")]
    waiting = [Waiting("large", 6, NOW)]
    assert plan(residents, waiting, Bytes(10), NOW, PATIENCE) == Plan(evict=("x", "y"))


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
        Resident(f"r{index}", cost, standing, last_use, loaded_at)
        for index, (standing, cost, last_use, loaded_at) in enumerate(residents_in)
    ]
    waits = sorted((waited for _, waited in waiting_in), reverse=True)
    waiting = [Waiting(f"w{index}", cost, NOW - waits[index]) for index, (cost, _) in enumerate(waiting_in)]
    admission = Bytes(budget)

    result = plan(residents, waiting, admission, NOW, PATIENCE)

    standing_of = {one.model: one.standing for one in residents}
    cost_of = {one.model: int(str(one.cost)) for one in [*residents, *waiting]}
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
        assert not result.evict
        assert not result.drain
