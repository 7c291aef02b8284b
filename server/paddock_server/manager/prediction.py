"""What a load will take of the memory, before it has begun: the estimate from the header, corrected by what
was measured of the same files with the same options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from paddock_server.manager.measured import LoadKey, Measurements
from paddock_server.manager.options import Options
from paddock_server.memory import RAM, LoadOptions, Placement, Shape, chosen, estimate, model_shape

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.options import Wish


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a load will take, and the options it is to be started with."""

    device_bytes: Mapping[str, int]
    options: Options
    """A context left open is replaced by the largest that fits, sequences by as many as then do."""

    load: LoadKey | None = None
    """What is to be learned when it is loaded is of this; None where nothing is."""


class Predictor(Protocol):
    """Says what loads take. Slow: called in threads."""

    def predict(self, entry: CatalogEntry, options: Options, *, keeps_slots: bool = False) -> Prediction:
        """Return what a load of one replica takes; with `keeps_slots` none of its sequences is given up."""
        ...

    def learn(self, prediction: Prediction, resident_bytes: int) -> None:
        """Take note of the main memory that a load took; 0 when it is not known. In the event loop."""
        ...

    def measured(self, entry: CatalogEntry, options: Options) -> Mapping[str, int]:
        """Return what such a load was measured to take, by device; nothing of a device where it was not."""
        ...


class NoPrediction:
    """Predicts nothing: models are limited by their number alone."""

    def predict(self, entry: CatalogEntry, options: Options, *, keeps_slots: bool = False) -> Prediction:
        """Return an empty prediction."""
        del entry, keeps_slots
        return Prediction({}, options)

    def learn(self, prediction: Prediction, resident_bytes: int) -> None:
        """Learn nothing."""
        del prediction, resident_bytes

    def measured(self, entry: CatalogEntry, options: Options) -> Mapping[str, int]:
        """Return nothing."""
        del entry, options
        return {}


class MemoryPredictor:
    """Predicts by the rules of `paddock_server.memory`."""

    def __init__(
        self,
        placement: Placement,
        budget: Callable[[], Mapping[str, int]],
        measurements: Measurements,
        *,
        version: str,
    ) -> None:
        """`placement` says how models are placed on this machine, `budget` returns which bytes there are by
        device now. What `measurements` have of another `version` of the server or of other devices does not
        count."""
        self._placement = placement
        self._budget = budget
        self._measurements = measurements
        self._computed_by = " ".join((version, *placement.gpus, *sorted(placement.repacked_types)))

    def predict(self, entry: CatalogEntry, options: Options, *, keeps_slots: bool = False) -> Prediction:
        """Return what a load of one replica takes."""
        if entry.facts is None:  # Its problem has been told before.
            return Prediction({}, options)
        shape = shape_of(entry)
        sized = sized_options(shape, options, self._placement, self._budget(), keeps_slots=keeps_slots)
        sizes = estimate(shape, load_options(sized), self._placement).totals
        return Prediction({**sizes, **self.measured(entry, sized)}, sized, self._key(entry, sized))

    def learn(self, prediction: Prediction, resident_bytes: int) -> None:
        """Take note of the main memory that a load took; the most there was counts."""
        if prediction.load is not None:
            self._measurements.learn(prediction.load, resident_bytes)

    def measured(self, entry: CatalogEntry, options: Options) -> Mapping[str, int]:
        """Return what such a load was measured to take of the main memory: others cannot be measured."""
        known = self._measurements.of(self._key(entry, options))
        return {} if known is None else {RAM: known}

    def _key(self, entry: CatalogEntry, options: Options) -> LoadKey:
        return LoadKey(
            str(entry.path), entry.size_bytes, entry.modified_ns, load_options(options), self._computed_by
        )


def sized_options(
    shape: Shape, options: Options, placement: Placement, budget: Mapping[str, int], *, keeps_slots: bool
) -> Options:
    """Return the options that each replica of a model is loaded with: what is left to the server is chosen.

    All replicas are of one size, so that it is chosen for one's share of the budget. `budget` is in bytes by
    device; with `keeps_slots` no sequences are given up for a longer context.
    """
    share = {device: size // options.replica_count for device, size in budget.items()}
    taken = chosen(shape, load_options(options), placement, share, keeps_slots=keeps_slots)
    return replace(options, context_size_tokens=taken.context_size_tokens, slot_count=taken.slot_count)


def are_slots_set(entry: CatalogEntry, wish: Wish) -> bool:
    """Return whether somebody has said how many sequences a model decodes at once: then that counts."""
    return "slot_count" in wish.values or "slot_count" in entry.setup.options


def load_options(options: Options) -> LoadOptions:
    """Return the options of a load that decide about memory."""
    return LoadOptions(
        context_size_tokens=options.context_size_tokens,
        slot_count=options.slot_count,
        batch_size_tokens=options.batch_size_tokens,
        gpu_layer_count=options.gpu_layer_count,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
    )


def shape_of(entry: CatalogEntry) -> Shape:
    """Return the shape of a model that has no problem; looks up the size of the projector beside it."""
    if entry.facts is None:
        message = f"{entry.id!r} has no facts, and no problem either"
        raise ValueError(message)
    projector = 0
    if entry.mmproj_path is not None and entry.mmproj_path.exists():
        projector = entry.mmproj_path.stat().st_size
    return model_shape(entry.facts, projector_bytes=projector)
