"""Fetching files into the hub's cache: resumed, verified, and only then under their names.

A file grows as `blobs/DIGEST.incomplete`. It becomes `blobs/DIGEST` when its hash is right, and a snapshot
links to it when the whole model is there. So a process killed at any moment leaves nothing that looks whole
and is not, and the next one goes on from the bytes there are. Locks are flock's, on the files that
huggingface_hub locks too: they end with the process that holds them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paddock.errors import Reason, make_error
from paddock.sizes import size_text
from paddock_server.catalog.hub_cache import lock_path, repo_folder
from paddock_server.downloads.hub import RepoFile, TransientError

if TYPE_CHECKING:
    from paddock_server.catalog import HubRef
    from paddock_server.downloads.hub import Hub

CHUNK_BYTES: Final = 1024 * 1024
"""Bytes hashed at a time."""

LOCK_POLL_SECONDS: Final = 0.2
_SHA256_CHARACTERS: Final = 64
_RANGE_START: Final = re.compile(r"bytes (\d+)-", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one repository lie in the cache."""

    cache_dir: Path
    repo_id: str

    @property
    def folder(self) -> Path:
        """The repository's folder."""
        return repo_folder(self.cache_dir, self.repo_id)

    def blob(self, file: RepoFile) -> Path:
        """The file once it is whole."""
        return self.folder / "blobs" / file.digest

    def partial(self, file: RepoFile) -> Path:
        """The file while it grows."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def present_bytes(self, file: RepoFile) -> int:
        """Bytes of the file on disk, whole or not."""
        if self.is_whole(file):
            return file.size_bytes
        return max(0, min(_size(self.partial(file)), file.size_bytes))

    def is_whole(self, file: RepoFile) -> bool:
        """Whether the file is there under its name."""
        return _size(self.blob(file)) == file.size_bytes

    def link(self, file: RepoFile, commit: str) -> None:
        """Have the snapshot of a commit show a file that is whole."""
        link = self.folder / "snapshots" / commit / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # It leads to another file, or to none.
        with suppress(FileExistsError):  # Another fetcher has linked the same file to the same commit.
            link.symlink_to(os.path.relpath(self.blob(file), link.parent))

    def is_linked(self, file: RepoFile, commit: str) -> bool:
        """Whether the snapshot of a commit shows the file."""
        link = self.folder / "snapshots" / commit / file.path
        return self.is_whole(file) and os.path.realpath(link) == os.path.realpath(self.blob(file))

    def set_ref(self, revision: str, commit: str) -> None:
        """Note the commit that a branch or tag is at."""
        path = self.folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written over what was there, in one go and of the same length: a process that is killed leaves the
        # old commit or the new one, and no file beside it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, commit.encode())
            os.ftruncate(descriptor, len(commit))
        finally:
            os.close(descriptor)

    @contextmanager
    def locked(self, file: RepoFile, waiting: Callable[[], None]) -> Generator[None]:
        """Hold the file's lock; `waiting` is called again and again until it is ours."""
        path = lock_path(self.cache_dir, self.folder, file.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting()
                    time.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)


def fetch_rest(
    hub: Hub, ref: HubRef, commit: str, file: RepoFile, place: Place, arrived: Callable[[int], None]
) -> None:
    """Fetch what is missing of a file, in one attempt. `arrived` is told every gain, and a loss as a negative
    number.

    Raises:
        TransientError: the connection broke; what has arrived stays.
        PaddockError: see `Hub.open`; MODEL_CORRUPT when more arrives than was announced; DISK_FULL.
    """
    partial = place.partial(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(place.cache_dir), partial.open("ab") as output:
        offset = output.tell()
        if offset > file.size_bytes:
            output.truncate(0)
            offset = 0
        if offset == file.size_bytes:
            return
        with hub.open(ref, commit, file.path, offset) as response:
            if offset and response.status_code != 206:  # the server does not do ranges: all over again
                output.truncate(0)
                arrived(-offset)
                offset = 0
            elif offset and _range_start(response.headers.get("Content-Range", "")) != offset:
                message = f"The hub sent another part of {file.path!r} than it was asked for."
                raise TransientError(message)
            for chunk in response.iter_raw():
                offset += len(chunk)
                if offset > file.size_bytes:
                    raise corrupt(
                        file, f"is longer than the {file.size_bytes} bytes the hub announced", place
                    )
                output.write(chunk)
                output.flush()  # a process that is killed keeps what is in the file
                arrived(len(chunk))
        os.fsync(output.fileno())
    if offset < file.size_bytes:
        arrived_text = f"{size_text(offset)} of {size_text(file.size_bytes)}"
        message = f"The connection ended after {arrived_text} of {file.path!r}."
        raise TransientError(message)


def verify(file: RepoFile, place: Place, checked: Callable[[int], None]) -> None:
    """Give a fetched file its name if its hash is right, and remove it if it is not.

    Raises:
        PaddockError: MODEL_CORRUPT.
    """
    partial = place.partial(file)
    if len(file.digest) == _SHA256_CHARACTERS:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % file.size_bytes)  # git's own hash of a file
    with partial.open("rb") as data:
        while chunk := data.read(CHUNK_BYTES):
            digest.update(chunk)
            checked(len(chunk))
    if digest.hexdigest() != file.digest:
        raise corrupt(file, f"has the hash {digest.hexdigest()} and should have {file.digest}", place)
    partial.replace(place.blob(file))


def corrupt(file: RepoFile, what: str, place: Place) -> Exception:
    """Remove a file that is not what the hub announced, and return the error about it."""
    place.partial(file).unlink(missing_ok=True)
    return make_error(
        Reason.MODEL_CORRUPT,
        f"{file.path}: what arrived {what}. It has been removed; download it again.",
        metadata={"file": file.path, "what": what, "where": "the download"},
    )


@contextmanager
def disk_errors(folder: Path) -> Generator[None]:
    """Turn a full disk into DISK_FULL."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise disk_full(folder, None) from error


def disk_full(folder: Path, needed_bytes: int | None) -> Exception:
    """Return the error about a disk without room; `needed_bytes` is what was still to come, where known."""
    free = free_bytes(folder)
    needed = f"{size_text(needed_bytes)} are needed and " if needed_bytes else ""
    metadata = {"path": str(folder), "free_bytes": str(free)}
    if needed_bytes:
        metadata["needed_bytes"] = str(needed_bytes)
    return make_error(
        Reason.DISK_FULL,
        f"The disk of the hub's cache at {folder} is full: {needed}{size_text(free)} are free.",
        metadata=metadata,
    )


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _range_start(header: str) -> int:
    match = _RANGE_START.match(header)
    return int(match[1]) if match else -1
