"""Who gets in and who has to go. One pure decision over everything that is known.

- First come, first served: nobody is let in before one who waits longer, so that a small model cannot keep a
  large one waiting for ever.
- Idle models go first: the set of them that it costs least to do without. What a model costs is the time its
  load takes again, the more the more recently it was used and the higher its priority (`eviction_cost`). A
  model in use is not a victim, nor is a pinned one.
- One who has waited for longer than the patience is owed a place: the model that has been loaded for the
  longest time takes no new requests, lets its running ones end, and goes. It is let off when that is no
  longer needed.
- A replica never has another one of its model go.
- Only as many go as are needed, and what is leaving already counts.
- Where more is held than may be, because a model took more than was predicted or a reload has changed the
  limits, the cheapest idle ones go, as many as help. Of an exclusive group those go that were used least
  recently. A model in use goes once it is idle, a pinned one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import combinations
from typing import TYPE_CHECKING, Final

from paddock_server.manager.admission import NO_EXCESS, Cost
from paddock_server.manager.replicas import model_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from paddock_server.manager.admission import Admission, Excess

EXACT_CANDIDATES: Final = 10
"""Of so many candidates the cheapest set is found by trying all sets; of more, step by step."""

LEAST_RELOAD_SECONDS: Final = 1.0
"""A load costs at least this: below, how busy the machine was says more than how large the model is."""


class Standing(Enum):
    """What can be done about a model that takes up room."""

    FIXED = auto()
    """It loads, its worker is being started again, or it is pinned: nothing."""

    IDLE = auto()
    """It can go at once."""

    BUSY = auto()
    """It has leases: it can only be asked to go when they have ended."""

    YIELDING = auto()
    """It has been asked just that, and can be let off."""

    DRAINING = auto()
    """It goes when its leases have ended, whatever happens; that can take a while."""

    LEAVING = auto()
    """Its worker is being stopped."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that takes up room. Times are in seconds of one clock."""

    model: str
    cost: Cost
    standing: Standing
    last_use: float = 0.0
    loaded_at: float = 0.0
    reload_seconds: float = 0.0
    """How long its load is going to take again."""

    priority: int = 0
    """Each step up doubles what it costs to do without the model."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model that waits for room."""

    model: str
    cost: Cost
    since: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. A model is named once at most."""

    admit: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    relent: tuple[str, ...] = ()
    wake_at: float | None = None
    """When somebody's patience ends, so that a new plan is needed even if nothing happens; None: never."""


def plan(
    residents: Sequence[Resident],
    waiting: Sequence[Waiting],
    admission: Admission,
    now: float,
    patience: float,
) -> Plan:
    """Decide. `waiting` is in order of arrival. Every waiting cost must fit beside nothing at all."""
    return _Planner(residents, admission, now, patience).plan(waiting)


