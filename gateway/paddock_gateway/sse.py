"""Server-sent events: the framing, and the headers of a stream. Pure."""

from __future__ import annotations

from typing import Final

HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

DONE: Final = b"data: [DONE]\n\n"
"""Ends every stream that succeeded, and no other."""

PING: Final = b": ping\n\n"
"""A comment: clients skip it, and whatever sits between sees a connection in use."""


def event(data: bytes) -> bytes:
    """Frame one line of JSON as an event."""
    return b"data: " + data + b"\n\n"
