"""Removing files from the hub's cache: only what nothing else uses, and nobody fetches or is about to link.
Blocking; called in threads.

What is to be removed is written down first, in a small file in the repository's folder, so that a removal
that was cut short is finished by the next server instead of leaving gigabytes that nothing leads to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from paddock_server.catalog.hub_cache import blob_of, linked_paths, lock_path, repo_folder

NOTE_PREFIX: Final = ".paddock-removal-"
MAX_NOTE_BYTES: Final = 1024 * 1024
"""Far more than the names of any model's files; a larger note is none of ours."""


def remove_model(cache_dir: Path, repo_id: str, links: Sequence[Path]) -> int:
    """Remove links of a snapshot, and the blobs they lead to that no other link does. Returns bytes freed.

    The links go first: whatever happens in between, no model is left that is not whole.
    """
    folder = repo_folder(cache_dir, repo_id)
    blobs = {blob for link in links if (blob := blob_of(link, folder / "blobs", cache_dir)) is not None}
    with _noted(folder, links, blobs):
        return _remove(cache_dir, folder, links, blobs)


def finish_removals(cache_dir: Path) -> list[str]:
    """Finish what was being removed when a server was killed; return the folders of the repositories.

    What has been made anew since then stays.

    Raises:
        OSError: something cannot be removed.
    """
    notes = sorted(cache_dir.glob(f"models--*/{NOTE_PREFIX}*.json"))
    for note in notes:
        folder, written = note.parent, note.stat().st_mtime_ns
        links, blobs = _read(note)
        _remove(
            cache_dir,
            folder,
            [link for name in links if _is_older(link := folder / "snapshots" / name, written)],
            {blob for name in blobs if _is_older(blob := folder / "blobs" / name, written)},
        )
        note.unlink(missing_ok=True)
    return [note.parent.name for note in notes]


@contextmanager
def _noted(folder: Path, links: Sequence[Path], blobs: Iterable[Path]) -> Generator[None]:
    """Keep a note of a removal while it runs."""
    note: dict[str, list[str]] = {
        "links": [link.relative_to(folder / "snapshots").as_posix() for link in links],
        "blobs": [blob.name for blob in blobs],
    }
    text = json.dumps(note)
    path = folder / f"{NOTE_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with suppress(OSError):  # On a full disk it is removed all the same: that makes room.
        path.write_text(text)
    yield
    path.unlink(missing_ok=True)


def _read(note: Path) -> tuple[list[Path], list[Path]]:
    """Return the links and blobs of a note; of one that was not written to its end, nothing."""
    with note.open("rb") as file:
        raw = file.read(MAX_NOTE_BYTES)
    try:
        document: dict[str, Any] = json.loads(raw)
        links = [Path(str(name)) for name in document["links"]]
        blobs = [Path(str(name)) for name in document["blobs"]]
    except (ValueError, TypeError, KeyError):
        return [], []
    inside = [link for link in links if not link.is_absolute() and ".." not in link.parts]
    return inside, [blob for blob in blobs if len(blob.parts) == 1 and ".." not in blob.parts]


def _is_older(path: Path, time_ns: int) -> bool:
    try:
        return path.lstat().st_mtime_ns <= time_ns
    except OSError:
        return False


def _remove(cache_dir: Path, folder: Path, links: Iterable[Path], blobs: set[Path]) -> int:
    for link in links:
        link.unlink(missing_ok=True)
        _remove_empty(link.parent, folder / "snapshots")
    return _remove_unused(cache_dir, folder, blobs)


def remove_partial(cache_dir: Path, repo_id: str, digests: Iterable[str]) -> int:
    """Remove what has arrived of files that no snapshot links to. Returns bytes freed."""
    folder = repo_folder(cache_dir, repo_id)
    blobs = {folder / "blobs" / digest for digest in digests}
    return _remove_unused(cache_dir, folder, blobs, partial_too=True)


def _remove_unused(cache_dir: Path, folder: Path, blobs: set[Path], *, partial_too: bool = False) -> int:
    with ExitStack() as locks:
        # A fetcher, of this server or another, holds the locks of all its files until it has linked them.
        free = {blob for blob in blobs if locks.enter_context(_locked(cache_dir, folder, blob.name))}
        used = {
            blob
            for link in linked_paths(folder)
            if (blob := blob_of(link, folder / "blobs", cache_dir)) is not None
        }
        partial = {blob.with_name(f"{blob.name}.incomplete") for blob in free} if partial_too else set[Path]()
        return sum(_unlink(path) for path in (free - used) | partial)


@contextmanager
def _locked(cache_dir: Path, folder: Path, digest: str) -> Generator[bool]:
    """Hold the lock of a blob; False when somebody else does."""
    path = lock_path(cache_dir, folder, digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield True  # There is no lock and none can be made: on a full disk it is removed all the same.
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> int:
    try:
        size = path.lstat().st_size if path.is_symlink() else path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove folders that have become empty, up to the snapshot's own."""
    while folder != top and folder.is_relative_to(top) and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
