"""The errors of Paddock: one table, one exception class.

The server raises them, the wire carries them as `google.rpc.Status` (`paddock.status`), the client raises
them again and the gateway turns them into HTTP. `docs/errors.md` is this table in prose. The tree:

    PaddockError                 any reason; carries `reason`, `metadata`, `retry_after_seconds`, ...
      InvalidFieldError          a field of the request is wrong; `violations` names it
      ModelNotFoundError         no such model
      ModelNotLoadedError        not loaded, and loading on demand is off
      ModelUnavailableError      comes back by itself: queue full, worker crashed, shutting down
      LoadFailedError            the model cannot be loaded: bad file, unsupported, crashes, stalls
      InsufficientMemoryError    it does not fit

Nothing here imports grpc: workers' failures are mapped before the first channel exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOMAIN: Final = "paddock"
"""`ErrorInfo.domain` of every error."""


class Code(StrEnum):
    """Canonical gRPC status codes that Paddock answers with, by name."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class Reason(StrEnum):
    """`ErrorInfo.reason`: the machine-readable cause."""

    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    HUB_FILE_NOT_FOUND = "HUB_FILE_NOT_FOUND"
    HUB_ACCESS_DENIED = "HUB_ACCESS_DENIED"
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    MODEL_IN_USE = "MODEL_IN_USE"
    OPTIONS_CONFLICT = "OPTIONS_CONFLICT"
    LOAD_IN_PROGRESS = "LOAD_IN_PROGRESS"
    LOAD_ABORTED = "LOAD_ABORTED"
    LOAD_ID_MISMATCH = "LOAD_ID_MISMATCH"
    WATCH_TOO_SLOW = "WATCH_TOO_SLOW"
    REVISION_GONE = "REVISION_GONE"
    INSUFFICIENT_MEMORY = "INSUFFICIENT_MEMORY"
    DISK_FULL = "DISK_FULL"
    QUEUE_FULL = "QUEUE_FULL"
    RATE_LIMITED = "RATE_LIMITED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    WORKER_CRASHED = "WORKER_CRASHED"
    SERVER_UNREACHABLE = "SERVER_UNREACHABLE"
    CRASH_LOOP = "CRASH_LOOP"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    MODEL_UNLOADED = "MODEL_UNLOADED"
    INVALID_CONFIG = "INVALID_CONFIG"
    INVALID_FIELD = "INVALID_FIELD"
    INVALID_GRAMMAR = "INVALID_GRAMMAR"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    MODEL_CORRUPT = "MODEL_CORRUPT"
    LOAD_STALLED = "LOAD_STALLED"
    KEY_MISSING = "KEY_MISSING"
    KEY_INVALID = "KEY_INVALID"
    SCOPE_DENIED = "SCOPE_DENIED"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What one reason becomes on each wire."""

    code: Code
    """gRPC status code."""

    http_status: int
    """Status of the gateway's answer."""

    openai_type: str
    """`error.type` of an OpenAI error body."""

    openai_code: str | None = None
    """`error.code` of an OpenAI error body; None takes the reason in lower case."""

    retryable: bool = False
    """Whether a blind retry is right: such errors carry `RetryInfo` and `Retry-After`."""


_REQUEST: Final = "invalid_request_error"
_SERVER: Final = "server_error"

