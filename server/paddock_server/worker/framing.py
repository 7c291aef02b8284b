"""Length-prefixed frames between the server and its workers.

A frame is four bytes of length, big endian, then that many bytes of one serialized protobuf message. Used by
the worker, by the server and by the fake worker of the tests, so that there is one idea of what a frame is.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from google.protobuf.message import Message

PROTOCOL_VERSION: Final = 1
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024

_HEADER: Final = struct.Struct(">I")


class FrameError(ValueError):
    """A frame breaks the protocol. Nothing that follows on the connection can be trusted."""


def encode_frame(message: Message) -> bytes:
    """Return `message` as one frame.

    Raises:
        FrameError: The message is longer than `MAX_FRAME_BYTES`.
    """
    body = message.SerializeToString()
    if len(body) > MAX_FRAME_BYTES:
        text = f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES} bytes"
        raise FrameError(text)
    return _HEADER.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into frames. Holds at most one unfinished frame."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Take the next bytes of the stream and return the bodies of the frames they complete, in order.

        Raises:
            FrameError: A frame announces more than `MAX_FRAME_BYTES`. The decoder is of no use afterwards.
        """
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        position = 0
        while len(buffer) - position >= _HEADER.size:
            (length,) = _HEADER.unpack_from(buffer, position)
            if length > MAX_FRAME_BYTES:
                text = f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES} bytes"
                raise FrameError(text)
            end = position + _HEADER.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[position + _HEADER.size : end]))
            position = end
        if position:
            del buffer[:position]
        return bodies
