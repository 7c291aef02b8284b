"""The catalog: what is on disk under what the configuration files say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from paddock.errors import Reason
from paddock_server.catalog.configured.definitions import ConfiguredModels, Definition, read_bounded
from paddock_server.catalog.configured.preset import read_preset
from paddock_server.catalog.configured.problems import Place, Problem, refuse_errors
from paddock_server.catalog.configured.toml_file import read_toml
from paddock_server.catalog.cursor import displayed
from paddock_server.catalog.directory import ModelDirectories
from paddock_server.catalog.entries import CatalogEntry
from paddock_server.catalog.entries import problem as file_problem
from paddock_server.catalog.hub_names import HubRef, NoSuchFileError, choose_model, parse_hub_name
from paddock_server.catalog.merge import Merged, merge
from paddock_server.catalog.roots import CatalogError, exists
from paddock_server.catalog.setup import Origin

_CONFIGURATION = "configuration"


class Catalog:
    """The models of this server. Every method reads files, so call it from a thread."""

    def __init__(
        self,
        directories: Sequence[str | os.PathLike[str]],
        *,
        preset: Path | None = None,
        config_file: Path | None = None,
        hub_cache: Path | None = None,
    ) -> None:
        """Read the configuration files, lowest precedence first. The hub's cache need not exist.

        Raises:
            CatalogError: a directory cannot be listed.
            InvalidConfigError: a file does not validate.
        """
        self._directories = ModelDirectories(directories, hub_cache=hub_cache)
        self._has_hub = hub_cache is not None
        self._readers: tuple[tuple[Path, Callable[[str, str, Path], ConfiguredModels]], ...] = tuple(
            (path, read)
            for path, read in ((preset, read_preset), (config_file, read_toml))
            if path is not None
        )
        self._configured = self._read()
        self._served: Mapping[str, CatalogEntry] = {}
        self.problems: tuple[Problem, ...] = ()
        """What the latest scan had to leave out."""

    def scan(self, *, reread: bool = False) -> Mapping[str, CatalogEntry]:
        """All models by id, in the order of their ids.

        With `reread` the configuration files are read again. Where that or the scan fails, the catalog stays
        as it was.

        Raises:
            CatalogError: a configured directory cannot be listed, or a name that a configuration file gives
                has become that of a file as well.
            InvalidConfigError: the same while rereading, and all that is wrong with a configuration file.
        """
        configured = self._read() if reread else self._configured
        merged = self._merged(configured)
        if reread:
            refuse_errors(merged.problems)
        elif any(one.is_error for one in merged.problems):
            message = "; ".join(str(one) for one in merged.problems if one.is_error)
            raise CatalogError(_CONFIGURATION, message)
        self._configured = configured
        self.problems = merged.problems
        # What is as it was is the same object, so that the event loop need not compare thousands of entries.
        self._served = {id_: _kept(self._served.get(id_), entry) for id_, entry in merged.served.items()}
        return self._served

    @property
    def unusable_count(self) -> int:
        """How many models of the latest scan cannot be loaded for what their files are."""
        return sum(entry.problem is not None for entry in self._served.values())

    def stamps(self) -> Mapping[str, object]:
        """How the model directories look now, without a scan: other than before where a scan would find
        something new."""
        return self._directories.stamps()

    def resolve_local(self, path: str) -> CatalogEntry:
        """The model at a path relative to a model directory, whether or not a scan finds it.

        Raises:
            CatalogError: there is no model at that path, or it leaves the directories.
        """
        return self._directories.resolve_local(path)

    def _read(self) -> tuple[ConfiguredModels, ...]:
        configured = tuple(_read(path, reader) for path, reader in self._readers)
        refuse_errors([problem for one in configured for problem in one.problems])
        return configured

    def _merged(self, configured: Sequence[ConfiguredModels]) -> Merged:
        on_disk = self._directories.scan()
        cached = self._directories.scan_hub()
        known = _Known(on_disk, cached)
        files = {
            model.place: entry
            for one in configured
            for model in one.models
            if (entry := self._named_file(one.folder, model, known)) is not None
        }
        return merge({Origin.HUB_CACHE: cached, Origin.MODELS_DIR: on_disk}, configured, files)

    def _named_file(self, folder: Path, model: Definition, known: _Known) -> CatalogEntry | None:
        """The file a section names; None where it names none."""
        path, hub, projector = (model.settings.get(name) for name in ("path", "hf", "mmproj"))
        entry: CatalogEntry | None = None
        if path is not None:
            named = self._place_of(folder, str(path.value))
            entry = known.by_path.get(named) or self._directories.entry_of(named)
        elif hub is not None:
            ref = parse_hub_name(str(hub.value))
            entry = known.of_hub(ref) or (_absent(ref) if self._has_hub else _without_hub(ref))
        elif projector is not None:
            entry = known.on_disk.get(model.name)
        if entry is not None and entry.absent is None and projector is not None:
            named = self._place_of(folder, str(projector.value))
            entry = self._directories.with_projector(entry, named)
        return entry

    def _place_of(self, folder: Path, written: str) -> Path:
        """Where a path in a configuration file leads: from the file's folder, else from a model directory."""
        path = Path(written)
        if written.startswith("~/"):
            path = Path.home() / written[2:]
        places = [folder / path, *(root / path for root in self._directories.paths)]
        found = next((place for place in places if exists(place)), places[0])
        return Path(os.path.realpath(found.parent)) / found.name


