"""What a scan of the model directories finds, and how two scans differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddock.errors import Reason
from paddock_server.catalog.cursor import displayed
from paddock_server.catalog.facts import ModelFacts
from paddock_server.catalog.hub_cache import HubOrigin
from paddock_server.catalog.hub_names import HubRef
from paddock_server.catalog.setup import DEFAULT_SETUP, ModelSetup


@dataclass(frozen=True, slots=True)
class CatalogProblem:
    """What keeps a model from being loaded: a sentence, and its parts by name for programs.

    `reason` is MODEL_CORRUPT or UNSUPPORTED_MODEL. `metadata` has `file`, relative to the model directory,
    `what` is wrong with it, and `where`. With `is_absent` there is no file to be wrong.
    """

    reason: Reason
    message: str
    metadata: Mapping[str, str]
    is_absent: bool = False


def problem(
    reason: Reason, file: str, what: str, where: int | str, *, is_absent: bool = False
) -> CatalogProblem:
    """A problem in its one form: `where` is an offset in the file in bytes, or what else shows it."""
    place = f"byte {where}" if isinstance(where, int) else where
    sentence = f"{file}: {what} (at {place})" if isinstance(where, int) else f"{file}: {what}"
    return CatalogProblem(reason, sentence, {"file": file, "what": what, "where": place}, is_absent)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model in a directory or in the hub's cache.

    `path` is the file to load, the first shard of a set; where a problem stands in the way, it may be a
    folder or missing. `shard_paths` are all files of the model in their order, `size_bytes` their size
    together and `modified_ns` the newest time of change among them, in nanoseconds since 1970.
    `relative_path` is `path` as a LocalSource names it, the whole path where it lies outside the model
    directories, or the path in the repository of a model of the hub, which alone has a `hub`. Exactly one of
    `facts`, `problem` and `absent` is set: `absent` is a model of the hub that a configuration file names and
    that is not in the cache yet; its entry has no files.
    `projector` are the facts of `mmproj_path`, where it could be read. `setup` is what its sources say of it.
    """

    id: str
    path: Path
    relative_path: str
    shard_paths: tuple[Path, ...]
    mmproj_path: Path | None
    size_bytes: int
    modified_ns: int
    facts: ModelFacts | None
    problem: CatalogProblem | None
    projector: ModelFacts | None = None
    setup: ModelSetup = DEFAULT_SETUP
    hub: HubOrigin | None = None
    absent: HubRef | None = None

    @property
    def is_absent(self) -> bool:
        """Whether its files are not there."""
        return self.absent is not None or (self.problem is not None and self.problem.is_absent)


def conflict(id_: str, entries: Sequence[CatalogEntry]) -> CatalogEntry:
    """The entry that stands for several with one id: none of them can be loaded, since none is the one."""
    paths = " and ".join(displayed(entry.path) for entry in entries)
    what = f"{paths} have the same id {id_!r}; rename all but one"
    return CatalogEntry(
        id=id_,
        path=entries[0].path,
        relative_path=entries[0].relative_path,
        shard_paths=(),
        mmproj_path=None,
        size_bytes=sum(entry.size_bytes for entry in entries),
        modified_ns=max(entry.modified_ns for entry in entries),
        facts=None,
        problem=problem(Reason.UNSUPPORTED_MODEL, entries[0].relative_path, what, "the file names"),
    )
