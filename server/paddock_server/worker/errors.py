"""What can be wrong with a request or a model file: a reason of docs/errors.md and a sentence.

The worker does not import `paddock.errors` (it imports nothing but its own files and generated code); a test
holds the reasons here against the table there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping


class Reason(StrEnum):
    """The reasons a worker can give; each is a row of the table in docs/errors.md."""

    INVALID_FIELD = "INVALID_FIELD"
    INVALID_GRAMMAR = "INVALID_GRAMMAR"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    QUEUE_FULL = "QUEUE_FULL"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    MODEL_CORRUPT = "MODEL_CORRUPT"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    INSUFFICIENT_MEMORY = "INSUFFICIENT_MEMORY"
    LOAD_ABORTED = "LOAD_ABORTED"


class WorkerError(Exception):
    """A request or a load that cannot be served. Anything else raised is a bug and ends the process."""

    def __init__(
        self, reason: Reason, message: str, *, field: str = "", metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        # What a caller sent may come back in a message; protobuf refuses half a surrogate pair.
        self.message = _valid(message)
        self.field = _valid(field)
        """Dotted path of the request field to blame; empty when none is."""
        self.metadata: dict[str, str] = {key: _valid(value) for key, value in (metadata or {}).items()}

    def to_failure(self) -> worker_pb2.Failure:
        """Return the message for the wire."""
        return worker_pb2.Failure(
            reason=self.reason.value, message=self.message, metadata=self.metadata, field=self.field
        )


def reject(field: str, description: str) -> NoReturn:
    """Raise INVALID_FIELD for one field; `description` says what is wrong and what would be right."""
    raise WorkerError(Reason.INVALID_FIELD, f"{field}: {description}", field=field, metadata={"field": field})


def reject_unimplemented(field: str, description: str) -> NoReturn:
    """Raise NOT_IMPLEMENTED for a field whose feature does not exist yet."""
    raise WorkerError(
        Reason.NOT_IMPLEMENTED, f"{field}: {description}", field=field, metadata={"field": field}
    )


def context_length_exceeded(field: str, prompt_tokens: int, context_tokens: int) -> WorkerError:
    """Return the error for a prompt longer than a sequence, of `context_tokens` with its output, can be."""
    return WorkerError(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        f"The prompt has {prompt_tokens} tokens; a sequence holds {context_tokens}, output included.",
        field=field,
        metadata={"prompt_tokens": str(prompt_tokens), "context_tokens": str(context_tokens)},
    )


def far_too_long(field: str, characters: int, context_tokens: int) -> WorkerError:
    """Return the same error for a text so long that nobody counts its tokens."""
    return WorkerError(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        f"The prompt has {characters} characters, far more than the {context_tokens} tokens that a sequence "
        "holds, output included.",
        field=field,
        metadata={"prompt_characters": str(characters), "context_tokens": str(context_tokens)},
    )


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
