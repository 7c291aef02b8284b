"""What the configuration files say, file by file, before it is laid over what is on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paddock.sizes import size_text
from paddock_server.catalog.configured.keys import Key
from paddock_server.catalog.configured.problems import Place, Problem
from paddock_server.catalog.setup import Origin

MAX_FILE_BYTES = 4 * 1024 * 1024
"""Room for tens of thousands of models; a larger file is none of ours."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One value, and where it stands."""

    key: Key
    value: object
    place: Place


Settings = Mapping[str, Setting]
"""By the dotted name of the key."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What one file says of one model, or of all."""

    name: str
    place: Place
    settings: Settings


@dataclass(frozen=True, slots=True)
class Group:
    """Models of which, with `exclusive`, only one may be loaded at a time."""

    name: str
    exclusive: bool


@dataclass(frozen=True, slots=True)
class ConfiguredModels:
    """What one file says. `folder` is where relative paths in it start."""

    origin: Origin
    folder: Path
    defaults: Settings = field(default_factory=dict[str, Setting])
    models: Sequence[Definition] = ()
    groups: Mapping[str, Group] = field(default_factory=dict[str, Group])
    default_model: tuple[str, Place] | None = None
    problems: Sequence[Problem] = ()


def read_bounded(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ValueError: it cannot be read, is too large or not UTF-8; the text completes `FILE: ...`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise ValueError(message) from error
    if len(raw) > MAX_FILE_BYTES:
        message = f"must be at most {size_text(MAX_FILE_BYTES)} long"
        raise ValueError(message)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"must be UTF-8; byte {error.start} is not"
        raise ValueError(message) from error
