"""Who holds room and who waits for it: the manager loop's books. Synchronous, no clock, no tasks.

The books hold what the loop itself decides; what a model is doing is asked of its actor when a decision is
made. That view may be a moment old. It cannot do harm: whoever is chosen as a victim agrees or refuses in its
own actor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from paddock_server.manager import failure as failures
from paddock_server.manager.admission import Cost, device_bytes
from paddock_server.manager.messages import AdmissionRefused, Admitted, EvictAsked, EvictionRelented
from paddock_server.manager.options import Terms
from paddock_server.manager.policy import Plan, Resident, Standing, Waiting, plan
from paddock_server.manager.replicas import model_of, shown_name
from paddock_server.manager.state import Cause, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from paddock_server.manager.admission import Admission
    from paddock_server.manager.failure import Failure


class Look(NamedTuple):
    """What an actor shows of itself."""

    ticket: int
    phase: Phase
    cause: Cause
    leases: int
    last_use: float
    loaded_at: float
    reload_seconds: float = 0.0
    terms: Terms = Terms()
    stay: int = 0
    """The ticket it holds room under, where that is an earlier one."""


class Stage(Enum):
    """The three phases of a reservation."""

    RESERVED = auto()
    COMMITTED = auto()
    RELEASING = auto()


@dataclass(slots=True)
class Holding:
    """What a model holds. Changed by `Residency` alone."""

    ticket: int
    cost: Cost
    stage: Stage = Stage.RESERVED
    asked: Standing | None = None
    """LEAVING or YIELDING when the actor has been asked to, and has not answered otherwise."""


@dataclass(frozen=True, slots=True)
class _Entry:
    ticket: int
    cost: Cost
    since: float


class Order(NamedTuple):
    """What to tell an actor."""

    model: str
    message: Admitted | AdmissionRefused | EvictAsked | EvictionRelented


class Residency:
    """The books. One writer: the manager loop."""

    def __init__(self, admission: Admission, *, patience_seconds: float, waiting_max: int) -> None:
        self._admission = admission
        self._patience = patience_seconds
        self._waiting_max = waiting_max
        self._held: dict[str, Holding] = {}
        self._waiting: dict[str, _Entry] = {}

    def limit(self, admission: Admission) -> None:
        """Go by other limits from now on. Who is there already stays as long as memory allows."""
        self._admission = admission

    @property
    def held(self) -> Mapping[str, Holding]:
        """Who holds what, by model."""
        return self._held

    def held_bytes(self, *, without: str = "") -> Mapping[str, int]:
        """Return what models hold, by device; of all but the one that is named."""
        total: Counter[str] = Counter()
        for model, holding in self._held.items():
            if model != without:
                total.update(device_bytes(holding.cost))
        return total

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who waits, first come first."""
        return tuple(self._waiting)

    def enter(self, model: str, ticket: int, cost: Cost, now: float) -> Order | None:
        """Queue a model; or return its refusal."""
        if not self._admission.fits((), cost):
            failure = failures.never_fits(model_of(model), self._admission.figures({}, cost))
        elif len(self._waiting) >= self._waiting_max:
            failure = failures.too_many_models_wait(model_of(model), len(self._waiting))
        else:
            self._waiting[model] = _Entry(ticket, cost, now)
            return None
        return Order(model, AdmissionRefused(ticket, failure))

    def leave(self, model: str, ticket: int) -> None:
        """Take a model out, whether it waits or holds."""
        entry = self._waiting.get(model)
        if entry is not None and entry.ticket == ticket:
            del self._waiting[model]
        if self._holding(model, ticket) is not None:
            del self._held[model]

    def commit(self, model: str, ticket: int, resident_bytes: int) -> None:
        """Replace what was predicted, or measured before, by what is measured."""
        holding = self._holding(model, ticket)
        if holding is not None:
            holding.cost = self._admission.measured(holding.cost, resident_bytes)
            holding.stage = Stage.COMMITTED

    def asleep(self, model: str, ticket: int, resident_bytes: int) -> None:
        """Note that a worker has given its memory back."""
        holding = self._holding(model, ticket)
        if holding is not None:
            holding.cost = self._admission.asleep(holding.cost, resident_bytes)
            holding.asked = None

    def releasing(self, model: str, ticket: int) -> None:
        """Note that a worker is being stopped."""
        holding = self._holding(model, ticket)
        if holding is not None:
            holding.stage = Stage.RELEASING

    def refused(self, model: str, ticket: int) -> None:
        """Note that a model would not be evicted."""
        holding = self._holding(model, ticket)
        if holding is not None:
            holding.asked = None

    def decide(self, look: Callable[[str], Look | None], now: float) -> tuple[list[Order], float | None]:
        """Make a plan and enter it in the books; return what to tell whom, and when to plan again at the
        latest."""
        if (
            not self._waiting
            and all(holding.asked is not Standing.YIELDING for holding in self._held.values())
            and not self._admission.is_overrun(holding.cost for holding in self._held.values())
        ):
            return [], None
        looks = {model: look(model) for model in self._held}
        refusals = list(self._refuse_without_prospect(looks))
        residents = [self._resident(model, holding, looks[model]) for model, holding in self._held.items()]
        waiting = [Waiting(model, entry.cost, entry.since) for model, entry in self._waiting.items()]
        chosen = plan(residents, waiting, self._admission, now, self._patience)
        return [*refusals, *self._carry_out(chosen)], chosen.wake_at

    def _refuse_without_prospect(self, looks: Mapping[str, Look | None]) -> Iterable[Order]:
        """Turn away who would wait for room that nobody makes: pinned models, and replicas for another one of
        their model."""
        for name, entry in list(self._waiting.items()):
            pinned: dict[str, Cost] = {
                other: self._held[other].cost
                for other, look in looks.items()
                if other != name and look is not None and look.terms.pinned and look.phase in _STAYING
            }
            replicas: dict[str, Cost] = {
                other: self._held[other].cost
                for other, look in looks.items()
                if other != name and model_of(other) == model_of(name) and self._stays(other, look)
            }
            if self._admission.fits((pinned | replicas).values(), entry.cost):
                continue
            del self._waiting[name]
            failure = self._no_room(model_of(name), entry.cost, pinned, replicas)
            yield Order(name, AdmissionRefused(entry.ticket, failure))

    def _no_room(self, model: str, cost: Cost, pinned: dict[str, Cost], replicas: dict[str, Cost]) -> Failure:
        """Say beside whom a model does not fit, and beside no more than it takes for that."""
        fits = self._admission.fits
        if replicas and not fits(replicas.values(), cost):
            pinned = {}
        elif not fits(pinned.values(), cost):
            replicas = {}
        shown = {shown_name(name): held for name, held in (pinned | replicas).items()}
        figures = self._admission.figures(shown, cost)
        names = sorted({model_of(name) for name in pinned.keys() - replicas.keys()})
        if not replicas:
            return failures.no_room_beside_pinned(model, names, figures)
        return failures.no_room_beside_replicas(model, len(replicas), names, figures)

    def _stays(self, model: str, look: Look | None) -> bool:
        return self._resident(model, self._held[model], look).standing in _IN_PLACE

    def _carry_out(self, chosen: Plan) -> Iterable[Order]:
        for model in chosen.admit:
            entry = self._waiting.pop(model)
            self._held[model] = Holding(entry.ticket, entry.cost)
            yield Order(model, Admitted(entry.ticket))
        for models, standing in ((chosen.evict, Standing.LEAVING), (chosen.drain, Standing.YIELDING)):
            for model in models:
                holding = self._held[model]
                holding.asked = standing
                yield Order(model, EvictAsked(holding.ticket, when_drained=standing is Standing.YIELDING))
        for model in chosen.relent:
            holding = self._held[model]
            holding.asked = None
            yield Order(model, EvictionRelented(holding.ticket))

    def _holding(self, model: str, ticket: int) -> Holding | None:
        holding = self._held.get(model)
        return holding if holding is not None and holding.ticket == ticket else None

    def _resident(self, model: str, holding: Holding, look: Look | None) -> Resident:
        if look is None:
            return Resident(model, holding.cost, Standing.LEAVING)
        return Resident(
            model,
            holding.cost,
            _standing(holding, look),
            look.last_use,
            look.loaded_at,
            look.reload_seconds,
            look.terms.priority,
        )


_IN_PLACE: Final = frozenset({Standing.FIXED, Standing.IDLE, Standing.BUSY})
"""Who stays if nobody asks it to go."""

_STAYING: Final = frozenset({Phase.READY, Phase.SLEEPING})
"""A pinned model in one of these is there to stay."""


def _standing(holding: Holding, look: Look) -> Standing:
    if holding.stage is Stage.RELEASING:
        return Standing.LEAVING
    if holding.asked is not None:
        return holding.asked
    if holding.ticket not in {look.ticket, look.stay}:
        return Standing.LEAVING
    match look.phase:
        case Phase.READY | Phase.SLEEPING if look.terms.pinned:
            return Standing.FIXED
        case Phase.SLEEPING:
            return Standing.IDLE
        case Phase.READY:
            return Standing.BUSY if look.leases else Standing.IDLE
        case Phase.DRAINING:
            return Standing.YIELDING if look.cause is Cause.YIELD else Standing.DRAINING
        case Phase.STOPPING | Phase.UNLOADED | Phase.FAILED:
            return Standing.LEAVING
        case _:
            return Standing.FIXED
