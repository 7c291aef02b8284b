"""The worker's end of its socket: frames out from any thread, frames in from one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from paddock_server.worker.framing import FrameDecoder, encode_frame
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_RECEIVE_BYTES: Final = 64 * 1024


class ServerGoneError(Exception):
    """The server closed the socket or died: there is nobody left to work for."""


class Connection:
    """A stream socket that carries frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._lock = threading.Lock()

    def send(self, frame: worker_pb2.WorkerFrame) -> None:
        """Write a frame; waits while the server does not read.

        Raises:
            ServerGoneError: The other end is closed.
            FrameError: The frame is too long.
        """
        data = encode_frame(frame)
        try:
            with self._lock:
                self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ServerGoneError from error

    def receive(self) -> Iterator[worker_pb2.ServerFrame]:
        """Yield frames until the server closes the socket.

        Raises:
            FrameError: The server does not speak the protocol.
        """
        decoder = FrameDecoder()
        while data := self._read():
            for body in decoder.feed(data):
                yield worker_pb2.ServerFrame.FromString(body)

    def _read(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except ConnectionResetError:
            return b""
