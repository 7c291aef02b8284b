"""What the manager takes from the catalog, and what it says of the configuration files. Pure."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from paddock.errors import PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import InvalidConfigError
from paddock_server.manager.failure import not_downloaded, problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paddock_server.catalog import CatalogEntry, CatalogError, Problem
    from paddock_server.manager.failure import Failure


class ModelCatalog(Protocol):
    """What the manager needs of `catalog.Catalog`. Blocking; called in threads."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What the latest scan had to leave out of the configuration files."""
        ...

    def scan(self, *, reread: bool = False) -> Mapping[str, CatalogEntry]:
        """Return all models by id, with `reread` after reading the configuration files again.

        Raises `CatalogError`, and while rereading `InvalidConfigError`.
        """
        ...

    def resolve_local(self, path: str) -> CatalogEntry:
        """Return the model at a path relative to a model directory. Raises `CatalogError`."""
        ...


def entry_problem(entry: CatalogEntry) -> Failure | None:
    """Return why a model's files cannot be loaded."""
    if entry.absent is not None:
        return not_downloaded(entry.id)
    return problem(entry.problem) if entry.problem is not None else None


def startup_loads(
    entries: Sequence[CatalogEntry], remembered: Mapping[str, int], models_max: int
) -> tuple[list[str], list[str]]:
    """Return which models to load at the start beside the remembered ones, and which have no room.

    The highest priorities come first. `remembered` has the number of replicas by model. `models_max` is the
    most workers there are at once, 0 for no limit.
    """
    wanted = [entry for entry in entries if entry.setup.load_on_startup and entry.id not in remembered]
    wanted.sort(key=lambda entry: -entry.setup.priority)
    counts = {entry.id: int(entry.setup.options.get("replica_count", 1)) for entry in wanted}
    room = max(0, models_max - sum(remembered.values())) if models_max else sum(counts.values())
    kept = first_that_fit(counts, room)
    return kept, list(counts)[len(kept) :]


def first_that_fit(counts: Mapping[str, int], room: int) -> list[str]:
    """Return the first models, in their order, whose replicas there is room for together."""
    totals = accumulate(counts.values())
    return [model for model, total in zip(counts, totals, strict=True) if total <= room]


def other_file(old: CatalogEntry, new: CatalogEntry) -> bool:
    """Return whether a worker that has loaded the one has read something else than the other."""
    return _files(old) != _files(new)


def _files(entry: CatalogEntry) -> tuple[object, ...]:
    return entry.path, entry.shard_paths, entry.mmproj_path, entry.size_bytes, entry.modified_ns


def config_problem(found: Problem) -> pb.ConfigProblem:
    """Return the message about a problem."""
    place = found.place
    return pb.ConfigProblem(file=place.file, line=place.line, key=found.key, message=found.message)


def unfit_problem(entry: CatalogEntry, failure: Failure) -> pb.ConfigProblem:
    """Return the message about a loaded model whose new files or options can never fit."""
    message = f"{failure.message} The model stays loaded as it is."
    return pb.ConfigProblem(file=entry.relative_path, key=f"models.{entry.id}", message=message)


def reload_error(error: InvalidConfigError | CatalogError) -> PaddockError:
    """Return the error of a reload that changed nothing."""
    if not isinstance(error, InvalidConfigError):
        return make_error(
            Reason.INVALID_CONFIG, f"Nothing has changed: {error}", metadata={"field": error.field}
        )
    errors = [one for one in error.problems if one.is_error]
    first = errors[0].place
    more = f"; and {len(errors) - MAX_NAMED} more" if len(errors) > MAX_NAMED else ""
    return make_error(
        Reason.INVALID_CONFIG,
        f"Nothing has changed: {'; '.join(str(one) for one in errors[:MAX_NAMED])}{more}",
        metadata={"file": first.file, "line": str(first.line), "problem_count": str(len(errors))},
    )


MAX_NAMED = 10
"""Problems that the message of an error names; `paddock check-config` names all."""
