"""The server's side of `GenerateMany` without gRPC: the outbox, and streams over a service made up here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc.multiplex import GenerationStreams
from paddock_server.rpc.outbox import MAX_MESSAGE_BYTES, Outbox
from tests.fakes.raw_stream import cancel, start

Behaviour = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse]]

STARTED = pb.GenerateResponse(started=pb.Started(generation_id="g"))
GENERATED = pb.GenerateResponse(generated=pb.Generated())


def text(size: int = 1) -> pb.GenerateResponse:
    return pb.GenerateResponse(deltas=pb.Deltas(deltas=[gen.Delta(text="x" * size, token_count=1)]))


async def settle() -> None:
    """Let every task run as far as it gets."""
    for _ in range(20):
        await asyncio.sleep(0)


class Service:
    """Generates as it is told, and knows how far each generation got, by the model it names."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.made: dict[str, int] = {}
        self.closed: list[str] = []

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        try:
            async with aclosing(self.behaviour(request)) as responses:
                async for response in responses:
                    self.made[request.model] = self.made.get(request.model, 0) + 1
                    yield response
        finally:
            self.closed.append(request.model)


class Caller:
    """The other end of a stream: sends commands, reads when told to."""

    def __init__(self, behaviour: Behaviour, **options: Any) -> None:
        self.service = Service(behaviour)
        untyped: Any = self.service
        self.streams = GenerationStreams(untyped, **options)
        self._commands: asyncio.Queue[pb.GenerateManyRequest | None] = asyncio.Queue()
        self.messages = self.streams.serve(self._requests())
        self.events: list[pb.GenerationEvent] = []

    def send(self, *commands: pb.GenerationCommand) -> None:
        self._commands.put_nowait(pb.GenerateManyRequest(commands=commands))

    def half_close(self) -> None:
        self._commands.put_nowait(None)

    async def read(self, count: int = 1) -> None:
        """Read until there are so many events in all."""
        while len(self.events) < count:
            self.events += (await anext(self.messages)).events

    async def read_to_end(self) -> None:
        """Read until the stream ends."""
        async for message in self.messages:
            self.events += message.events

    async def _requests(self) -> AsyncGenerator[pb.GenerateManyRequest]:
        while (request := await self._commands.get()) is not None:
            yield request


def request(name: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=name)


