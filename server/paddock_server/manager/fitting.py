"""What can never fit: known before anything is unloaded or evicted for it.

The manager loop refuses it as well, when a load asks for room; by then a model that is loaded anew is gone.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paddock_server.manager import failure as failures
from paddock_server.manager.admission import NO_EXCESS, Admission, Cost
from paddock_server.manager.prediction import Predictor, are_slots_set
from paddock_server.manager.tools import Rules

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.failure import Failure
    from paddock_server.manager.messages import NextLoad
    from paddock_server.manager.options import Terms


@dataclass(frozen=True, slots=True)
class Fitting:
    """Says whether loads could ever fit."""

    predictor: Predictor
    rules: Rules

    async def refusal(self, entry: CatalogEntry, load: NextLoad, terms: Terms) -> Failure | None:
        """Return why a load, with all its replicas, does not fit even when nothing else is loaded."""
        keeps_slots = are_slots_set(entry, load.wish)
        prediction = await asyncio.to_thread(
            self.predictor.predict, entry, load.options, keeps_slots=keeps_slots
        )
        admission = self.rules.admission
        cost = admission.predicted(prediction.device_bytes, terms, entry.id)
        return too_large(entry.id, cost, load.options.replica_count, admission)


def too_large(model: str, cost: Cost, replica_count: int, admission: Admission) -> Failure | None:
    """Return why so many replicas of a cost do not fit beside nothing: the limit that is hit. Pure."""
    if admission.excess((cost,)) != NO_EXCESS:
        return failures.never_fits(model, admission.figures({}, cost))
    over = admission.excess((cost,) * replica_count)
    if over.places:
        return failures.too_many_replicas(model, replica_count, replica_count - over.places)
    if not over.device_bytes:
        return None
    figures: dict[str, str] = {}
    for device, size in over.device_bytes.items():
        figures[f"needed_bytes.{device}"] = str(admission.budget[device] + size)
        figures[f"budget_bytes.{device}"] = str(admission.budget[device])
    return failures.replicas_never_fit(model, replica_count, figures)
