"""What a load will take of the memory, before it has begun: the estimate from the header, corrected by what
was measured of the same files with the same options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from paddock_server.manager.measured import LoadKey, Measurements
from paddock_server.manager.options import Options
from paddock_server.memory import RAM, LoadOptions, Placement, Shape, chosen, estimate, model_shape

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry


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

    def predict(self, entry: CatalogEntry, options: Options) -> Prediction:
        """Return what a load takes."""
        ...

    def learn(self, prediction: Prediction, resident_bytes: int) -> None:
        """Take note of the main memory that a load took; 0 when it is not known. In the event loop."""
        ...

    def measured(self, entry: CatalogEntry, options: Options) -> Mapping[str, int]:
        """Return what such a load was measured to take, by device; nothing of a device where it was not."""
        ...


class NoPrediction:
    """Predicts nothing: models are limited by their number alone."""

    def predict(self, entry: CatalogEntry, options: Options) -> Prediction:
        """Return an empty prediction."""
        del entry
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
        self, placement: Placement, budget: Mapping[str, int], measurements: Measurements, *, version: str
    ) -> None:
        """`placement` says how models are placed on this machine, `budget` which bytes there are by device.
        What `measurements` have of another `version` of the server or of other devices does not count."""
        self._placement = placement
        self._budget = budget
        self._measurements = measurements
        self._computed_by = " ".join((version, *placement.gpus, *sorted(placement.repacked_types)))

    def predict(self, entry: CatalogEntry, options: Options) -> Prediction:
        """Return what a load takes."""
        if entry.facts is None:  # Its problem has been told before.
            return Prediction({}, options)
        shape = shape_of(entry)
        # Replicas of a model are all of one size: what is left to the server is chosen for one's share.
        share = {device: size // options.replica_count for device, size in self._budget.items()}
        taken = chosen(shape, load_options(options), self._placement, share)
        sized = replace(options, context_size_tokens=taken.context_size_tokens, slot_count=taken.slot_count)
        sizes = estimate(shape, taken, self._placement).totals
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