async def endless(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
    del request
    while True:
        yield text()


async def waiting(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
    del request
    yield STARTED
    await asyncio.Event().wait()


async def well(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
    del request
    for response in (STARTED, text(), GENERATED):
        await asyncio.sleep(0)
        yield response


async def test_the_outbox_joins_what_was_put_since_the_last_message_in_order() -> None:
    outbox = Outbox()
    await outbox.put(2, STARTED)
    await outbox.put(1, text())
    await outbox.put(3, pb.GenerationError(reason="INTERNAL"))
    message = await outbox.take()

    assert message is not None
    assert [(event.number, event.WhichOneof("event")) for event in message.events] == [
        (2, "response"),
        (1, "response"),
        (3, "failed"),
    ]


async def test_the_outbox_holds_one_event_of_each_generation() -> None:
    outbox = Outbox()
    await outbox.put(1, STARTED)
    second = asyncio.create_task(outbox.put(1, text()))
    await outbox.put(2, STARTED)
    await settle()
    assert not second.done()

    await outbox.take()
    await second
    message = await outbox.take()

    assert message is not None
    assert [event.number for event in message.events] == [1]


async def test_a_message_stays_below_what_grpc_clients_take_by_default() -> None:
    outbox = Outbox()
    puts = [asyncio.create_task(outbox.put(number, text(MAX_MESSAGE_BYTES - 100))) for number in range(1, 6)]
    sizes: list[int] = []
    numbers: list[int] = []
    while len(numbers) < len(puts):
        message = await outbox.take()
        assert message is not None
        sizes.append(message.ByteSize())
        numbers += [event.number for event in message.events]

    assert numbers == [1, 2, 3, 4, 5]
    assert max(sizes) < 4 * 1024 * 1024


async def test_a_closed_outbox_gives_what_it_has_and_then_ends() -> None:
    outbox = Outbox()
    await outbox.put(1, STARTED)
    outbox.close()

    assert await outbox.take() is not None
    assert await outbox.take() is None


async def test_a_reader_that_waits_is_told_of_the_end() -> None:
    outbox = Outbox()
    reader = asyncio.create_task(outbox.take())
    await settle()
    outbox.close()

    assert await reader is None


async def test_a_stream_that_is_not_read_makes_its_generations_wait() -> None:
    caller = Caller(endless)
    caller.send(start(1, request("a")), start(2, request("b")))
    async with aclosing(caller.messages):
        await anext(caller.messages)
        await settle()
        first = dict(caller.service.made)
        await settle()

        assert caller.service.made == first
        # One was in the message, one is in the next, one waits to get in.
        assert set(first.values()) == {3}


async def test_one_generation_too_many_is_refused_and_the_others_go_on() -> None:
    caller = Caller(waiting, max_generations=2)
    caller.send(*(start(number, request(str(number))) for number in (1, 2, 3)))
    async with aclosing(caller.messages):
        await caller.read(3)
        caller.send(cancel(1))
        await settle()
        caller.send(start(4, request("4")))
        await caller.read(4)

    failed = {event.number: event.failed.reason for event in caller.events if event.HasField("failed")}
    assert failed == {3: Reason.QUEUE_FULL}
    assert caller.events[-1].number == 4
    assert caller.events[-1].response.HasField("started")


async def test_half_closing_stops_what_runs_and_ends_the_stream() -> None:
    caller = Caller(waiting)
    caller.send(start(1, request("a")), start(2, request("b")))
    await caller.read(2)
    caller.half_close()
    await caller.read_to_end()

    assert sorted(caller.service.closed) == ["a", "b"]


async def test_closing_the_stream_stops_what_runs() -> None:
    caller = Caller(waiting)
    caller.send(start(1, request("a")), start(2, request("b")))
    await caller.read(2)
    await caller.messages.aclose()

    assert sorted(caller.service.closed) == ["a", "b"]


async def test_a_generation_that_ends_without_a_result_fails_instead_of_leaving_its_caller_waiting() -> None:
    async def abrupt(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        del request
        yield STARTED

    caller = Caller(abrupt)
    caller.send(start(1, request("a")))
    async with aclosing(caller.messages):
        await caller.read(2)

    assert caller.events[1].failed.reason == Reason.INTERNAL


async def test_a_bug_in_one_generation_fails_it_alone_and_tells_nothing_but_the_request_id() -> None:
    async def buggy(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        if request.model == "bad":
            raise ZeroDivisionError
        async for response in well(request):
            yield response

    caller = Caller(buggy)
    caller.send(start(1, request("bad"), request_id="r-1"), start(2, request("good")))
    async with aclosing(caller.messages):
        await caller.read(4)

    (failed,) = (event.failed for event in caller.events if event.HasField("failed"))
    assert caller.events[-1].response.HasField("generated")
    assert failed.reason == Reason.INTERNAL
    assert "r-1" in failed.message
    assert "ZeroDivision" not in failed.message


async def test_draining_ends_a_stream_once_nothing_runs_on_it() -> None:
    caller = Caller(well)
    caller.send(start(1, request("a")))
    await caller.read()
    caller.streams.drain()
    with pytest.raises(PaddockError) as caught:
        await caller.read_to_end()

    assert caught.value.reason == Reason.SHUTTING_DOWN
    assert caller.events[-1].response.HasField("generated")


async def test_a_stream_opened_while_draining_is_refused() -> None:
    caller = Caller(well)
    caller.streams.drain()

    with pytest.raises(PaddockError) as caught:
        await caller.read_to_end()
    assert caught.value.reason == Reason.SHUTTING_DOWN
