"""The downloads that are to go on after a restart of the server, in a small JSON file beside the loads.

    {"version": 1, "downloads": [{"repo_id": "...", "revision": "main", "pattern": "Q4_K_M", "paused": true,
    "asked_for": true, "completed_bytes": 1, "resolved": {"commit": "...", "file": "...", ...}}]}

The file is replaced as a whole, so that a crash leaves the old one or the new one and nothing in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from paddock_server.catalog import HubNameError, HubRef, hub_ref
from paddock_server.catalog.hub_names import is_commit, is_digest
from paddock_server.downloads.messages import Resolved
from paddock_server.state_files import StateFile, StateFileError, read_document, read_or_set_aside

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""Far more than any number of downloads needs; a larger file is not one of ours."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is remembered of a download. `resolved` is None as long as the hub has not been heard."""

    paused: bool
    completed_bytes: int = 0
    resolved: Resolved | None = None
    asked_for: bool = True
    """Whether somebody called Download for it; what an earlier release has kept counts as such."""


class DownloadStore:
    """Keeps the unfinished downloads."""

    def __init__(self, path: Path | None) -> None:
        """`path` is the file; None keeps nothing."""
        self._path = path
        self._latest: Mapping[HubRef, Unfinished] = {}
        self._file = StateFile(path, lambda: _document(self._latest))

    async def read(self) -> dict[HubRef, Unfinished]:
        """Return the unfinished downloads. A file that is no good is set aside with a warning."""
        return await read_or_set_aside(self._path, read_store) or {}

    def put(self, downloads: Mapping[HubRef, Unfinished]) -> None:
        """Have these written."""
        self._latest = dict(downloads)
        self._file.changed()

    async def caught_up(self) -> None:
        """Wait until what was put last is on the disk, or cannot be written."""
        await self._file.caught_up()

    async def run(self) -> None:
        """Write the file whenever something has changed, until `close`."""
        await self._file.run()

    def close(self) -> None:
        """Have `run` write what is unwritten, and end."""
        self._file.close()


def _document(downloads: Mapping[HubRef, Unfinished]) -> bytes:
    entries = [
        {"repo_id": ref.repo_id, "revision": ref.revision, "pattern": ref.pattern, **asdict(unfinished)}
        for ref, unfinished in downloads.items()
    ]
    return json.dumps({"version": VERSION, "downloads": entries}, indent=1).encode()


def read_store(path: Path) -> dict[HubRef, Unfinished]:
    """Read the file; an absent one is empty.

    Raises:
        StateFileError: it is not a file of this version.
        OSError: it cannot be read.
    """
    return read_document(path, _downloads, version=VERSION, max_bytes=MAX_FILE_BYTES) or {}


def _downloads(document: Any) -> dict[HubRef, Unfinished]:
    try:
        return {
            hub_ref(entry["repo_id"], entry["revision"], entry["pattern"]): _unfinished(entry)
            for entry in document["downloads"]
        }
    except HubNameError as error:
        raise StateFileError(str(error)) from error


def _unfinished(entry: dict[str, Any]) -> Unfinished:
    resolved: Resolved | None = None
    if entry["resolved"] is not None:
        resolved = Resolved(**entry["resolved"])
        # They become paths.
        if not is_commit(resolved.commit) or not all(is_digest(digest) for digest in resolved.digests):
            message = "a commit or a digest is none"
            raise ValueError(message)
    asked_for = entry.get("asked_for", True) is True
    return Unfinished(entry["paused"] is True, int(entry["completed_bytes"]), resolved, asked_for)