TABLE: Final[Mapping[str, ErrorRow]] = MappingProxyType(
    {
        Reason.MODEL_NOT_FOUND: ErrorRow(Code.NOT_FOUND, 404, _REQUEST, "model_not_found"),
        Reason.HUB_FILE_NOT_FOUND: ErrorRow(Code.NOT_FOUND, 404, _REQUEST),
        Reason.HUB_ACCESS_DENIED: ErrorRow(Code.FAILED_PRECONDITION, 400, _REQUEST),
        Reason.HUB_UNREACHABLE: ErrorRow(Code.UNAVAILABLE, 503, _SERVER, retryable=True),
        Reason.MODEL_NOT_LOADED: ErrorRow(Code.FAILED_PRECONDITION, 400, _REQUEST),
        Reason.MODEL_IN_USE: ErrorRow(Code.FAILED_PRECONDITION, 400, _REQUEST),
        Reason.OPTIONS_CONFLICT: ErrorRow(Code.FAILED_PRECONDITION, 400, _REQUEST),
        Reason.LOAD_IN_PROGRESS: ErrorRow(Code.ABORTED, 409, _REQUEST),
        Reason.LOAD_ABORTED: ErrorRow(Code.ABORTED, 409, _REQUEST),
        Reason.LOAD_ID_MISMATCH: ErrorRow(Code.ABORTED, 409, _REQUEST),
        Reason.WATCH_TOO_SLOW: ErrorRow(Code.ABORTED, 409, _REQUEST),
        Reason.REVISION_GONE: ErrorRow(Code.OUT_OF_RANGE, 400, _REQUEST),
        Reason.INSUFFICIENT_MEMORY: ErrorRow(Code.RESOURCE_EXHAUSTED, 503, _SERVER),
        Reason.DISK_FULL: ErrorRow(Code.RESOURCE_EXHAUSTED, 503, _SERVER),
        Reason.QUEUE_FULL: ErrorRow(Code.UNAVAILABLE, 429, "rate_limit_error", retryable=True),
        Reason.RATE_LIMITED: ErrorRow(Code.RESOURCE_EXHAUSTED, 429, "rate_limit_error", retryable=True),
        Reason.SHUTTING_DOWN: ErrorRow(Code.UNAVAILABLE, 503, _SERVER, retryable=True),
        Reason.WORKER_CRASHED: ErrorRow(Code.UNAVAILABLE, 503, _SERVER, retryable=True),
        Reason.SERVER_UNREACHABLE: ErrorRow(Code.UNAVAILABLE, 503, _SERVER, retryable=True),
        Reason.CRASH_LOOP: ErrorRow(Code.FAILED_PRECONDITION, 500, _SERVER),
        Reason.UNSUPPORTED_MODEL: ErrorRow(Code.FAILED_PRECONDITION, 500, _SERVER),
        Reason.MODEL_UNLOADED: ErrorRow(Code.ABORTED, 409, _REQUEST),
        Reason.INVALID_CONFIG: ErrorRow(Code.FAILED_PRECONDITION, 400, _REQUEST),
        Reason.INVALID_FIELD: ErrorRow(Code.INVALID_ARGUMENT, 400, _REQUEST),
        Reason.INVALID_GRAMMAR: ErrorRow(Code.INVALID_ARGUMENT, 400, _REQUEST),
        Reason.TEMPLATE_ERROR: ErrorRow(Code.INVALID_ARGUMENT, 400, _REQUEST),
        Reason.CONTEXT_LENGTH_EXCEEDED: ErrorRow(
            Code.INVALID_ARGUMENT, 400, _REQUEST, "context_length_exceeded"
        ),
        Reason.MODEL_CORRUPT: ErrorRow(Code.DATA_LOSS, 500, _SERVER),
        Reason.LOAD_STALLED: ErrorRow(Code.DEADLINE_EXCEEDED, 504, _SERVER),
        Reason.KEY_MISSING: ErrorRow(Code.UNAUTHENTICATED, 401, "authentication_error"),
        Reason.KEY_INVALID: ErrorRow(Code.UNAUTHENTICATED, 401, "authentication_error", "invalid_api_key"),
        Reason.SCOPE_DENIED: ErrorRow(Code.PERMISSION_DENIED, 403, "permission_error"),
        Reason.NOT_IMPLEMENTED: ErrorRow(Code.UNIMPLEMENTED, 501, _REQUEST),
        Reason.DEADLINE_EXCEEDED: ErrorRow(Code.DEADLINE_EXCEEDED, 504, _SERVER),
        Reason.CANCELLED: ErrorRow(Code.CANCELLED, 499, _REQUEST),
        Reason.INTERNAL: ErrorRow(Code.INTERNAL, 500, _SERVER),
    }
)
"""One row per reason. `tests/contract/test_error_table.py` walks it over a real channel."""

DEFAULT_RETRY_SECONDS: Final = 1.0
"""Wait suggested with a retryable error that knows no better figure."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that is wrong."""

    field: str
    """Dotted path, for example `sampling.top_p` or `chat.messages[2].role`."""

    description: str
    """What is wrong and what would be right."""


