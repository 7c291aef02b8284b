"""A `GenerateMany` stream by hand: every command and every event as it is on the wire."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_manager_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import grpc.aio

GIVE_UP_SECONDS: Final = 20.0
"""Only a way out."""


def start(
    number: int, request: pb.GenerateRequest, *, credit: int = 1_000_000, request_id: str = ""
) -> pb.GenerationCommand:
    begin = pb.StartGeneration(request=request, credit=credit, request_id=request_id)
    return pb.GenerationCommand(number=number, start=begin)


def grant(number: int, credit: int) -> pb.GenerationCommand:
    return pb.GenerationCommand(number=number, grant=pb.GrantCredit(credit=credit))


def cancel(number: int) -> pb.GenerationCommand:
    return pb.GenerationCommand(number=number, cancel=pb.CancelGeneration())


class RawStream:
    """The caller's end. Reads only when told to, so a test can be a slow reader."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.messages: list[pb.GenerateManyResponse] = []
        self.events: defaultdict[int, list[pb.GenerationEvent]] = defaultdict(list)
        self.ended: set[int] = set()

    async def send(self, *commands: pb.GenerationCommand) -> None:
        """Write commands, in one message."""
        await self.call.write(pb.GenerateManyRequest(commands=commands))

    async def read_until(self, holds: Callable[[], bool]) -> None:
        """Read messages until a condition holds. Raises the status when the stream ends before."""
        async with asyncio.timeout(GIVE_UP_SECONDS):
            while not holds():
                message = await self.call.read()
                assert message, "the server ended the stream"
                self.messages.append(message)
                for event in message.events:
                    self.events[event.number].append(event)
                    if event.HasField("failed") or event.response.HasField("generated"):
                        self.ended.add(event.number)

    async def read_to_end_of(self, *numbers: int) -> None:
        """Read until these generations have ended."""
        await self.read_until(lambda: all(number in self.ended for number in numbers))

    def kinds(self, number: int) -> list[str]:
        """Return the kinds of a generation's events, repeated ones once."""
        kinds: list[str] = []
        for event in self.events[number]:
            kind = "failed" if event.HasField("failed") else event.response.WhichOneof("event") or ""
            if kinds[-1:] != [kind]:
                kinds.append(kind)
        return kinds

    def tokens(self, number: int) -> int:
        """Return the tokens of a generation read so far."""
        return sum(
            delta.token_count for event in self.events[number] for delta in event.response.deltas.deltas
        )


@asynccontextmanager
async def raw_stream(channel: grpc.aio.Channel) -> AsyncGenerator[RawStream]:
    """Open a stream; cancel it at the end of the block."""
    call = model_manager_pb2_grpc.ModelManagerStub(channel).GenerateMany()
    try:
        yield RawStream(call)
    finally:
        call.cancel()
