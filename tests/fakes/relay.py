"""A TCP relay in front of a server: a network that a test can cut."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Relay:
    """Passes bytes on between a port of its own and a server."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    def cut(self) -> None:
        """Break every connection; new ones are served again."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until it ends."""
        other_reader, other_writer = await asyncio.open_connection(self._host, self._port)
        ends = {writer, other_writer}
        self._writers |= ends
        try:
            await asyncio.gather(_pass_on(reader, other_writer), _pass_on(other_reader, writer))
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()


@asynccontextmanager
async def relay(target: str) -> AsyncGenerator[Relay]:
    """Run a relay on a free port of loopback."""
    found = Relay(target)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        found.cut()
        await server.wait_closed()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return  # cut
    finally:
        writer.transport.abort()
