"""`ModelManagerApi` over a channel, with all generations on one stream: for a gateway in its own process.

A gRPC message per token and generation costs several times what one per engine step does, so `generate` goes
over `GenerateMany`. Everything else is `GrpcApi`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Self
from uuid import uuid4

import grpc
import grpc.aio

from paddock.api import request_id
from paddock.errors import PaddockError, Reason, make_error
from paddock.status import from_generation_error, from_rpc_error
from paddock.transport import REQUEST_ID_KEY, GrpcApi
from paddock.v1 import model_manager_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import TracebackType

MAX_SHARED_REQUEST_BYTES: Final = 1024 * 1024
"""A larger request (images, mostly) has a stream of its own: it would hold up what others have to say."""

MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
"""A message that is as large takes no further command; the server takes twice that."""

CREDIT: Final = 64
"""Responses of a generation that may be under way or waiting for their reader. At a token each it covers a
round trip of a third of a second at 200 tokens a second; a shorter reach costs nothing but granularity."""

GRANT: Final = CREDIT // 2
"""Responses taken before that many more are granted."""

CLOSE_SECONDS: Final = 5.0
"""How long a cancelled stream gets to end."""


class MultiplexedApi(GrpcApi):
    """`GrpcApi` whose generations share one stream, opened on first use and again after it has broken.

    Use it with `async with`, or `close` it: the stream is open until then. Generations in flight when the
    stream breaks raise what ended it, SERVER_UNREACHABLE where the connection did. A server that does not
    know `GenerateMany` gets plain `Generate` calls from then on.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self._stream: _Stream | None = None
        self._supported = True
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream; generations in flight raise CANCELLED. The channel stays the caller's to close."""
        self._closed = True
        if self._stream is not None:
            await self._stream.close()

    def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """Generate: `started prompt_progress* deltas* generated`. Closing stops the generation."""
        if not self._supported or request.ByteSize() > MAX_SHARED_REQUEST_BYTES:
            return super().generate(request)
        return self._generate(request)

    async def _generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        generation = self._open_stream().start(request, request_id.get() or uuid4().hex)
        try:
            while (response := await generation.next()) is not None:
                yield response
            return
        except _UnsupportedError:
            self._supported = False
        finally:
            generation.leave()
        async with aclosing(super().generate(request)) as responses:
            async for response in responses:
                yield response

    def _open_stream(self) -> _Stream:
        if self._closed:
            raise _closed()
        if self._stream is None or self._stream.ended:
            self._stream = _Stream(self._stub.GenerateMany)
        return self._stream


class _UnsupportedError(Exception):
    """The server does not know `GenerateMany`."""


