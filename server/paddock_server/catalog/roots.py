"""The configured model directories, and the rule that nothing outside them is ever reached."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paddock_server.catalog.cursor import displayed, quoted

LOCAL_PATH_FIELD = "source.local.path"
_DIRECTORY_FIELD = "models_dir"
MODEL_SUFFIX = ".gguf"

_LEAVES = "is a link that leaves the configured model directories"
# A file system's own folder at its root, which only the superuser may list.
_FOREIGN_FOLDERS = frozenset({"lost+found"})
_PARTIAL_FOLDER_SUFFIXES = (".part", ".partial", ".incomplete", ".tmp")


class CatalogError(Exception):
    """A path that was asked for, or configured, and cannot be used.

    Attributes:
        field: the dotted path of the field that holds it.
        message: what is wrong with it and what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(field, message)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, slots=True)
class FoundPath:
    """A file or folder in a model directory, as the file system describes it.

    `relative` is its path from the model directory, for display. `fault` says why it must not be opened;
    the figures are zero then. With `is_absent` there is nothing to open.
    """

    path: Path
    relative: str
    size_bytes: int = 0
    modified_ns: int = 0
    inode: int = 0
    fault: str | None = None
    is_absent: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The GGUF files and the folders directly in one directory, by name."""

    files: tuple[FoundPath, ...]
    folders: tuple[FoundPath, ...]


class ModelRoots:
    """The model directories. Links are followed as long as they end inside one of them."""

    def __init__(self, directories: Sequence[str | os.PathLike[str]]) -> None:
        """Fails with CatalogError where a directory cannot be listed."""
        roots: dict[Path, None] = {}
        for directory in directories:
            root = Path(os.path.realpath(directory))
            try:
                os.scandir(root).close()
            except OSError as error:
                raise unlisted(directory, error) from error
            roots[root] = None
        self.paths = tuple(roots)

    def listing(self, folder: Path, root: Path) -> Listing:
        """What lies in `folder`, itself in `root`: no hidden files, no partial downloads, no other kinds.

        Raises:
            OSError: the folder cannot be listed.
        """
        files: list[FoundPath] = []
        folders: list[FoundPath] = []
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        for name in names:
            classified = self._classify(folder / name, root)
            if classified is None:
                continue
            found, is_folder = classified
            if is_folder and name not in _FOREIGN_FOLDERS and not name.endswith(_PARTIAL_FOLDER_SUFFIXES):
                folders.append(found)
            elif not is_folder and name.casefold().endswith(MODEL_SUFFIX):
                files.append(found)
        return Listing(tuple(files), tuple(folders))

    def _classify(self, path: Path, root: Path) -> tuple[FoundPath, bool] | None:
        relative = displayed(path.relative_to(root))
        is_link = False
        try:
            is_link = path.is_symlink()
            status = path.stat()
        except FileNotFoundError:
            # What is no link was there a moment ago and has been deleted since.
            gone = FoundPath(path, relative, fault="is a link to nothing", is_absent=True)
            return (gone, False) if is_link else None
        except OSError as error:
            return FoundPath(path, relative, fault=f"cannot be opened: {error.strerror}"), False
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_link and not self._contains(path):
            return FoundPath(path, relative, fault=_LEAVES), is_folder
        if not is_folder and not stat.S_ISREG(status.st_mode):
            return FoundPath(path, relative, fault="is not a regular file"), False
        return FoundPath(path, relative, status.st_size, status.st_mtime_ns, status.st_ino), is_folder

    def resolve(self, path: str) -> tuple[Path, Path]:
        """The file or folder that `path`, relative to a model directory, names; and that directory.

        Raises:
            CatalogError: the path is not relative, leaves the directories, or names nothing or two things.
        """
        relative = _checked(path)
        candidates = [(root / relative, root) for root in self.paths]
        # Before looking whether it exists: an answer must not tell what lies outside.
        if not all(self._contains(candidate) for candidate, _ in candidates):
            raise CatalogError(LOCAL_PATH_FIELD, f"{quoted(path)} {_LEAVES}")
        existing = [(candidate, root) for candidate, root in candidates if exists(candidate)]
        if not existing:
            raise CatalogError(
                LOCAL_PATH_FIELD, f"{quoted(path)} is in none of the configured model directories"
            )
        if len(existing) > 1:
            places = " and ".join(displayed(candidate) for candidate, _ in existing)
            raise CatalogError(
                LOCAL_PATH_FIELD, f"{quoted(path)} is in more than one model directory: {places}"
            )
        return existing[0]

    def _contains(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in self.paths)


def found_file(path: Path) -> FoundPath:
    """A file that the operator has named, wherever it lies."""
    try:
        status = path.stat()
    except OSError as error:
        return FoundPath(path, displayed(path), fault=f"cannot be opened: {error.strerror}")
    return FoundPath(path, displayed(path), status.st_size, status.st_mtime_ns, status.st_ino)


def unlisted(directory: str | os.PathLike[str], error: OSError) -> CatalogError:
    """The error about a configured directory that cannot be listed."""
    return CatalogError(_DIRECTORY_FIELD, f"{displayed(directory)!r} cannot be listed: {error.strerror}")


def exists(path: Path) -> bool:
    """Whether there is something at a path that can be looked at; never an error, as Path.exists can be."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def without_control_characters(text: str) -> str:
    """Text with a replacement character for what cannot stand in an id: control characters, stray bytes."""
    return "".join(
        "\ufffd" if unicodedata.category(character) in {"Cc", "Cs"} else character for character in text
    )


def _checked(path: str) -> Path:
    if without_control_characters(path) != path:
        raise CatalogError(LOCAL_PATH_FIELD, f"{quoted(path)} has control characters in it")
    relative = Path(path)
    if not relative.parts:
        raise CatalogError(LOCAL_PATH_FIELD, "is empty; give a path relative to a model directory")
    if relative.is_absolute() or ".." in relative.parts:
        message = f"{quoted(path)} must be relative to a model directory, without '..'"
        raise CatalogError(LOCAL_PATH_FIELD, message)
    return relative