class _Planner:
    """One plan while it is being made. `staying` are those who hold room and are not going to give it up."""

    def __init__(
        self, residents: Sequence[Resident], admission: Admission, now: float, patience: float
    ) -> None:
        self._admission = admission
        self._now = now
        self._patience = patience
        self._held = list(residents)
        self._staying = [resident for resident in residents if resident.standing is not Standing.LEAVING]
        self._prices = eviction_costs(residents)
        self._yielding = [resident.model for resident in residents if resident.standing is Standing.YIELDING]
        self._victims: list[Resident] = []

    def plan(self, waiting: Sequence[Waiting]) -> Plan:
        self._keep_limits()
        admit: list[str] = []
        wake_at: float | None = None
        nobody_passed_over = True
        for candidate in waiting:
            if nobody_passed_over and self._fits(self._held, candidate):
                admit.append(candidate.model)
                self._held = [*_others(self._held, candidate), _fixed(candidate)]
            elif self._make_room(candidate):
                nobody_passed_over = False
            else:
                # Whatever room those behind could have is owed to this one.
                patience_ends = candidate.since + self._patience
                wake_at = patience_ends if patience_ends > self._now else None
                break
            self._staying = [*_others(self._staying, candidate), _fixed(candidate)]
        going = {victim.model for victim in self._victims}
        return Plan(
            admit=tuple(admit),
            evict=self._of(Standing.IDLE),
            drain=self._of(Standing.BUSY),
            relent=tuple(model for model in self._yielding if model not in going),
            wake_at=wake_at,
        )

    def _keep_limits(self) -> None:
        """Have idle models go as far as that brings the others nearer to the limits."""
        if self._excess(self._staying) == NO_EXCESS:
            return
        idle = [resident for resident in self._staying if resident.standing is Standing.IDLE]
        least = self._excess(_without(self._staying, idle))
        by_use = sorted(idle, key=_use)
        self._have_go(
            self._step_by_step(by_use, lambda staying: self._excess(staying).groups == least.groups)
        )
        self._evict((Standing.IDLE,), lambda staying: self._excess(staying) == least)

    def _excess(self, residents: Sequence[Resident]) -> Excess:
        return self._admission.excess(_costs(residents))

    def _of(self, standing: Standing) -> tuple[str, ...]:
        return tuple(victim.model for victim in self._victims if victim.standing is standing)

    def _make_room(self, candidate: Waiting) -> bool:
        """Choose who goes so that the candidate will fit; nobody when it would not fit even then."""
        aged = self._now >= candidate.since + self._patience
        return self._evict(
            _AGED_ORDER if aged else _ORDER, lambda staying: self._fits(staying, candidate), candidate.model
        )

    def _fits(self, held: Sequence[Resident], candidate: Waiting) -> bool:
        """Whether a candidate fits; what it holds itself, when it sleeps, becomes part of its new cost."""
        return self._admission.fits(_costs(_others(held, candidate)), candidate.cost)

    def _evict(
        self, order: Sequence[Standing], enough: Callable[[Sequence[Resident]], bool], wanted_by: str = ""
    ) -> bool:
        """Choose the cheapest victims of these standings, so that what stays leaves enough.

        No replica goes for another one of its model, unless it goes anyway.
        """
        candidates = sorted(
            (
                resident
                for resident in self._staying
                if resident.standing in order
                and (
                    model_of(resident.model) != model_of(wanted_by) or resident.standing is Standing.DRAINING
                )
            ),
            key=lambda resident: self._rank(resident, order),
        )
        if not enough(_without(self._staying, candidates)):
            return False
        self._have_go(self._cheapest(candidates, order, enough))
        return True

    def _have_go(self, victims: list[Resident]) -> None:
        self._staying = _without(self._staying, victims)
        self._victims += victims

    def _cheapest(
        self,
        candidates: list[Resident],
        order: Sequence[Standing],
        enough: Callable[[Sequence[Resident]], bool],
    ) -> list[Resident]:
        """Return the victims, where all candidates together are enough."""
        if len(candidates) <= EXACT_CANDIDATES:
            sets = (
                list(chosen)
                for size in range(len(candidates) + 1)
                for chosen in combinations(candidates, size)
            )
            return min(
                (chosen for chosen in sets if enough(_without(self._staying, chosen))),
                key=lambda chosen: self._price(chosen, order),
            )
        return self._step_by_step(candidates, enough)

    def _step_by_step(
        self, candidates: Sequence[Resident], enough: Callable[[Sequence[Resident]], bool]
    ) -> list[Resident]:
        """Return the first candidates that are enough, without those that later ones have made needless."""
        chosen: list[Resident] = []
        for candidate in candidates:
            if enough(_without(self._staying, chosen)):
                break
            chosen.append(candidate)
        for victim in chosen[-2::-1]:
            spared = _without(chosen, [victim])
            if enough(_without(self._staying, spared)):
                chosen = spared
        return chosen

    def _rank(self, resident: Resident, order: Sequence[Standing]) -> tuple[int, float, str]:
        idle = resident.standing is Standing.IDLE
        price = self._prices[resident.model] if idle else resident.loaded_at
        return (order.index(resident.standing), price, resident.model)

    def _price(self, chosen: list[Resident], order: Sequence[Standing]) -> tuple[object, ...]:
        """What a set of victims costs: first as few as may be of those that are worst to take."""
        worst_first = tuple(
            sum(victim.standing is standing for victim in chosen) for standing in reversed(order)
        )
        idle = [victim for victim in chosen if victim.standing is Standing.IDLE]
        others = sorted(self._rank(victim, order) for victim in chosen if victim not in idle)
        total = sum(self._prices[victim.model] for victim in idle)
        return (worst_first[:-1], others, total, len(idle), [victim.model for victim in chosen])


def eviction_costs(residents: Sequence[Resident]) -> dict[str, float]:
    """Return what it costs to do without each model: the seconds of its load, weighed by use and priority.

    By use: the one used last counts whole, the one before it half, the third last a third. An order and no
    times, so that what was used a second earlier goes first among models that load in about the same time.
    """
    by_use = sorted(residents, key=_use)
    return {
        resident.model: max(resident.reload_seconds, LEAST_RELOAD_SECONDS) / rank * 2.0**resident.priority
        for rank, resident in enumerate(reversed(by_use), 1)
    }


def _use(resident: Resident) -> tuple[float, float, str]:
    return (resident.last_use, resident.loaded_at, resident.model)


def _costs(residents: Sequence[Resident]) -> list[Cost]:
    return [resident.cost for resident in residents]


def _others(residents: Sequence[Resident], candidate: Waiting) -> list[Resident]:
    return [resident for resident in residents if resident.model != candidate.model]


def _fixed(candidate: Waiting) -> Resident:
    return Resident(candidate.model, candidate.cost, Standing.FIXED)


def _without(residents: Sequence[Resident], gone: Sequence[Resident]) -> list[Resident]:
    models = {resident.model for resident in gone}
    return [resident for resident in residents if resident.model not in models]


_ORDER: Final = (Standing.IDLE, Standing.DRAINING)
_AGED_ORDER: Final = (*_ORDER, Standing.YIELDING, Standing.BUSY)
"""Whom it costs least, first."""
