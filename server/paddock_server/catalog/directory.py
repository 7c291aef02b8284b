"""The models on this machine: which there are, what they are, and what is wrong with them.

A file directly in a model directory is called by its name without the suffix, a model in a folder by the path
of the folder, and of several models in one folder each by the path of the folder and its own name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from paddock.errors import Reason
from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError, displayed, quoted
from paddock_server.catalog.entries import CatalogEntry, CatalogProblem, conflict, problem
from paddock_server.catalog.facts import ModelFacts, merged_facts, model_facts
from paddock_server.catalog.gguf import read_header
from paddock_server.catalog.hub_cache import HubOrigin, Snapshot, snapshots
from paddock_server.catalog.hub_names import choose_projector, hub_id, is_model_file, quant_tag
from paddock_server.catalog.roots import (
    LOCAL_PATH_FIELD,
    MODEL_SUFFIX,
    CatalogError,
    FoundPath,
    ModelRoots,
    exists,
    found_file,
    unlisted,
    without_control_characters,
)
from paddock_server.catalog.shards import FileGroup, grouped, split_fault

_NAMED_FILES = 5
_MAX_DEPTH = 4
"""Folders below a model directory that are looked into: `publisher/repository/revision/quantisation`."""
_FILE_SYSTEM = "the file system"
_FILE_NAMES = "the file names"


class _Fault(NamedTuple):
    """Why a file has no facts."""

    reason: Reason
    what: str
    where: int | str
    is_absent: bool = False


class _Known(NamedTuple):
    """What was read from a file, and how the file looked then."""

    stamp: tuple[int, int, int]
    result: ModelFacts | _Fault


class _Role(Enum):
    MODEL = auto()
    PROJECTOR = auto()
    OTHER = auto()


class ModelDirectories:
    """The model directories and the hub's cache. Every method reads files, so call it from a thread; threads
    take turns."""

    def __init__(
        self, directories: Sequence[str | os.PathLike[str]], *, hub_cache: Path | None = None
    ) -> None:
        """`hub_cache` is the hub's cache, which need not exist. Fails with CatalogError where a directory
        cannot be listed."""
        self._roots = ModelRoots(directories)
        self._hub_cache = hub_cache
        self._known: dict[Path, _Known] = {}
        self._folders: list[str] = []
        self._watched: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The directories, links resolved."""
        return self._roots.paths

    def scan(self) -> dict[str, CatalogEntry]:
        """All models by id, in the order of their ids.

        A file is read again only when its size, time of change or inode is another than the last time.

        Raises:
            CatalogError: a configured directory cannot be listed.
        """
        found: dict[str, list[CatalogEntry]] = {}
        with self._lock:
            self._known = {path: known for path, known in self._known.items() if exists(path)}
            self._folders = []
            for root in self._roots.paths:
                for entry in self._root_entries(root):
                    found.setdefault(entry.id, []).append(entry)
            broken = (str(path) for path, known in self._known.items() if isinstance(known.result, _Fault))
            self._watched = (*self._folders, *broken)
        return {
            id_: entries[0] if len(entries) == 1 else conflict(id_, entries)
            for id_, entries in sorted(found.items())
        }

    def stamps(self) -> dict[str, tuple[int, int, int] | None]:
        """How what a scan goes by looks now: where nothing of it changes, a scan would find nothing new.

        It is the folders, whose times of change tell of files that come and go, and the files that were no
        good: somebody may still be writing them. A good file that is written over is not looked at.
        """
        return {path: _stamp(path) for path in self._watched}

    def scan_hub(self) -> dict[str, CatalogEntry]:
        """All models in the hub's cache by id."""
        if self._hub_cache is None:
            return {}
        with self._lock:
            return {
                entry.id: entry
                for snapshot in snapshots(self._hub_cache)
                for entry in self._snapshot_entries(snapshot)
            }

    def resolve_local(self, path: str) -> CatalogEntry:
        """The model at a path relative to a model directory: a file, any shard of a set, or a folder.

        The path may lie deeper than a scan looks. The entry's id is that of a scan: of a file its name, of a
        folder its path.

        Raises:
            CatalogError: there is no model at that path, or it leaves the directories.
        """
        resolved, root = self._roots.resolve(path)
        try:
            with self._lock:
                entry = self._entry_at(resolved, root)
        except OSError as error:
            raise CatalogError(
                LOCAL_PATH_FIELD, f"{quoted(path)} cannot be listed: {error.strerror}"
            ) from error
        if entry is None:
            message = f"{quoted(path)} is not a model; give a {MODEL_SUFFIX} file or a folder with one in it"
            raise CatalogError(LOCAL_PATH_FIELD, message)
        return entry

    def entry_of(self, path: Path) -> CatalogEntry:
        """The model in a file, a set of shards or a folder that the operator has named.

        It may lie outside the model directories; links of its folder may then not leave the folder. What
        cannot be found is an entry that says so.
        """
        folder = Path(os.path.realpath(path.parent))
        named = folder / path.name
        inside = next((root for root in self._roots.paths if named.is_relative_to(root)), None)
        try:
            with self._lock:
                if inside is not None:
                    entry = self._entry_at(named, inside)
                else:
                    # A model may be a link, as in the hub's cache, to a place that naming it allows.
                    target = Path(os.path.realpath(named))
                    beside = ModelRoots([folder, target if target.is_dir() else target.parent])
                    entry = self._entry_at(named, folder, beside)
                    entry = entry and replace(entry, relative_path=displayed(entry.path))
        except (OSError, CatalogError):
            entry = None
        if entry is not None:
            return entry
        if not os.path.lexists(named):
            return _broken_folder(
                FoundPath(named, displayed(path), is_absent=True), "does not exist", _FILE_SYSTEM
            )
        return _broken_folder(
            FoundPath(named, displayed(path)), "cannot be read, or holds no model", _FILE_SYSTEM
        )

    def with_projector(self, entry: CatalogEntry, path: Path) -> CatalogEntry:
        """An entry with a projector that the operator has named."""
        with self._lock:
            facts = self._projector_facts(found_file(path))
        return replace(entry, mmproj_path=path, projector=facts)

    def _root_entries(self, root: Path) -> Iterator[CatalogEntry]:
        self._folders.append(str(root))
        try:
            listing = self._roots.listing(root, root)
        except OSError as error:
            raise unlisted(root, error) from error
        for group in grouped(listing.files):
            if self._role(group.first) is _Role.MODEL:
                yield self._group_entry(group.stem, group, None)
        for folder in listing.folders:
            yield from self._tree_entries(folder, root, ())

    def _snapshot_entries(self, snapshot: Snapshot) -> Iterator[CatalogEntry]:
        """Yield the models of a snapshot. Of several with one quantization, the first by path is named after
        it and the others after their files."""
        found = {file.relative: file for files in snapshot.folders.values() for file in files}
        tags: set[str] = set()
        for files in snapshot.folders.values():
            for group in grouped(files):
                file = group.first.relative
                # A set that is not whole is one that somebody is downloading, or has stopped to.
                if group.set_fault() is not None or not is_model_file(file):
                    continue
                if self._role(group.first) is not _Role.MODEL:
                    continue
                tag = quant_tag(file)
                suffix = tag if tag and tag not in tags else file
                tags.add(tag)
                origin = HubOrigin(snapshot.repo_id, snapshot.commit, snapshot.revisions, file)
                projector = choose_projector(found, file)
                entry = self._group_entry(group.stem, group, None if projector is None else found[projector])
                id_ = hub_id(snapshot.repo_id, origin.revision, without_control_characters(suffix))
                yield replace(entry, id=id_, hub=origin)

    def _tree_entries(self, folder: FoundPath, root: Path, above: tuple[int, ...]) -> Iterator[CatalogEntry]:
        """The models in a folder and in those below it. `above` are the inodes of the folders around it."""
        # A link may lead back up, and a model directory may lie in another one.
        if folder.inode in above or folder.path in self._roots.paths:
            return
        if folder.fault is not None:
            yield _broken_folder(folder, folder.fault, _FILE_SYSTEM)
            return
        self._folders.append(str(folder.path))
        try:
            listing = self._roots.listing(folder.path, root)
        except OSError as error:
            yield _broken_folder(folder, f"cannot be listed: {error.strerror}", _FILE_SYSTEM)
            return
        models, projector = self._sorted_out(listing.files)
        place = str(folder.path.relative_to(root))
        for group in models:
            name = place if len(models) == 1 else f"{place}/{group.stem}"
            yield self._group_entry(name, group, projector)
        if len(above) + 1 < _MAX_DEPTH:
            for inner in listing.folders:
                yield from self._tree_entries(inner, root, (*above, folder.inode))

    def _sorted_out(self, files: Sequence[FoundPath]) -> tuple[list[FileGroup], FoundPath | None]:
        """The models among the files of a folder, and the projector that goes with them."""
        roles = [(self._role(group.first), group) for group in grouped(files)]
        models = [group for role, group in roles if role is _Role.MODEL]
        projectors = [group.first for role, group in roles if role is _Role.PROJECTOR]
        return models, next((file for file in projectors if file.fault is None), None)

    def _entry_at(self, path: Path, root: Path, roots: ModelRoots | None = None) -> CatalogEntry | None:
        roots = roots or self._roots
        if path.is_dir():
            return self._folder_entry(FoundPath(path, displayed(path.relative_to(root))), root, roots)
        for group in grouped(roots.listing(path.parent, root).files):
            if any(file.path == path for file in group.files):
                is_model = self._role(group.first) is _Role.MODEL
                return self._group_entry(group.stem, group, None) if is_model else None
        return None

    def _folder_entry(self, folder: FoundPath, root: Path, roots: ModelRoots) -> CatalogEntry | None:
        models, projector = self._sorted_out(roots.listing(folder.path, root).files)
        if not models:
            return None
        if len(models) > 1:
            names = ", ".join(displayed(group.first.path.name) for group in models[:_NAMED_FILES])
            what = f"holds {len(models)} models, among them {names}; name one of the files"
            return _broken_folder(folder, what, _FILE_NAMES)
        return self._group_entry(str(folder.path.relative_to(root)), models[0], projector)

    def _group_entry(self, name: str, group: FileGroup, projector: FoundPath | None) -> CatalogEntry:
        facts = self._group_facts(group)
        id_, name_problem = _checked_id(name, group.relative_load_path)
        for file in group.files:
            name_problem = name_problem or _checked_id(file.path.name, file.relative)[1]
        return CatalogEntry(
            id=id_,
            path=group.load_path,
            relative_path=group.relative_load_path,
            shard_paths=tuple(file.path for file in group.files),
            mmproj_path=projector.path if projector is not None else None,
            projector=self._projector_facts(projector),
            size_bytes=sum(file.size_bytes for file in group.files),
            modified_ns=max(file.modified_ns for file in group.files),
            facts=facts if isinstance(facts, ModelFacts) and name_problem is None else None,
            problem=name_problem or (facts if isinstance(facts, CatalogProblem) else None),
        )

    def _projector_facts(self, projector: FoundPath | None) -> ModelFacts | None:
        facts = self._read(projector) if projector is not None else None
        return facts if isinstance(facts, ModelFacts) else None

    def _group_facts(self, group: FileGroup) -> ModelFacts | CatalogProblem:
        set_fault = group.set_fault()
        if set_fault is not None:
            return problem(Reason.MODEL_CORRUPT, group.first.relative, set_fault, _FILE_NAMES)
        shards: list[ModelFacts] = []
        for file in group.files:
            result = self._read(file)
            if isinstance(result, _Fault):
                what, where, is_absent = result.what, result.where, result.is_absent
                return problem(result.reason, file.relative, what, where, is_absent=is_absent)
            shards.append(result)
        fault = split_fault(group, shards)
        if fault is not None:
            return problem(Reason.MODEL_CORRUPT, fault[0].relative, fault[1], "key 'split.count'")
        facts = merged_facts(shards)
        if not facts.architecture:
            what = "does not name the architecture of its model"
            where = "key 'general.architecture'"
            return problem(Reason.MODEL_CORRUPT, group.first.relative, what, where)
        if not facts.tensor_count:
            what = "has no tensors, so that it is a vocabulary at most and no model"
            return problem(Reason.UNSUPPORTED_MODEL, group.first.relative, what, "the header")
        return facts

    def _role(self, file: FoundPath) -> _Role:
        if file.path.name.lower().startswith("mmproj"):
            return _Role.PROJECTOR
        facts = self._read(file)
        if isinstance(facts, _Fault):
            return _Role.MODEL
        if facts.general_type == "mmproj" or facts.architecture == "clip":
            return _Role.PROJECTOR
        return _Role.OTHER if facts.general_type in {"adapter", "imatrix"} else _Role.MODEL

    def _read(self, file: FoundPath) -> ModelFacts | _Fault:
        if file.fault is not None:
            reason = Reason.MODEL_CORRUPT if file.is_absent else Reason.UNSUPPORTED_MODEL
            return _Fault(reason, file.fault, _FILE_SYSTEM, file.is_absent)
        stamp = (file.inode, file.size_bytes, file.modified_ns)
        known = self._known.get(file.path)
        if known is not None and known.stamp == stamp:
            return known.result
        try:
            result = _read_facts(file.path)
        except OSError as error:
            # Not kept: permissions change without the file looking changed.
            return _Fault(Reason.UNSUPPORTED_MODEL, f"cannot be read: {error.strerror}", _FILE_SYSTEM)
        self._known[file.path] = _Known(stamp, result)
        return result


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116  # thousands of them every few seconds: a Path costs as much again
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_facts(path: Path) -> ModelFacts | _Fault:
    try:
        return model_facts(read_header(path))
    except UnsupportedGgufError as error:
        return _Fault(Reason.UNSUPPORTED_MODEL, error.what, error.offset)
    except GgufError as error:
        return _Fault(Reason.MODEL_CORRUPT, error.what, error.offset)


def _checked_id(name: str, relative_path: str) -> tuple[str, CatalogProblem | None]:
    id_ = without_control_characters(name)
    if id_ == name:
        return id_, None
    what = "has a name that is not UTF-8 or has control characters in it; rename it"
    return id_, problem(Reason.UNSUPPORTED_MODEL, relative_path, what, _FILE_NAMES)


def _broken_folder(folder: FoundPath, what: str, where: str) -> CatalogEntry:
    _, name_problem = _checked_id(folder.path.name, folder.relative)
    reason = Reason.MODEL_CORRUPT if folder.is_absent else Reason.UNSUPPORTED_MODEL
    return CatalogEntry(
        id=without_control_characters(folder.relative),
        path=folder.path,
        relative_path=folder.relative,
        shard_paths=(),
        mmproj_path=None,
        size_bytes=0,
        modified_ns=folder.modified_ns,
        facts=None,
        problem=name_problem or problem(reason, folder.relative, what, where, is_absent=folder.is_absent),
    )
