"""JSON bodies to structs, with every complaint naming the parameter it is about. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import msgspec

from paddock_gateway.parameters import check
from paddock_gateway.refusal import refuse, refuse_http

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paddock_gateway.parameters import Parameter

T = TypeVar("T")

_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_AT_PATH: Final = re.compile(r" - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>[^`]+)`")


def decode_object(
    decoder: msgspec.json.Decoder[T],
    table: Mapping[str, Parameter],
    text: bytes | msgspec.Raw,
    prefix: str = "",
) -> T:
    """Decode a JSON object whose members are checked against a table first.

    Args:
        decoder: Decoder of the struct with the honoured members.
        table: What is known; see `parameters.check`.
        text: The object.
        prefix: Dotted path of the object, with its final dot; empty for the body itself.

    Raises:
        InvalidFieldError: a member is unknown, refused, missing or of the wrong type.
        RequestRefusedError: the body is not JSON, or not an object.
    """
    try:
        check(table, _MEMBERS.decode(text), prefix)
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        _refuse_invalid(str(error), prefix)
    except msgspec.DecodeError as error:
        _refuse_malformed(str(error), len(bytes(text)), prefix)
    except RecursionError:
        _refuse_malformed("it is nested too deeply", 0, prefix)


def check_encoding(body: bytes) -> None:
    """Refuse a body that is not UTF-8: values that are passed on undecoded would carry it further."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        _refuse_malformed(f"it is not UTF-8 (byte {error.start})", len(body), "")


def _refuse_invalid(message: str, prefix: str) -> NoReturn:
    """Turn msgspec's sentence into an error that names the parameter."""
    located = _AT_PATH.search(message)
    what = message if located is None else message[: located.start()]
    path = (prefix + (located["path"] if located is not None else "")).rstrip(".")
    for expression, description in (
        (_MISSING, "is required"),
        (_UNKNOWN, "this server has no such parameter"),
    ):
        named = expression.match(what)
        if named is not None:
            refuse(f"{path}.{named['name']}" if path else named["name"], description)
    if not path:
        refuse_http(400, "invalid_json", f"The body must be a JSON object. {what}.")
    refuse(path, what[:1].lower() + what[1:])


def _refuse_malformed(message: str, length: int, prefix: str) -> NoReturn:
    message = message.removeprefix("JSON is malformed: ")
    if message == "Input data was truncated":
        message = f"it ends before it is complete (byte {length})"
    if prefix:
        refuse(prefix.rstrip("."), f"is not valid JSON: {message}")
    refuse_http(400, "invalid_json", f"The body is not valid JSON: {message}.")
