"""Errors as HTTP: status, headers and OpenAI's body, all out of the one table in `paddock.errors`. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from paddock.errors import PaddockError, Reason
from paddock_gateway.refusal import RequestRefusedError
from paddock_gateway.schema import ErrorBody, ErrorDetail

if TYPE_CHECKING:
    from collections.abc import Callable

RawHeaders = list[tuple[bytes, bytes]]

CLIENT_GONE_STATUS: Final = 499
"""What the log says of a request whose client went away; nobody receives it."""

_encode: Final = msgspec.json.Encoder().encode


class ClientGoneError(Exception):
    """The client went away; there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error, ready to be sent."""

    status: int
    body: bytes
    headers: RawHeaders
    reason: str
    """For the log."""


def reply_to(error: PaddockError | RequestRefusedError, name_of: Callable[[str], str]) -> ErrorReply:
    """Turn an error into an HTTP answer.

    Args:
        error: What went wrong.
        name_of: Translates the dotted path of a field of `paddock.v1` to the parameter the caller knows.
    """
    headers: RawHeaders = [(b"content-type", b"application/json")]
    if isinstance(error, RequestRefusedError):
        headers += [(name.encode(), value.encode()) for name, value in error.headers]
        detail = ErrorDetail(error.message, "invalid_request_error", None, error.code)
        return ErrorReply(error.status, _encode(ErrorBody(detail)), headers, error.code.upper())
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds))))
    # OpenAI's and Anthropic's clients retry every 409 and 5xx unless told; most of ours will not get better.
    headers.append((b"x-should-retry", b"false" if error.retry_after_seconds is None else b"true"))
    return ErrorReply(error.row.http_status, _body(error, name_of), headers, error.reason)


def _body(error: PaddockError, name_of: Callable[[str], str]) -> bytes:
    """Return OpenAI's error object as JSON, in the caller's names."""
    field = _field_of(error)
    param = name_of(field) if field else None
    message = error.message
    if field and param and param != field:
        message = _renamed(message, field, param)
    code = error.row.openai_code or error.reason.lower()
    return _encode(ErrorBody(ErrorDetail(message, error.row.openai_type, param, code)))


def _renamed(message: str, field: str, param: str) -> str:
    """Put the caller's name where a message has the field's: at its head, or anywhere if it is a dotted path.

    A plain word such as `chat` is a word like any other further on.
    """
    if message.startswith(f"{field}: "):
        message = param + message[len(field) :]
    if "." in field:
        message = re.sub(rf"(?<![\w.]){re.escape(field)}(?!\w)", lambda _: param, message)
    return message


def _field_of(error: PaddockError) -> str:
    """Return the dotted path of the field to blame, empty when there is none."""
    if error.violations:
        return error.violations[0].field
    if "field" in error.metadata:
        return error.metadata["field"]
    if error.reason == Reason.MODEL_NOT_FOUND:
        return "model"
    if error.reason == Reason.CONTEXT_LENGTH_EXCEEDED:
        return "input"
    return ""
