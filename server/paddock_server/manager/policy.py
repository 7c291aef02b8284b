"""Who gets in and who has to go. One pure decision over everything that is known.

- First come, first served: nobody is let in before one who waits longer, so that a small model cannot keep a
  large one waiting for ever.
- Idle models go first, least recently used first. A model in use is not a victim.
- One who has waited for longer than the patience is owed a place: the model that has been loaded for the
longest
  time takes no new requests, lets its running ones end, and goes. It is let off when that is no longer
  needed.
- Only as many go as are needed, and what is leaving already counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from paddock_server.manager.admission import Cost

if TYPE_CHECKING:
    from paddock_server.manager.admission import Admission


class Standing(Enum):
    """What can be done about a model that takes up room."""

    FIXED = auto()
    """It loads, or its worker is being started again: nothing."""

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
        self._held = [resident.cost for resident in residents]
        self._staying = [resident for resident in residents if resident.standing is not Standing.LEAVING]
        self._yielding = [resident.model for resident in residents if resident.standing is Standing.YIELDING]
        self._victims: list[Resident] = []

    def plan(self, waiting: Sequence[Waiting]) -> Plan:
        admit: list[str] = []
        wake_at: float | None = None
        nobody_passed_over = True
        for candidate in waiting:
            if nobody_passed_over and self._admission.fits(self._held, candidate.cost):
                admit.append(candidate.model)
                self._held.append(candidate.cost)
            elif self._make_room(candidate):
                nobody_passed_over = False
            else:
                # Whatever room those behind could have is owed to this one.
                patience_ends = candidate.since + self._patience
                wake_at = patience_ends if patience_ends > self._now else None
                break
            self._staying.append(Resident(candidate.model, candidate.cost, Standing.FIXED))
        going = {victim.model for victim in self._victims}
        return Plan(
            admit=tuple(admit),
            evict=self._of(Standing.IDLE),
            drain=self._of(Standing.BUSY),
            relent=tuple(model for model in self._yielding if model not in going),
            wake_at=wake_at,
        )

    def _of(self, standing: Standing) -> tuple[str, ...]:
        return tuple(victim.model for victim in self._victims if victim.standing is standing)

    def _make_room(self, candidate: Waiting) -> bool:
        """Choose who goes so that the candidate will fit; nobody when it would not fit even then."""
        staying = list(self._staying)
        victims: list[Resident] = []
        while not self._admission.fits((resident.cost for resident in staying), candidate.cost):
            victim = self._victim(staying, candidate)
            if victim is None:
                return False
            staying.remove(victim)
            victims.append(victim)
        self._staying = staying
        self._victims += victims
        return True

    def _victim(self, staying: Sequence[Resident], candidate: Waiting) -> Resident | None:
        aged = self._now >= candidate.since + self._patience
        order = _AGED_ORDER if aged else _ORDER
        ranked = [resident for resident in staying if resident.standing in order]
        return min(
            ranked,
            key=lambda resident: (
                order.index(resident.standing),
                resident.last_use if resident.standing is Standing.IDLE else resident.loaded_at,
                resident.model,
            ),
            default=None,
        )


_ORDER: Final = (Standing.IDLE, Standing.DRAINING)
_AGED_ORDER: Final = (*_ORDER, Standing.YIELDING, Standing.BUSY)
"""Whom it costs least, first."""