class _Known:
    """What a scan has found, as sections of configuration files ask for it."""

    def __init__(self, on_disk: Mapping[str, CatalogEntry], cached: Mapping[str, CatalogEntry]) -> None:
        self.on_disk = on_disk
        self.by_path = {entry.path: entry for entry in on_disk.values() if entry.problem is None}
        self._cached = cached

    def of_hub(self, ref: HubRef) -> CatalogEntry | None:
        """The model in the hub's cache that a reference means."""
        files = {
            entry.hub.file: entry
            for entry in self._cached.values()
            if entry.hub is not None and entry.hub.repo_id == ref.repo_id and entry.hub.is_at(ref.revision)
        }
        try:
            return files[choose_model(files, ref.pattern)]
        except NoSuchFileError:
            return None


def _kept(known: CatalogEntry | None, entry: CatalogEntry) -> CatalogEntry:
    return known if known is not None and known == entry else entry


def file_problems(preset: Path | None, config_file: Path | None) -> list[Problem]:
    """What is wrong with the configuration files by themselves, without a look at any model."""
    readers = ((preset, read_preset), (config_file, read_toml))
    return [
        problem
        for path, read in readers
        if path is not None and path.is_file()
        for problem in _read(path, read).problems
    ]


def _read(path: Path, reader: Callable[[str, str, Path], ConfiguredModels]) -> ConfiguredModels:
    name = displayed(path)
    try:
        text = read_bounded(path)
    except ValueError as error:
        problem = Problem(Place(name, 0), "", str(error))
        return ConfiguredModels(Origin.PRESET, path.parent, problems=[problem])
    return reader(text, name, path.absolute().parent)


def _absent(ref: HubRef) -> CatalogEntry:
    """The entry of a model of the hub that is to be downloaded before it is loaded."""
    return CatalogEntry(
        id=ref.name,
        path=Path(ref.name),
        relative_path=ref.name,
        shard_paths=(),
        mmproj_path=None,
        size_bytes=0,
        modified_ns=0,
        facts=None,
        problem=None,
        absent=ref,
    )


def _without_hub(ref: HubRef) -> CatalogEntry:
    """The entry of a model of the hub on a server that does without the hub's cache."""
    what = "is a model of the hub, and this server does without the hub's cache (--no-hf-cache)"
    problem = file_problem(Reason.UNSUPPORTED_MODEL, ref.name, what, _CONFIGURATION)
    return replace(_absent(ref), absent=None, problem=problem)