class _Stream:
    """One `GenerateMany` call, with a task that reads and one that writes. Lives until the call ends."""

    def __init__(
        self,
        open_call: grpc.aio.StreamStreamMultiCallable[pb.GenerateManyRequest, pb.GenerateManyResponse],
    ) -> None:
        self.ended = False
        """Whether nothing can be started on it any more."""
        self._call = open_call(metadata=grpc.aio.Metadata((REQUEST_ID_KEY, uuid4().hex)))
        self._generations: dict[int, _Generation] = {}
        self._last_number = 0
        self._commands: deque[pb.GenerationCommand] = deque()
        self._writer: asyncio.Future[None] | None = None
        self._writing = asyncio.create_task(self._write(), name="generation-stream-write")
        self._reading = asyncio.create_task(self._read(), name="generation-stream-read")
        self._reading.add_done_callback(self._on_read)

    def start(self, request: pb.GenerateRequest, request_id: str) -> _Generation:
        """Begin a generation."""
        self._last_number += 1
        generation = _Generation(self, self._last_number, request_id)
        self._generations[generation.number] = generation
        start = pb.StartGeneration(request=request, request_id=request_id, credit=CREDIT)
        self.send(pb.GenerationCommand(number=generation.number, start=start))
        return generation

    def send(self, command: pb.GenerationCommand) -> None:
        """Have a command written with whatever else there is; after the end of the stream, nothing."""
        if not self.ended:
            self._commands.append(command)
            self._wake_writer()

    def leave(self, generation: _Generation) -> None:
        """Forget a generation, and cancel it if the server still runs it."""
        if self._generations.pop(generation.number, None) is not None:
            self.send(pb.GenerationCommand(number=generation.number, cancel=pb.CancelGeneration()))

    async def close(self) -> None:
        """Cancel the call and wait until its tasks have ended."""
        self._reading.cancel()
        await asyncio.wait({self._reading, self._writing}, timeout=CLOSE_SECONDS)

    async def _read(self) -> None:
        async for message in self._call:
            for event in message.events:
                self._receive(event)

    def _on_read(self, task: asyncio.Task[None]) -> None:
        """The call has ended: tell whoever still waits for something."""
        self.ended = True
        self._call.cancel()
        self._writing.cancel()
        raised = None if task.cancelled() else task.exception()
        generations = list(self._generations.values())
        self._generations.clear()
        for generation in generations:
            generation.fail(_why_ended(raised, cancelled=task.cancelled(), request_id=generation.request_id))

    def _receive(self, event: pb.GenerationEvent) -> None:
        generation = self._generations.get(event.number)
        if generation is None:
            return  # It was left meanwhile.
        match event.WhichOneof("event"):
            case "response":
                generation.push(event.response)
            case "failed":
                generation.fail(from_generation_error(event.failed))
            case _:
                return  # A kind this client does not know.
        if generation.ended:
            del self._generations[event.number]

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._next_message())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The call has ended; the reader learns why.
        finally:
            # Without a writer the stream is of no use: whatever ended this one, the reader ends too.
            self._call.cancel()

    async def _next_message(self) -> pb.GenerateManyRequest:
        while not self._commands:
            self._writer = asyncio.get_running_loop().create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        message = pb.GenerateManyRequest()
        size = 0
        while self._commands and size < MAX_MESSAGE_BYTES:
            command = self._commands.popleft()
            size += command.ByteSize()
            message.commands.append(command)
        return message

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)


class _Generation:
    """A generation on a stream as its one reader sees it."""

    def __init__(self, stream: _Stream, number: int, request_id: str) -> None:
        self.number = number
        self.ended = False
        """Whether nothing more can come from the server."""
        self._stream = stream
        self.request_id = request_id
        self._pending: deque[pb.GenerateResponse] = deque()
        self._taken = 0
        self._error: PaddockError | _UnsupportedError | None = None
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> pb.GenerateResponse | None:
        """Return the next response, None after the last; everything that came is given before an error."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self.ended:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        self._taken += 1
        if self._taken == GRANT and not self.ended:
            self._taken = 0
            self._stream.send(pb.GenerationCommand(number=self.number, grant=pb.GrantCredit(credit=GRANT)))
        return self._pending.popleft()

    def push(self, response: pb.GenerateResponse) -> None:
        """Take a response from the stream."""
        if self._pending:
            # The reader is behind. A part keeps its whole message in memory, all the other generations' news
            # included, so what may wait for long is copied out of it.
            copy = pb.GenerateResponse()
            copy.CopyFrom(response)
            response = copy
        self._pending.append(response)
        self.ended = response.HasField("generated")
        self._wake()

    def fail(self, error: PaddockError | _UnsupportedError) -> None:
        """End the generation with an error, raised once everything pushed has been read."""
        self.ended = True
        self._error = error
        self._wake()

    def leave(self) -> None:
        """Stop the generation unless it has ended."""
        self._stream.leave(self)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _why_ended(
    raised: BaseException | None, *, cancelled: bool, request_id: str
) -> PaddockError | _UnsupportedError:
    """Return what a generation raises when its stream has ended before it."""
    if isinstance(raised, grpc.aio.AioRpcError):
        if raised.code() is grpc.StatusCode.UNIMPLEMENTED:
            return _UnsupportedError()
        error = from_rpc_error(raised)
    elif cancelled:
        error = _closed()
    elif raised is None:
        error = make_error(Reason.SERVER_UNREACHABLE, "The server ended the stream of generations.")
    else:
        error = make_error(
            Reason.INTERNAL, f"A bug in the client ended the stream of generations: {raised!r}"
        )
    error.request_id = request_id
    return error


def _closed() -> PaddockError:
    return make_error(Reason.CANCELLED, "The connection to the server was closed by its owner.")
