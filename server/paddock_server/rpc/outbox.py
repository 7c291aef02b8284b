"""Events of many generations on their way into the messages of one stream."""

from __future__ import annotations

import asyncio
from typing import Final

from paddock.v1 import model_manager_pb2 as pb

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""A message that is as large takes no further event. The last one may be about as large again: together well
under gRPC's 4 MiB."""


class Outbox:
    """Joins what many tasks put into the next message of one reader.

    Bounded, however slow the reader: a message holds at most one event of each generation and about
    `MAX_MESSAGE_BYTES`; who has more to put waits. What a generation makes meanwhile is merged where it
    arrives, at the worker's connection.
    """

    def __init__(self) -> None:
        self._message = pb.GenerateManyResponse()
        self._numbers: set[int] = set()
        self._size = 0
        self._taken = asyncio.Event()
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    async def put(self, number: int, event: pb.GenerateResponse | pb.GenerationError) -> None:
        """Add the next event of a generation, as soon as there is room."""
        while number in self._numbers or self._size >= MAX_MESSAGE_BYTES:
            await self._taken.wait()
        if isinstance(event, pb.GenerateResponse):
            self._message.events.add(number=number, response=event)
        else:
            self._message.events.add(number=number, failed=event)
        self._numbers.add(number)
        self._size += event.ByteSize()
        self._wake()

    async def take(self) -> pb.GenerateManyResponse | None:
        """Return everything put since the last call, waiting for the first of it; None once closed and empty.

        For one reader.
        """
        while not self._numbers:
            if self._closed:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message, self._message = self._message, pb.GenerateManyResponse()
        self._numbers.clear()
        self._size = 0
        # Only those wait now who found no room in this message; the next event is for the next one.
        self._taken.set()
        self._taken.clear()
        return message

    def close(self) -> None:
        """Have the reader end once it has taken what there is."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
