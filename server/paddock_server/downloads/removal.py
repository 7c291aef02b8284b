"""Removing files from the hub's cache: only what nothing else uses. Blocking; called in threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from paddock_server.catalog.hub_cache import blob_of, linked_paths, repo_folder


def remove_model(cache_dir: Path, repo_id: str, links: Sequence[Path]) -> int:
    """Remove links of a snapshot, and the blobs they lead to that no other link does. Returns bytes freed.

    The links go first: whatever happens in between, no model is left that is not whole.
    """
    folder = repo_folder(cache_dir, repo_id)
    blobs = {blob for link in links if (blob := blob_of(link, folder / "blobs", cache_dir)) is not None}
    for link in links:
        link.unlink(missing_ok=True)
        _remove_empty(link.parent, folder / "snapshots")
    return _remove_unused(cache_dir, folder, blobs)


def remove_partial(cache_dir: Path, repo_id: str, digests: Iterable[str]) -> int:
    """Remove what has arrived of files that no snapshot links to. Returns bytes freed."""
    folder = repo_folder(cache_dir, repo_id)
    names = set(digests)
    freed = sum(_unlink(folder / "blobs" / f"{name}.incomplete") for name in names)
    return freed + _remove_unused(cache_dir, folder, {folder / "blobs" / name for name in names})


def _remove_unused(cache_dir: Path, folder: Path, blobs: set[Path]) -> int:
    used = {
        blob
        for link in linked_paths(folder)
        if (blob := blob_of(link, folder / "blobs", cache_dir)) is not None
    }
    return sum(_unlink(blob) for blob in blobs - used)


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
