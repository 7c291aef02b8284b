"""Whether one more model fits beside those that are there. Pure.

A cost is opaque to everyone but the admission that made it. It is held in three phases: reserved (predicted,
from the moment a load is admitted), committed (measured, once it is loaded), releasing (until its worker is
reaped).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.options import Options

Cost: TypeAlias = Hashable


class Admission(Protocol):
    """A budget. Does not remember what is held: it is told every time."""

    def predicted(self, entry: CatalogEntry, options: Options) -> Cost:
        """Return what loading a model will take."""
        ...

    def measured(self, predicted: Cost, resident_bytes: int) -> Cost:
        """Return what a loaded model takes, now that it can be measured."""
        ...

    def fits(self, held: Iterable[Cost], cost: Cost) -> bool:
        """Say whether a cost fits beside those that are held, in whatever phase."""
        ...

    def figures(self, cost: Cost) -> Mapping[str, str]:
        """Return the numbers to tell somebody whose model would not fit beside nothing at all."""
        ...


class CountAdmission:
    """At most so many models, whatever their size."""

    def __init__(self, models_max: int) -> None:
        """Take the most models there may be at once; 0 is no limit."""
        self._models_max = models_max

    def predicted(self, entry: CatalogEntry, options: Options) -> Cost:
        """Return the cost every model has."""
        del entry, options
        return 1

    def measured(self, predicted: Cost, resident_bytes: int) -> Cost:
        """Return the cost every model has."""
        del resident_bytes
        return predicted

    def fits(self, held: Iterable[Cost], cost: Cost) -> bool:
        """Say whether there is a place for one more."""
        del cost
        return not self._models_max or sum(1 for _ in held) < self._models_max

    def figures(self, cost: Cost) -> Mapping[str, str]:
        """Return the limit."""
        del cost
        return {"models_max": str(self._models_max)}
