"""What loads were measured to take of the main memory, in a small JSON file: a restart does not forget it.

    {"version": 1, "loads": [{"path": "/models/a.gguf", "size_bytes": 1, "modified_ns": 1,
    "computed_by": "...", "options": {"slot_count": 4, ...}, "resident_bytes": 1}]}

The load that was looked at last stands last. The file is replaced as a whole, so that a crash leaves the old
one or the new one and nothing in between.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from paddock_server.memory import LoadOptions
from paddock_server.state_files import WAIT_SECONDS, StateFile, read_document, read_or_set_aside

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

VERSION: Final = 1

MAX_LOADS: Final = 512
"""Loads that are kept; those that were looked at longest ago go."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""More than so many loads take, were each path as long as a system allows and all of it escaped."""

STEP_BYTES: Final = 1 << 20
"""What is measured is rounded up to: a process that has grown by a page is not worth a write."""

_OPTIONS: Final[Mapping[str, object]] = asdict(LoadOptions(1, 1, 1))
"""The options of this release that decide about memory, with a value of the type each has."""


@dataclass(frozen=True, slots=True)
class LoadKey:
    """What a load's memory depends on: its files, its options, and what computes it."""

    path: str
    size_bytes: int
    modified_ns: int
    options: LoadOptions
    computed_by: str
    """Release of the server and devices of the machine: another build takes another amount."""


class Measurements:
    """Bytes by load. Written in the event loop; any thread may ask."""

    def __init__(self, path: Path | None) -> None:
        """`path` is the file; None keeps nothing over a restart."""
        self._path = path
        self._loads: OrderedDict[LoadKey, int] = OrderedDict()
        self._file = StateFile(path, lambda: _document(self._loads))

    def of(self, load: LoadKey) -> int | None:
        """Return the most bytes that a load was measured to have resident; None when it never was."""
        return self._loads.get(load)

    def learn(self, load: LoadKey, resident_bytes: int) -> None:
        """Take note of what a load has resident; 0 when that is not known. The most there was counts."""
        if resident_bytes <= 0:
            return
        known = self._loads.get(load, 0)
        most = max(known, -(-resident_bytes // STEP_BYTES) * STEP_BYTES)
        self._loads[load] = most
        self._loads.move_to_end(load)
        if most == known:
            return
        for other in [other for other in self._loads if _is_outdated(other, load)]:
            del self._loads[other]
        while len(self._loads) > MAX_LOADS:
            self._loads.popitem(last=False)
        self._file.changed()

    @asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Take over what the file holds, and write it whenever there is news, while the block runs."""
        self._loads.update(await read_or_set_aside(self._path, read_measurements) or {})
        writer = asyncio.create_task(self._file.run(), name="measurements")
        try:
            yield
        finally:
            self._file.close()
            await asyncio.wait({writer}, timeout=WAIT_SECONDS)
            writer.cancel()


def read_measurements(path: Path) -> OrderedDict[LoadKey, int]:
    """Read the file; an absent one is empty.

    Raises:
        StateFileError: it is not a file of this version.
        OSError: it cannot be read.
    """
    return read_document(path, _loads, version=VERSION, max_bytes=MAX_FILE_BYTES) or OrderedDict()


def _loads(document: Any) -> OrderedDict[LoadKey, int]:
    # Loads with options that are not those of this release say nothing about its loads.
    entries = [entry for entry in document["loads"] if entry["options"].keys() == _OPTIONS.keys()]
    return OrderedDict((_key(entry), _size(entry["resident_bytes"])) for entry in entries[-MAX_LOADS:])


def _key(entry: Any) -> LoadKey:
    options = {name: _like(example, entry["options"][name]) for name, example in _OPTIONS.items()}
    return LoadKey(
        path=_like("", entry["path"]),
        size_bytes=_like(0, entry["size_bytes"]),
        modified_ns=_like(0, entry["modified_ns"]),
        options=LoadOptions(**options),
        computed_by=_like("", entry["computed_by"]),
    )


def _like(example: object, value: Any) -> Any:
    if type(value) is not type(example):
        message = f"{value!r} is no {type(example).__name__}"
        raise TypeError(message)
    return value


def _size(value: Any) -> int:
    size: int = _like(0, value)
    if size <= 0:
        message = f"{size} is no size of a process"
        raise ValueError(message)
    return size


def _is_outdated(other: LoadKey, load: LoadKey) -> bool:
    """Return whether a load is of an earlier state of the same file."""
    is_same = (other.size_bytes, other.modified_ns) == (load.size_bytes, load.modified_ns)
    return other.path == load.path and not is_same


def _document(loads: Mapping[LoadKey, int]) -> bytes:
    entries = [{**asdict(load), "resident_bytes": size} for load, size in loads.items()]
    return json.dumps({"version": VERSION, "loads": entries}, indent=1).encode()
