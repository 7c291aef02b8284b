"""Many generations over one stream: the server's side of `GenerateMany`.

Every generation has a task of its own, which iterates the service's generator as the plain RPC does. What the
tasks have for the caller goes through an `Outbox`; the stream itself is its only reader. An engine step wakes
all tasks in one pass of the event loop and the first of them wakes the stream for the next, so whatever a
step made leaves in one message.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import Reason, make_error
from paddock.status import to_generation_error
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc import validate
from paddock_server.rpc.calls import request_id_of, watched_call
from paddock_server.rpc.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable

    from paddock.api import ModelManagerApi

MAX_GENERATIONS: Final = 4096
"""Generations one stream may run at a time; further ones are refused."""

STOP_SECONDS: Final = 10.0
"""How long what ran on a stream that has ended gets to clean up. It only ever needs a moment."""


class GenerationStreams:
    """The `GenerateMany` streams of a server."""

    def __init__(self, service: ModelManagerApi, *, max_generations: int = MAX_GENERATIONS) -> None:
        self._service = service
        self._max_generations = max_generations
        self._streams: set[GenerationStream] = set()
        self._draining = False

    async def serve(
        self, requests: AsyncIterable[pb.GenerateManyRequest]
    ) -> AsyncGenerator[pb.GenerateManyResponse]:
        """Serve one stream until its caller ends it. Closing stops everything that runs on it.

        Raises:
            PaddockError: INVALID_FIELD a command that makes no sense; SHUTTING_DOWN after `drain`.
        """
        stream = GenerationStream(self._service, self._max_generations)
        self._streams.add(stream)
        if self._draining:
            stream.drain()
        try:
            async with aclosing(stream.run(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """End every stream, now and later, as soon as nothing runs on it."""
        self._draining = True
        for stream in self._streams:
            stream.drain()


class _Generation:
    """A generation that runs on a stream, and how many responses of it the caller takes."""

    def __init__(self, number: int, start: pb.StartGeneration) -> None:
        self.number = number
        self.request_id = request_id_of(start.request_id)
        self.task: asyncio.Task[None] | None = None
        self._credit = start.credit
        self._granted = asyncio.Event()

    def grant(self, credit: int) -> None:
        """Add to the credit."""
        self._credit += credit
        self._granted.set()

    async def spend(self) -> None:
        """Take one from the credit, as soon as there is one."""
        while self._credit == 0:
            self._granted.clear()
            await self._granted.wait()
        self._credit -= 1


class GenerationStream:
    """One stream. Its reader task carries out commands; `run` sends what comes of them."""

    def __init__(self, service: ModelManagerApi, max_generations: int) -> None:
        self._service = service
        self._max_generations = max_generations
        self._outbox = Outbox()
        self._running: dict[int, _Generation] = {}
        self._last_number = 0
        self._start_count = 0
        self._draining = False
        self._ended = False
        self._error: BaseException | None = None

    async def run(
        self, requests: AsyncIterable[pb.GenerateManyRequest]
    ) -> AsyncGenerator[pb.GenerateManyResponse]:
        """Carry out the caller's commands and give what to send. Raises what ended the stream."""
        reader = asyncio.create_task(self._read(requests), name="generation-stream")
        reader.add_done_callback(self._on_read)
        try:
            while (message := await self._outbox.take()) is not None:
                yield message
            if self._error is not None:
                raise self._error
        finally:
            await self._stop(reader)

    def drain(self) -> None:
        """End the stream as soon as nothing runs on it, at once when nothing does."""
        self._draining = True
        self._end_if_drained()

    async def _read(self, requests: AsyncIterable[pb.GenerateManyRequest]) -> None:
        async for message in requests:
            for command in message.commands:
                validate.generation_command(command, self._last_number)
                await self._carry_out(command)

    async def _carry_out(self, command: pb.GenerationCommand) -> None:
        if command.WhichOneof("command") == "start":
            self._last_number = command.number
            self._start_count += 1
            await self._start(_Generation(command.number, command.start), command.start.request)
            return
        generation = self._running.get(command.number)
        if generation is None:
            return  # It has ended, and the caller could not know yet.
        if command.WhichOneof("command") == "grant":
            generation.grant(command.grant.credit)
        elif generation.task is not None and not generation.task.cancelling():
            generation.task.cancel()

    async def _start(self, generation: _Generation, request: pb.GenerateRequest) -> None:
        if len(self._running) >= self._max_generations:
            # Not in a task of its own: a caller that starts too many waits until it has read that.
            await self._serve(generation, _refuse(request, self._max_generations))
            return
        self._running[generation.number] = generation
        generation.task = asyncio.create_task(self._serve(generation, self._service.generate(request)))
        generation.task.add_done_callback(lambda task: self._on_served(generation, task))

    async def _serve(self, generation: _Generation, responses: AsyncGenerator[pb.GenerateResponse]) -> None:
        """Hand on the responses of one generation, and its failure."""
        async with watched_call("Generate", generation.request_id) as call, aclosing(responses):
            response: pb.GenerateResponse | None = None
            async for response in responses:
                await generation.spend()
                await self._outbox.put(generation.number, response)
            if response is None or not response.HasField("generated"):
                # The caller would wait for ever: on this stream nothing else tells it of the end.
                raise make_error(Reason.INTERNAL, "The generation ended without a result. This is a bug.")
        if call.error is not None:
            failed = to_generation_error(call.error, request_id=generation.request_id)
            await self._outbox.put(generation.number, failed)

    def _on_read(self, task: asyncio.Task[None]) -> None:
        """The caller will send nothing more, or nothing that can be understood."""
        self._end(None if task.cancelled() else task.exception())

    def _on_served(self, generation: _Generation, task: asyncio.Task[None]) -> None:
        del self._running[generation.number]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)  # A bug in `_serve`: its caller would wait for ever.
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._draining and not self._running:
            self._end(make_error(Reason.SHUTTING_DOWN, "The server is shutting down."))

    def _end(self, error: BaseException | None) -> None:
        """Have `run` give what there still is to send and then end, with the first error."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._outbox.close()

    async def _stop(self, reader: asyncio.Task[None]) -> None:
        """Stop everything the stream has running."""
        structlog.contextvars.bind_contextvars(generation_count=self._start_count)
        tasks = {reader, *(one.task for one in self._running.values() if one.task is not None)}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_SECONDS)


async def _refuse(request: pb.GenerateRequest, limit: int) -> AsyncGenerator[pb.GenerateResponse]:
    structlog.contextvars.bind_contextvars(model=request.model)
    raise make_error(
        Reason.QUEUE_FULL,
        f"The stream runs {limit} generations already, the most one may run.",
        metadata={"model": request.model},
    )
    yield pb.GenerateResponse()  # pyright: ignore[reportUnreachable]  # makes this a generator
