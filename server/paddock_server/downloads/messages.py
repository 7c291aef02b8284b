"""What a fetcher tells the server: one JSON object a line on its standard output. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias

from paddock.errors import FieldViolation, PaddockError, make_error

MAX_LINE_BYTES: Final = 256 * 1024
"""A longer line is not one of ours."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The hub has told what the name means. `suffix` is what the model's id ends with, `total_bytes` the size
    of all its files and `digests` their names among the cache's blobs."""

    commit: str
    file: str
    suffix: str
    total_bytes: int
    digests: Sequence[str]


@dataclass(frozen=True, slots=True)
class Advanced:
    """How far the download or the verification is, over all files; sent at least every second."""

    verifying: bool
    completed_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Retrying:
    """A fault that passes by itself; the next attempt begins after `wait_seconds`."""

    message: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """Every file is whole, verified and linked. `cached` says that all were there before."""

    cached: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The download failed; the fields are those of a `PaddockError`."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    field_name: str = ""
    resource: str = ""
    retry_after_seconds: float | None = None

    def error(self) -> PaddockError:
        """Make an exception of its own for one caller."""
        return make_error(
            self.reason,
            self.message,
            metadata=self.metadata,
            violations=[FieldViolation(self.field_name, self.message)] if self.field_name else (),
            resource=self.resource,
            retry_after_seconds=self.retry_after_seconds,
        )


Message: TypeAlias = Resolved | Advanced | Retrying | Done | Failed

_KINDS: Final[Mapping[str, type[Message]]] = {
    kind.__name__.lower(): kind for kind in (Resolved, Advanced, Retrying, Done, Failed)
}


class MessageError(ValueError):
    """A line is not a message."""


def encode(message: Message) -> bytes:
    """Return a message as a line."""
    return json.dumps({"kind": type(message).__name__.lower(), **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Read a line.

    Raises:
        MessageError: it is no message.
    """
    try:
        fields: dict[str, Any] = json.loads(line)
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{line[:200]!r} is no message of a fetcher"
        raise MessageError(text) from error


def failed(error: PaddockError) -> Failed:
    """Return an error as a message."""
    return Failed(
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
        field_name=error.violations[0].field if error.violations else "",
        resource=error.resource,
        retry_after_seconds=error.retry_after_seconds,
    )
