"""Errors on the wire: `PaddockError` to `google.rpc.Status` or to a message of `GenerateMany`, and back.

The only module that touches the `google.rpc` types. What `to_status` writes, `from_rpc_error` reads, and what
`to_generation_error` writes, `from_generation_error`, for every row of `paddock.errors.TABLE`
(`tests/unit/test_status.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import (  # pyright: ignore[reportMissingTypeStubs]
    code_pb2,
    error_details_pb2,
    status_pb2,
)

from paddock.errors import DOMAIN, Code, FieldViolation, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import grpc.aio
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.message import Message

    DetailT = TypeVar("DetailT", bound=Message)

STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata key under which gRPC carries a serialised `google.rpc.Status`."""

MAX_STATUS_BYTES: Final = 6144
"""Bytes of trailing metadata a status may take. gRPC clients refuse more than 8 KiB of metadata by default,
and then the caller would see RESOURCE_EXHAUSTED instead of the reason."""

_TEXT_LIMITS: Final = (1024, 512, 256, 128, 64)
"""Characters per text, tried in turn until the status fits."""

_MAX_VIOLATIONS: Final = 8

_MESSAGE_TEXT_LIMIT: Final = 16 * 1024
"""Characters per text of an error that travels as a message, where there is room."""

_RESOURCE_TYPES: Final[Mapping[str, str]] = {
    Reason.MODEL_NOT_FOUND: "model",
    Reason.HUB_FILE_NOT_FOUND: "hub file",
}


def to_status(error: PaddockError, *, request_id: str = "") -> status_pb2.Status:
    """Return the status that tells a caller about `error`.

    Args:
        error: The error.
        request_id: Identifier under which the server logged the request; falls back on the error's own.

    Returns:
        A status with `ErrorInfo`, and with `RetryInfo`, `BadRequest`, `ResourceInfo`, `PreconditionFailure`
        and `RequestInfo` where they apply. Long texts lose their middle, so that it fits `MAX_STATUS_BYTES`.
    """
    status = status_pb2.Status()
    for limit in _TEXT_LIMITS:
        status = _build(error, request_id or error.request_id, limit)
        if _header_bytes(status) <= MAX_STATUS_BYTES:
            break
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> PaddockError:
    """Return the error behind a failed call.

    Without Paddock's details (nobody listens, a proxy answered, the deadline passed) the gRPC code decides.
    """
    status = _status_of(error.trailing_metadata() or ())
    decoded = _from_status(status) if status is not None else None
    return decoded or _from_code(error.code().name, error.details() or "")


def to_generation_error(error: PaddockError, *, request_id: str = "") -> pb.GenerationError:
    """Return the message that tells a caller of `GenerateMany` what `to_status` tells one of `Generate`.

    Args:
        error: The error.
        request_id: Identifier under which the server logged the generation; falls back on the error's own.
    """
    limit = _MESSAGE_TEXT_LIMIT
    message = pb.GenerationError(
        code=code_pb2.Code.Value(error.code.name),
        reason=_fit(error.reason, limit),
        message=_fit(error.message, limit),
        metadata={_fit(key, limit): _fit(value, limit) for key, value in error.metadata.items()},
        violations=[
            pb.FieldViolation(field=_fit(one.field, limit), description=_fit(one.description, limit))
            for one in error.violations[:_MAX_VIOLATIONS]
        ],
        resource=_fit(error.resource, limit),
        request_id=_fit(request_id or error.request_id, limit),
    )
    if error.retry_after_seconds is not None:
        message.retry_delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
    return message


def from_generation_error(message: pb.GenerationError) -> PaddockError:
    """Return the error behind a failed generation of `GenerateMany`."""
    return make_error(
        message.reason,
        message.message,
        metadata=dict(message.metadata),
        violations=[FieldViolation(one.field, one.description) for one in message.violations],
        resource=message.resource,
        retry_after_seconds=(
            message.retry_delay.ToNanoseconds() / 1e9 if message.HasField("retry_delay") else None
        ),
        code=_code_of(_code_name(message.code)),
        request_id=message.request_id,
    )


