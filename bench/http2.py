"""As much of HTTP/2 and gRPC as a client needs that only counts messages (RFC 9113; PROTOCOL-HTTP2 of gRPC).

A client library takes as much CPU time for a token as the server does, and on a machine with two cores that
is time the engine does not get. Headers of the answer are not decoded: the last message says whether all went
well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4

FRAME_HEADER_BYTES: Final = 9
MESSAGE_HEADER_BYTES: Final = 5
_MAX_FRAME_BYTES: Final = 16384
_INITIAL_WINDOW_SIZE: Final = 4
_DEFAULT_WINDOW_BYTES: Final = 65535
_MAX_WINDOW_BYTES: Final = 2**31 - 1


def opening() -> bytes:
    """Return what a client says first: windows so large that none ever has to be opened again."""
    window = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + _MAX_WINDOW_BYTES.to_bytes(4, "big")
    more = (_MAX_WINDOW_BYTES - _DEFAULT_WINDOW_BYTES).to_bytes(4, "big")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return preface + frame(SETTINGS, 0, 0, window) + frame(WINDOW_UPDATE, 0, 0, more)


def request(stream: int, authority: str, method: str, message: bytes) -> bytes:
    """Return a call with its one message."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": authority,
        "content-type": "application/grpc",
        "te": "trailers",  # codespell:ignore te
    }
    headers = b"".join(_literal(name, value) for name, value in fields.items())
    body = b"\0" + len(message).to_bytes(4, "big") + message
    parts = [body[at : at + _MAX_FRAME_BYTES] for at in range(0, len(body), _MAX_FRAME_BYTES)]
    frames = [frame(DATA, 0, stream, part) for part in parts[:-1]]
    return (
        frame(HEADERS, END_HEADERS, stream, headers)
        + b"".join(frames)
        + frame(DATA, END_STREAM, stream, parts[-1])
    )


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def frames(buffer: bytearray) -> Iterator[tuple[int, int, int, bytes]]:
    """Take whole frames off the buffer: kind, flags, stream and payload of each."""
    at = 0
    while len(buffer) - at >= FRAME_HEADER_BYTES:
        end = at + FRAME_HEADER_BYTES + int.from_bytes(buffer[at : at + 3], "big")
        if len(buffer) < end:
            break
        stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
        yield buffer[at + 3], buffer[at + 4], stream, bytes(buffer[at + FRAME_HEADER_BYTES : end])
        at = end
    del buffer[:at]


def messages(buffer: bytearray) -> Iterator[bytes]:
    """Take whole gRPC messages off a stream's buffer."""
    at = 0
    while len(buffer) - at >= MESSAGE_HEADER_BYTES:
        end = at + MESSAGE_HEADER_BYTES + int.from_bytes(buffer[at + 1 : at + 5], "big")
        if len(buffer) < end:
            break
        yield bytes(buffer[at + MESSAGE_HEADER_BYTES : end])
        at = end
    del buffer[:at]


def _literal(name: str, value: str) -> bytes:
    """Return a header field, literal and not to be indexed (RFC 7541, 6.2.2); all are below 127 bytes."""
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
