"""What the operator has loaded or is loading, kept in a small JSON file so that it comes back after a restart
of the server.

    {"version": 1, "loads": [{"model": "...", "options": {"slot_count": 4, "idle_timeout_seconds": 0.0}}],
    "pins": {"...": true}, "files": {"...": "/models/a.gguf"}}

In the order of loading, latest last. Only options that somebody has set are kept, so that the others follow
the configuration. The file is replaced as a whole, so that a crash leaves the old one or
the new one and nothing in between.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from paddock_server.manager.options import Wish, stored_wish
from paddock_server.state_files import StateFile, read_document, read_or_set_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()

ValueT = TypeVar("ValueT")

VERSION: Final = 1

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Far more than any number of models needs; a larger file is not one of ours."""


@dataclass(frozen=True, slots=True)
class State:
    """What the file holds."""

    loads: dict[str, Wish] = field(default_factory=dict[str, Wish])
    """The loads to come back, the latest last."""

    pins: dict[str, bool] = field(default_factory=dict[str, bool])
    """What operators have said of pins."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    """The file to load of those models, as far as it is known: what is left when their names change."""


class DesiredLoads:
    """The loads to come back."""

    def __init__(self, path: Path | None) -> None:
        """`path` is the file; None keeps nothing."""
        self._path = path
        self._loads: dict[str, Wish] = {}
        self._pins: dict[str, bool] = {}
        self._files: dict[str, str] = {}
        self._before: dict[str, Wish | None] = {}
        """What was kept of models before the loads that are on their way."""

        self._file = StateFile(path, lambda: _document(self._loads, self._pins, self._files))

    @property
    def loads(self) -> Mapping[str, Wish]:
        """What is to come back, with the options that were set; the latest load last."""
        return self._loads

    @property
    def pins(self) -> Mapping[str, bool]:
        """What operators have said of pins; of other models the configuration's word counts."""
        return self._pins

    async def read(self) -> None:
        """Take over what the file holds. One that is no good is set aside with a warning."""
        state = await read_or_set_aside(self._path, read_state)
        if state is not None:
            self._loads, self._pins, self._files = state.loads, state.pins, state.files

    def expect(self, model: str, wish: Wish, file: str = "") -> None:
        """Keep a load that is on its way as the latest. `put` follows when it has come up, `failed` when it
        has not; if neither does, because the server ends, it comes back like one that has."""
        known = self._loads.get(model)
        if known != wish:
            self._before.setdefault(model, known)
            self._set(model, wish, file)

    def put(self, model: str, wish: Wish | None, file: str = "") -> None:
        """Keep a load as the latest, or forget it. `file` is what is loaded, as far as it is known."""
        self._before.pop(model, None)
        if self._loads.get(model) != wish:
            self._set(model, wish, file)

    def failed(self, model: str, wish: Wish, *, for_good: bool) -> None:
        """Forget a load that has not come up; what was kept before it counts again.

        One that came up earlier, with the same options, stays as long as it may again: unless it has failed
        `for_good`.
        """
        if model in self._before:
            self._set(model, self._before.pop(model))
        elif for_good and self._loads.get(model) == wish:
            self._set(model, None)

    def _set(self, model: str, wish: Wish | None, file: str = "") -> None:
        self._loads.pop(model, None)
        if wish is not None:
            self._loads[model] = wish
        self._note_file(model, file)
        self._file.changed()

    def knows(self, model: str) -> bool:
        """Return whether anything is kept of a model."""
        return model in self._loads or model in self._pins

    def forget(self, model: str) -> None:
        """Forget all that is kept of a model that is not there any more."""
        self._before.pop(model, None)
        self._pins.pop(model, None)
        self._set(model, None)

    def pin(self, model: str, pinned: bool, file: str) -> None:
        """Keep that a model, which is in a file, is pinned, or is not."""
        if self._pins.get(model) is not pinned:
            self._pins[model] = pinned
            self._note_file(model, file)
            self._file.changed()

    def follow(self, ids: Collection[str], names: Mapping[str, str], file_of: Callable[[str], str]) -> None:
        """Take over ids that have changed: an earlier one is a name of the model now, or has the same file.

        What is found nowhere stays for when it is. What is known of the new id already counts.

        Args:
            ids: All models there are.
            names: Their other names, with the ids those mean.
            file_of: Returns the file of a model that is there.
        """
        lost = {*self._loads, *self._pins}.difference(ids)
        if not lost:
            return
        files = {file: model for model, file in self._files.items() if model in lost}
        moved = {files[file]: id_ for id_ in ids if (file := file_of(id_)) in files} if files else {}
        moved |= {name: names[name] for name in lost if name in names}
        if moved:
            log.info("remembered_models_renamed", models=moved)
            self._before = _renamed(self._before, moved, self._loads)
            self._loads = _renamed(self._loads, moved, self._loads)
            self._pins = _renamed(self._pins, moved, self._pins)
            self._files = _renamed(self._files, moved, self._files)
            self._file.changed()

    def _note_file(self, model: str, file: str) -> None:
        if file:
            self._files[model] = file
        self._files = {
            model: file for model, file in self._files.items() if model in self._loads or model in self._pins
        }

    async def caught_up(self) -> None:
        """Wait until what was put so far is on the disk, or cannot be written."""
        await self._file.caught_up()

    async def run(self) -> None:
        """Write the file whenever something has changed, until `close`."""
        await self._file.run()

    def close(self) -> None:
        """Have `run` write what is unwritten, and end."""
        self._file.close()


def _renamed(
    kept: Mapping[str, ValueT], moved: Mapping[str, str], known: Collection[str]
) -> dict[str, ValueT]:
    """Return the same under new names, in the same order; without what would take the name of a known one."""
    return {
        moved.get(name, name): value
        for name, value in kept.items()
        if name not in moved or moved[name] not in known
    }


def _document(loads: Mapping[str, Wish], pins: Mapping[str, bool], files: Mapping[str, str]) -> bytes:
    entries = [{"model": model, "options": {**wish.values, **wish.in_place}} for model, wish in loads.items()]
    document = {"version": VERSION, "loads": entries, "pins": dict(pins), "files": dict(files)}
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def read_state(path: Path) -> State:
    """Read a state file; an absent one is empty.

    Raises:
        StateFileError: it is not a state file of this version.
        OSError: it cannot be read.
    """
    return read_document(path, _state, version=VERSION, max_bytes=MAX_FILE_BYTES) or State()


def _state(document: Any) -> State:
    loads = {_model_name(load["model"]): stored_wish(load["options"]) for load in document["loads"]}
    pins = {_model_name(model): pin is True for model, pin in document.get("pins", {}).items()}
    files = {_model_name(model): _model_name(file) for model, file in document.get("files", {}).items()}
    return State(loads, pins, files)


def _model_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        message = f"{value!r} is not the name of a model or of its file"
        raise TypeError(message)
    return value