class PaddockError(Exception):
    """An error with a reason out of `Reason`. Raised by servers and clients alike.

    `reason` is kept as text: a client may meet a server that knows more reasons than it does; such an error
    has the row of `INTERNAL` but keeps its own gRPC `code`.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        resource: str = "",
        retry_after_seconds: float | None = None,
        code: Code | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[FieldViolation, ...] = tuple(violations)
        self.resource = resource
        """Name of what was not found; empty otherwise."""
        row = row_of(reason)
        self.code: Code = code if code is not None else row.code
        if retry_after_seconds is None and row.retryable:
            retry_after_seconds = DEFAULT_RETRY_SECONDS
        self.retry_after_seconds: float | None = retry_after_seconds
        self.request_id = request_id
        """Identifier to look for in the server's log; empty when unknown."""

    @property
    def row(self) -> ErrorRow:
        """The row of the table for this reason."""
        return row_of(self.reason)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason}, {self.message!r})"


class InvalidFieldError(PaddockError):
    """A field of the request is wrong. Reasons INVALID_FIELD, INVALID_GRAMMAR, TEMPLATE_ERROR, CONTEXT_..."""

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """Make the error for one field; `description` says what is wrong and what would be right."""
        return cls(
            Reason.INVALID_FIELD,
            f"{field}: {description}",
            metadata={"field": field},
            violations=(FieldViolation(field, description),),
        )


class ModelNotFoundError(PaddockError):
    """No model of that name. Never answered by another model."""

    @classmethod
    def of(cls, model: str) -> Self:
        """Make the error for a model name."""
        return cls(
            Reason.MODEL_NOT_FOUND,
            f"There is no model named {model!r}. List, or GET /v1/models over HTTP, shows those there are.",
            metadata={"model": model},
            resource=model,
        )


class ModelNotLoadedError(PaddockError):
    """The model is not loaded, and the request or the server does not load on demand."""


class ModelUnavailableError(PaddockError):
    """The same call may succeed after `retry_after_seconds`."""


class LoadFailedError(PaddockError):
    """The model cannot be loaded until something about it changes."""


class InsufficientMemoryError(PaddockError):
    """It does not fit, on disk or in memory."""


_CLASSES: Final[Mapping[str, type[PaddockError]]] = MappingProxyType(
    {
        Reason.INVALID_FIELD: InvalidFieldError,
        Reason.INVALID_GRAMMAR: InvalidFieldError,
        Reason.TEMPLATE_ERROR: InvalidFieldError,
        Reason.CONTEXT_LENGTH_EXCEEDED: InvalidFieldError,
        Reason.MODEL_NOT_FOUND: ModelNotFoundError,
        Reason.MODEL_NOT_LOADED: ModelNotLoadedError,
        Reason.QUEUE_FULL: ModelUnavailableError,
        Reason.RATE_LIMITED: ModelUnavailableError,
        Reason.SHUTTING_DOWN: ModelUnavailableError,
        Reason.WORKER_CRASHED: ModelUnavailableError,
        Reason.SERVER_UNREACHABLE: ModelUnavailableError,
        Reason.HUB_UNREACHABLE: ModelUnavailableError,
        Reason.CRASH_LOOP: LoadFailedError,
        Reason.UNSUPPORTED_MODEL: LoadFailedError,
        Reason.MODEL_CORRUPT: LoadFailedError,
        Reason.LOAD_STALLED: LoadFailedError,
        Reason.INSUFFICIENT_MEMORY: InsufficientMemoryError,
        Reason.DISK_FULL: InsufficientMemoryError,
    }
)


def row_of(reason: str) -> ErrorRow:
    """Return the table's row for a reason; the row of INTERNAL for an unknown one."""
    return TABLE.get(reason, TABLE[Reason.INTERNAL])


def error_class(reason: str) -> type[PaddockError]:
    """Return the exception class for a reason; `PaddockError` itself when it has none of its own."""
    return _CLASSES.get(reason, PaddockError)


def make_error(
    reason: str,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    violations: Sequence[FieldViolation] = (),
    resource: str = "",
    retry_after_seconds: float | None = None,
    code: Code | None = None,
    request_id: str = "",
) -> PaddockError:
    """Make the error of the class that belongs to the reason. Arguments as for `PaddockError`."""
    return error_class(reason)(
        reason,
        message,
        metadata=metadata,
        violations=violations,
        resource=resource,
        retry_after_seconds=retry_after_seconds,
        code=code,
        request_id=request_id,
    )