def _build(error: PaddockError, request_id: str, limit: int) -> status_pb2.Status:
    message = _fit(error.message, limit)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={_fit(key, 64): _fit(value, limit) for key, value in error.metadata.items()},
        )
    ]
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        details.append(_bad_request(error, limit))
    if error.resource:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=_RESOURCE_TYPES.get(error.reason, ""),
                resource_name=_fit(error.resource, limit),
            )
        )
    if error.code is Code.FAILED_PRECONDITION:
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=_fit(error.metadata.get("model", ""), limit), description=message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=_fit(request_id, 128)))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _bad_request(error: PaddockError, limit: int) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_fit(violation.field, 128), description=_fit(violation.description, limit)
            )
            for violation in error.violations[:_MAX_VIOLATIONS]
        ]
    )


def _fit(text: str, limit: int) -> str:
    # Causes stand at the start of a text, the last log lines at its end, so the middle goes. Names of files
    # may hold surrogates, which protobuf refuses.
    valid = text.encode("utf-8", "replace").decode()
    if len(valid) <= limit:
        return valid
    head = limit // 2
    return f"{valid[:head]}…{valid[-(limit - head - 1) :]}"


def _header_bytes(status: status_pb2.Status) -> int:
    """Upper bound of the bytes on the wire: details as base64, and the message once more, percent-encoded."""
    return -(-status.ByteSize() // 3) * 4 + len(quote(status.message, safe=" "))


def _status_of(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_status(status: status_pb2.Status) -> PaddockError | None:
    info = _unpack(status.details, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN or not info.reason:
        return None
    retry = _unpack(status.details, error_details_pb2.RetryInfo)
    bad_request = _unpack(status.details, error_details_pb2.BadRequest)
    resource = _unpack(status.details, error_details_pb2.ResourceInfo)
    request = _unpack(status.details, error_details_pb2.RequestInfo)
    return make_error(
        info.reason,
        status.message,
        metadata=dict(info.metadata),
        violations=[
            FieldViolation(violation.field, violation.description)
            for violation in (bad_request.field_violations if bad_request else ())
        ],
        resource=resource.resource_name if resource else "",
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        code=_code_of(_code_name(status.code)),
        request_id=request.request_id if request else "",
    )


def _unpack(details: Iterable[AnyMessage], kind: type[DetailT]) -> DetailT | None:
    for detail in details:
        if detail.TypeName() == kind.DESCRIPTOR.full_name:
            message = kind()
            return message if detail.Unpack(message) else None
    return None


_REASON_OF_CODE: Final[Mapping[str, Reason]] = {
    "UNAVAILABLE": Reason.SERVER_UNREACHABLE,
    "DEADLINE_EXCEEDED": Reason.DEADLINE_EXCEEDED,
    "CANCELLED": Reason.CANCELLED,
    "UNIMPLEMENTED": Reason.NOT_IMPLEMENTED,
    # What gRPC itself runs out of is room in a message, and then the same call fails again: no RATE_LIMITED.
    "RESOURCE_EXHAUSTED": Reason.INVALID_FIELD,
    "INVALID_ARGUMENT": Reason.INVALID_FIELD,
    # HTTP 401 and 403 of a proxy come as these two.
    "UNAUTHENTICATED": Reason.KEY_INVALID,
    "PERMISSION_DENIED": Reason.SCOPE_DENIED,
}
"""What gRPC itself and proxies answer with. Every other code without details is INTERNAL."""

_PREFIX_OF_CODE: Final[Mapping[str, str]] = {
    "UNAVAILABLE": "The connection to the server failed",
    "DEADLINE_EXCEEDED": "The deadline of the call passed",
    "CANCELLED": "The call was cancelled",
    "UNIMPLEMENTED": "The server does not offer this call",
    "RESOURCE_EXHAUSTED": "The request or its answer is larger than one message may be; ask for less at once",
    "INVALID_ARGUMENT": "The request was refused before Paddock read it; it must be a message of this call",
    "UNAUTHENTICATED": "The key was not accepted on the way to the server",
    "PERMISSION_DENIED": "The key does not allow this call",
}


def _from_code(name: str, details: str) -> PaddockError:
    reason = _REASON_OF_CODE.get(name, Reason.INTERNAL)
    prefix = _PREFIX_OF_CODE.get(name, "The call failed without a Paddock error")
    message = f"{prefix} ({name}: {details or 'no details'})."
    return make_error(reason, message, metadata={"grpc_code": name}, code=_code_of(name))


def _code_of(name: str) -> Code:
    return Code.__members__.get(name, Code.INTERNAL)


def _code_name(number: int) -> str:
    return code_pb2.Code.Name(number) if number in code_pb2.Code.values() else Code.INTERNAL.name
