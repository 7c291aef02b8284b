"""What is loaded at the start: what the operator had loaded, and what the configuration wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from paddock_server.manager.desired import DesiredLoads
from paddock_server.manager.hub import HubModels
from paddock_server.manager.messages import LoadAsked
from paddock_server.manager.options import NO_WISH, default_options
from paddock_server.manager.pending import PendingLoads
from paddock_server.manager.progress import nobody
from paddock_server.manager.registry import Registry
from paddock_server.manager.sources import first_that_fit, startup_loads
from paddock_server.manager.tasks import Tasks

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.manager.config import ManagerConfig
    from paddock_server.manager.options import Wish

log: FilteringBoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Startup:
    """Begins the loads that nobody calls for."""

    registry: Registry
    hub: HubModels
    desired: DesiredLoads
    pending: PendingLoads
    tasks: Tasks

    def begin(self, config: ManagerConfig) -> None:
        """Begin them, as far as there is room. Models and downloads are known by now."""
        remembered = self._remembered(config) if config.restore else {}
        if config.restore:
            self._replay(remembered, config.models_max)
        self._load_on_startup(remembered, config.models_max)

    def _replay(self, remembered: dict[str, int], models_max: int) -> None:
        """Load again what the operator had loaded; the latest loads first of all."""
        missing = [model for model in self.desired.loads if model not in remembered]
        if missing:
            _warn_of_missing(missing)
        latest_first = dict(reversed(remembered.items()))
        room = models_max or sum(latest_first.values())
        for model in reversed(first_that_fit(latest_first, room)):
            log.info("load_replayed", model=model)
            self._begin_load(model, LoadAsked(nobody(), self.desired.loads[model]))

    def _load_on_startup(self, remembered: dict[str, int], models_max: int) -> None:
        """Load what the configuration wants loaded."""
        entries = [replicas.entry for replicas in self.registry.sets.values()]
        kept, left_out = startup_loads(entries, remembered, models_max)
        if left_out:
            log.warning("load_on_startup_without_room", models=left_out, models_max=models_max)
        for model in kept:
            self._begin_load(model, LoadAsked(nobody(), NO_WISH, explicit=False))

    def _remembered(self, config: ManagerConfig) -> dict[str, int]:
        """Return what the operator had loaded, as far as it is there or arrives: replicas by model."""
        return {
            model: self._replicas_of(model, wish, config)
            for model, wish in self.desired.loads.items()
            if model in self.registry.sets or self.hub.is_unfinished(model)
        }

    def _replicas_of(self, model: str, wish: Wish, config: ManagerConfig) -> int:
        if model not in self.registry.sets:
            return wish.replica_count or 1
        entry = self.registry.sets[model].entry
        return wish.filled(default_options(config, entry.facts, entry.setup)).replica_count

    def _begin_load(self, model: str, asked: LoadAsked) -> None:
        """Load a model, downloading it first where it has to be."""
        wanted = self.hub.wanted(model)
        if wanted is not None:
            self.tasks.run(self.pending.run(wanted, asked), f"load-{model}")
        elif model in self.registry.sets:
            self.registry.sets[model].load(asked)
        else:  # Its download had ended, and it goes by another name.
            _warn_of_missing([model])


def _warn_of_missing(models: list[str]) -> None:
    advice = "They are loaded again when they are there again; `paddock unload NAME` forgets one."
    log.warning("remembered_models_missing", models=models, advice=advice)
