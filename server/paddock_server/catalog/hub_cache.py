"""The hub's cache on this machine, as huggingface_hub lays it out:

    models--ORG--REPO/blobs/ETAG                        the files, by hash
    models--ORG--REPO/refs/main                         the commit a branch or tag was at
    models--ORG--REPO/snapshots/COMMIT/path/file.gguf   links to the blobs, one tree per commit
    .locks/models--ORG--REPO/ETAG.lock                  held by whoever fetches a file, or removes it

Only what a snapshot links to is a model: huggingface_hub, llama-server and our own downloads link a file when
it is complete. Nothing is followed out of the cache.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from paddock_server.catalog.hub_names import MAIN, HubNameError, HubRef, hub_ref, is_commit
from paddock_server.catalog.roots import MODEL_SUFFIX, FoundPath

MAX_ENTRIES: Final = 100_000
"""Names read in one folder, and in one tree. A cache has a few; a hostile one cannot hold up a scan."""

MAX_DEPTH: Final = 8
_COMMIT_CHARACTERS: Final = 40
_REPO_PREFIX: Final = "models--"


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """Where a cached model came from. `revisions` are the names that are at `commit` now; `file` is the path
    in the repository of the file to load."""

    repo_id: str
    commit: str
    revisions: tuple[str, ...]
    file: str

    @property
    def revision(self) -> str:
        """The revision in the model's id: `main` where it is there, else another name, else the commit."""
        if MAIN in self.revisions:
            return MAIN
        return self.revisions[0] if self.revisions else self.commit

    def is_at(self, revision: str) -> bool:
        """Whether a branch, tag or commit means this one."""
        return revision == self.commit or revision in self.revisions


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The GGUF files of one commit in the cache, by folder."""

    repo_id: str
    commit: str
    revisions: tuple[str, ...]
    root: Path
    folders: Mapping[Path, tuple[FoundPath, ...]]


def repo_folder(cache_dir: Path, repo_id: str) -> Path:
    """Return the folder of a repository in the cache."""
    return cache_dir / (_REPO_PREFIX + repo_id.replace("/", "--"))


def lock_path(cache_dir: Path, folder: Path, digest: str) -> Path:
    """Return the file whose lock stands for a blob of a repository's folder."""
    return cache_dir / ".locks" / folder.name / f"{digest}.lock"


def snapshots(cache_dir: Path) -> Iterator[Snapshot]:
    """Yield every snapshot that holds a GGUF file, by repository and commit. An absent cache has none.

    What cannot be read is left out: other programs write here at any time.
    """
    for name in _names(cache_dir):
        repo = _repo_of(name)
        if repo is None:
            continue
        folder = cache_dir / name
        refs = _refs(folder / "refs")
        for commit in _names(folder / "snapshots"):
            root = folder / "snapshots" / commit
            if not is_commit(commit) or root.is_symlink():
                continue
            folders = _linked_files(root, folder / "blobs", cache_dir)
            if folders:
                revisions = tuple(sorted(ref for ref, at in refs.items() if at == commit))
                yield Snapshot(repo.repo_id, commit, revisions, root, folders)


def linked_paths(folder: Path) -> Iterator[Path]:
    """Yield every link in the snapshots of a repository's folder."""
    return (path for path in _tree(folder / "snapshots") if path.is_symlink())


def _repo_of(folder_name: str) -> HubRef | None:
    if not folder_name.startswith(_REPO_PREFIX):
        return None
    try:
        return hub_ref(folder_name.removeprefix(_REPO_PREFIX).replace("--", "/"), "", "")
    except HubNameError:
        return None


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MAX_ENTRIES))
    except OSError:
        return []


def _refs(folder: Path) -> dict[str, str]:
    """Return the commits that branches and tags were at, by name."""
    refs: dict[str, str] = {}
    for path in _tree(folder):
        try:
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as file:
                commit = file.read(_COMMIT_CHARACTERS + 1).decode("ascii", "replace").strip()
        except OSError:
            continue
        if is_commit(commit):
            refs[path.relative_to(folder).as_posix()] = commit
    return refs


def _tree(folder: Path) -> Iterator[Path]:
    """Yield what is no folder under a folder, without following links."""
    left = MAX_ENTRIES
    todo = deque([(folder, 0)])
    while todo and left > 0:
        here, depth = todo.popleft()
        for name in _names(here)[:left]:
            left -= 1
            path = here / name
            if path.is_dir() and not path.is_symlink():
                if depth < MAX_DEPTH:
                    todo.append((path, depth + 1))
            else:
                yield path


def _linked_files(root: Path, blobs: Path, cache_dir: Path) -> dict[Path, tuple[FoundPath, ...]]:
    folders: dict[Path, list[FoundPath]] = {}
    for path in _tree(root):
        if not path.name.endswith(MODEL_SUFFIX):
            continue
        blob = blob_of(path, blobs, cache_dir)
        if blob is None:
            continue
        try:
            status = blob.stat()
        except OSError:
            continue
        relative = path.relative_to(root).as_posix()
        found = FoundPath(path, relative, status.st_size, status.st_mtime_ns, status.st_ino)
        folders.setdefault(path.parent, []).append(found)
    return {folder: tuple(files) for folder, files in folders.items()}


def blob_of(link: Path, blobs: Path, cache_dir: Path) -> Path | None:
    """Return the file in `blobs` that a link of a snapshot leads to; None unless it is a regular file there.

    A blob may itself be a link to a store that repositories share, as long as it is in the cache too.
    """
    try:
        target = Path(os.path.normpath(link.parent / link.readlink()))
        real = Path(os.path.realpath(target))
        if target.parent != blobs or not real.is_relative_to(Path(os.path.realpath(cache_dir))):
            return None
        return target if stat.S_ISREG(real.stat().st_mode) else None
    except OSError:
        return None
