"""Whether one more model fits beside those that are there: the memory ledger's arithmetic. Pure.

A cost is opaque to everyone but the admission that made it. It is held in three phases: reserved (predicted,
from the moment a load is admitted), committed (measured, once it is loaded), releasing (until its worker is
reaped).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from paddock_server.memory import RAM

if TYPE_CHECKING:
    from paddock_server.manager.options import Terms

Cost: TypeAlias = Hashable


class Admission(Protocol):
    """A budget. Does not remember what is held: it is told every time."""

    @property
    def budget(self) -> Mapping[str, int]:
        """Bytes there are, by device. A device that is not named has no limit."""
        ...

    def predicted(self, device_bytes: Mapping[str, int], terms: Terms, model: str) -> Cost:
        """Return the cost of a load of a model that is going to take so much of each device."""
        ...

    def measured(self, held: Cost, resident_bytes: int) -> Cost:
        """Return what a loaded model takes, now that it can be measured."""
        ...

    def asleep(self, held: Cost, resident_bytes: int) -> Cost:
        """Return what a model takes whose worker has given its memory back."""
        ...

    def fits(self, held: Iterable[Cost], cost: Cost) -> bool:
        """Say whether a cost fits beside those that are held, in whatever phase."""
        ...

    def on_terms(self, held: Cost, terms: Terms) -> Cost:
        """Return what a model takes whose terms have changed."""
        ...

    def excess(self, held: Iterable[Cost]) -> Excess:
        """Return how much more is held than may be: a model took more than was predicted, or limits have
        changed since."""
        ...

    def figures(self, held: Mapping[str, Cost], cost: Cost) -> Mapping[str, str]:
        """Return the numbers to tell somebody whose model does not fit beside those that are held."""
        ...


@dataclass(frozen=True, slots=True)
class Excess:
    """How much more is held than may be. Limits that are kept are not in it."""

    device_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    places: int = 0
    groups: Mapping[str, int] = field(default_factory=dict[str, int])
    """Models too many, by exclusive group."""


NO_EXCESS: Final = Excess()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes up: one place among `models_max`, bytes by device, and its group for itself."""

    device_bytes: tuple[tuple[str, int], ...] = ()
    places: int = 1
    """0 for a model that sleeps."""

    group: str = ""
    """Exclusive group: only one of its models is there at a time. Empty: none."""

    model: str = ""
    """Which model it is of: replicas of one may be there together, whatever their group."""

    is_measured: bool = False
    """Whether its main memory has been measured."""


@dataclass(frozen=True, slots=True)
class MemoryAdmission:
    """So many models, so many bytes on each device, and one model of each exclusive group."""

    models_max: int = 0
    """Most models there may be at once; 0 is no limit."""

    budget: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes by device. A device that is not named has no limit."""

    def predicted(self, device_bytes: Mapping[str, int], terms: Terms, model: str) -> Cost:
        """Return the cost of a load of a model that is going to take so much of each device."""
        return Footprint(tuple(sorted(device_bytes.items())), group=terms.group, model=model)

    def measured(self, held: Cost, resident_bytes: int) -> Cost:
        """Put what is measured of the main memory in the place of what was predicted of it.

        The most that was measured counts: what a worker has not touched yet it may touch again.
        """
        footprint = _footprint(held)
        known = dict(footprint.device_bytes).get(RAM, 0) if footprint.is_measured else 0
        return replace(self._with_ram(footprint, max(known, resident_bytes)), is_measured=True)

    def asleep(self, held: Cost, resident_bytes: int) -> Cost:
        """Keep what the process still takes of the main memory; of the rest, and of its group, nothing."""
        footprint = _footprint(held)
        kept = tuple(item for item in footprint.device_bytes if item[0] == RAM)
        return self._with_ram(Footprint(kept, places=0), resident_bytes)

    def fits(self, held: Iterable[Cost], cost: Cost) -> bool:
        """Say whether there is a place, enough memory, and no other model of the same group."""
        there = [_footprint(one) for one in held]
        wanted = _footprint(cost)
        if self.models_max and sum(one.places for one in there) >= self.models_max:
            return False
        if wanted.group and any(one.group == wanted.group and one.model != wanted.model for one in there):
            return False
        used = _sum(there)
        return all(
            used[device] + size <= self.budget[device]
            for device, size in wanted.device_bytes
            if device in self.budget
        )

    def on_terms(self, held: Cost, terms: Terms) -> Cost:
        """Put the group of the terms in the place of the one it had; a model that sleeps is in none."""
        footprint = _footprint(held)
        return replace(footprint, group=terms.group) if footprint.places else footprint

    def excess(self, held: Iterable[Cost]) -> Excess:
        """Return how much more is held than may be."""
        there = [_footprint(one) for one in held]
        used = _sum(there)
        places = sum(one.places for one in there)
        members = Counter(group for group, _ in {(one.group, one.model) for one in there if one.group})
        return Excess(
            {device: used[device] - size for device, size in self.budget.items() if used[device] > size},
            max(0, places - self.models_max) if self.models_max else 0,
            {group: count - 1 for group, count in members.items() if count > 1},
        )

    def figures(self, held: Mapping[str, Cost], cost: Cost) -> Mapping[str, str]:
        """Return what is needed, what is free, and who holds what; bytes by device.

        Where all places are taken and there would be bytes enough, the bytes are no reason and are left out.
        """
        there = {model: _footprint(one) for model, one in held.items()}
        used = _sum(there.values())
        wanted = _footprint(cost)
        figures: dict[str, str] = {}
        limited = [device for device, _ in wanted.device_bytes if device in self.budget]
        sizes = dict(wanted.device_bytes)
        if self.models_max and sum(one.places for one in there.values()) >= self.models_max:
            figures["models_max"] = str(self.models_max)
            if all(used[device] + sizes[device] <= self.budget[device] for device in limited):
                return figures | {f"held_by.{model}": "a place" for model, one in there.items() if one.places}
        for device, size in wanted.device_bytes:
            if device in limited:
                figures[f"needed_bytes.{device}"] = str(size)
                figures[f"free_bytes.{device}"] = str(max(0, self.budget[device] - used[device]))
                figures[f"budget_bytes.{device}"] = str(self.budget[device])
        for model, one in there.items():
            sizes = ",".join(f"{device}={size}" for device, size in one.device_bytes)
            figures[f"held_by.{model}"] = sizes or "a place"
        if wanted.group:
            figures["group"] = wanted.group
        return figures

    def _with_ram(self, footprint: Footprint, resident_bytes: int) -> Footprint:
        others = tuple(item for item in footprint.device_bytes if item[0] != RAM)
        if resident_bytes <= 0 or len(others) == len(footprint.device_bytes):
            return footprint  # It cannot be measured, or main memory is not kept account of.
        return replace(footprint, device_bytes=tuple(sorted((*others, (RAM, resident_bytes)))))


def device_bytes(cost: Cost) -> Mapping[str, int]:
    """Return the bytes a cost of `MemoryAdmission` stands for, by device."""
    return dict(_footprint(cost).device_bytes)


def _footprint(cost: Cost) -> Footprint:
    if not isinstance(cost, Footprint):
        message = f"{cost!r} is no cost of this admission"
        raise TypeError(message)
    return cost


def _sum(footprints: Iterable[Footprint]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in footprints:
        total.update(dict(one.device_bytes))
    return total
