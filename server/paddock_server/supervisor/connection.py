"""The server's end of a worker's socket: frames in, each handed to whom its number belongs; frames out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from google.protobuf.message import DecodeError

from paddock.errors import PaddockError, Reason, make_error
from paddock.sizes import size_text
from paddock_server.supervisor.failures import error_of_failure
from paddock_server.supervisor.loading import LoadInbox
from paddock_server.worker.framing import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    FrameDecoder,
    FrameError,
    encode_frame,
)
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from paddock_server.supervisor.generation import Generation

MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
"""What may wait to be read by a worker that does not read, before further requests are refused."""


class ProtocolError(Exception):
    """A worker sent what the protocol does not allow. The message goes after `because`: `it sent two
    hellos`."""


class Connection(asyncio.Protocol):
    """One worker's socket. Owns the numbers of generations and calls, and what waits for them.

    The worker is not trusted: a frame that breaks the protocol ends the connection, and `closed` says why.
    """

    def __init__(self, *, model_id: str, instance_id: str) -> None:
        loop = asyncio.get_running_loop()
        self.hello: asyncio.Future[worker_pb2.Hello] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        """Resolves at the end of the connection: empty at the end of the stream, else what the worker did
        wrong."""
        self.heartbeat: worker_pb2.Heartbeat | None = None
        self.frame_count = 0
        self.last_frame_time = loop.time()
        self._loop = loop
        self._model_id = model_id
        self._instance_id = instance_id
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._load: LoadInbox | None = None
        self._slept: asyncio.Future[None] | None = None
        self._generations: dict[int, Generation] = {}
        self._calls: dict[int, asyncio.Future[worker_pb2.Reply]] = {}
        self._last_number = 0
        self._refusal: Callable[[], PaddockError] | None = None

    @property
    def load_has_failed(self) -> bool:
        """Whether the worker reported the failure of its load: it exits by itself then."""
        return self._load is not None and self._load.answered and isinstance(self._load.outcome, PaddockError)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        try:
            for body in self._decoder.feed(data):
                self._receive(worker_pb2.WorkerFrame.FromString(body))
        except ProtocolError as error:
            self._break(str(error))
        except FrameError as error:
            self._break(f"it broke the framing: {error}")
        except DecodeError:
            self._break("it sent a frame that is not a message")

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # a reset is an end like any other: how the process ended says more
        if not self.closed.done():
            self.closed.set_result("")

    # Towards the worker

    def send(self, frame: worker_pb2.ServerFrame) -> None:
        """Send a frame; after the end of the connection, nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(frame))

    def close(self) -> None:
        """Close the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    def start_load(self, request: worker_pb2.Load) -> LoadInbox:
        """Send the load and return where its news arrive."""
        if self._load is not None:
            text = "a worker loads once, and again after it has slept"
            raise RuntimeError(text)
        self._load = LoadInbox(self._model_id)
        if self._refusal is not None:
            self._load.end(self._refusal())
        self.send(worker_pb2.ServerFrame(load=request))
        return self._load

    def abort_load(self) -> None:
        """Ask the worker to give up the load. Without one in progress, nothing."""
        if self._load is not None and self._load.outcome is None and not self._load.aborted:
            self._load.aborted = True
            self._load.changed.set()
            self.send(worker_pb2.ServerFrame(abort_load=worker_pb2.AbortLoad()))

    async def sleep(self) -> None:
        """Have the worker free its model, and wait until it has. Raises `PaddockError`."""
        if self._refusal is not None:
            raise self._refusal()
        self._slept = self._loop.create_future()
        self.send(worker_pb2.ServerFrame(sleep=worker_pb2.Sleep()))
        await self._slept

    def start_generation(self, generation: Generation) -> int:
        """Send a generation's request and return its number. Raises `PaddockError`."""
        number = self._next_number()
        self._send_request(
            worker_pb2.ServerFrame(start=worker_pb2.Start(generation=number, request=generation.request))
        )
        self._generations[number] = generation
        return number

    def leave_generation(self, number: int) -> None:
        """Forget a generation, and cancel it if the worker still runs it."""
        if self._generations.pop(number, None) is not None:
            self.send(worker_pb2.ServerFrame(cancel=worker_pb2.Cancel(generation=number)))

    async def call(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        """Ask a question and wait for its answer; take it back when cancelled before. Raises
        `PaddockError`."""
        number = self._next_number()
        call.call = number
        self._send_request(worker_pb2.ServerFrame(call=call))
        future: asyncio.Future[worker_pb2.Reply] = self._loop.create_future()
        self._calls[number] = future
        try:
            return await future
        finally:
            if self._calls.pop(number, None) is not None:
                self.send(worker_pb2.ServerFrame(cancel_call=worker_pb2.CancelCall(call=number)))

    def fail_all(
        self, make: Callable[[], PaddockError], *, load: Callable[[], PaddockError] | None = None
    ) -> None:
        """End all that runs with an error of its own, and refuse what comes later in the same way.

        `load` makes another error for the load in progress.
        """
        self._refusal = make
        if self._load is not None:
            self._load.end((load or make)())
        for generation in self._generations.values():
            generation.fail(make())
        self._generations.clear()
        for future in (*self._calls.values(), *([self._slept] if self._slept is not None else ())):
            if not future.done():
                future.set_exception(make())
        self._calls.clear()

    # From the worker

    def _receive(self, frame: worker_pb2.WorkerFrame) -> None:
        self.frame_count += 1
        self.last_frame_time = self._loop.time()
        kind = frame.WhichOneof("frame")
        if kind is None:
            text = "it sent an empty frame"
            raise ProtocolError(text)
        if self.hello.done() == (kind == "hello"):
            text = "it sent a second hello" if kind == "hello" else f"it sent {kind} before its hello"
            raise ProtocolError(text)
        match kind:
            case "step":
                for update in frame.step.updates:
                    self._on_update(update)
            case "heartbeat":
                self.heartbeat = frame.heartbeat
            case "reply":
                self._on_reply(frame.reply)
            case "load_progress":
                inbox = self._loading(kind)
                inbox.progress.append(frame.load_progress)
                inbox.changed.set()
            case "ready":
                self._on_loaded(kind, frame.ready)
            case "load_failed":
                self._on_loaded(kind, error_of_failure(frame.load_failed, model_id=self._model_id))
            case "slept":
                self._on_slept()
            case "hello":
                self._on_hello(frame.hello)

    def _on_hello(self, hello: worker_pb2.Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            text = f"it speaks version {hello.protocol_version} of the protocol, not {PROTOCOL_VERSION}"
            raise ProtocolError(text)
        if hello.instance_id != self._instance_id:
            text = f"it calls itself {hello.instance_id!r}, not {self._instance_id!r}"
            raise ProtocolError(text)
        self.hello.set_result(hello)

    def _loading(self, kind: str) -> LoadInbox:
        if self._load is None or self._load.answered:
            text = f"it sent {kind} without a load in progress"
            raise ProtocolError(text)
        return self._load

    def _on_loaded(self, kind: str, outcome: worker_pb2.Ready | PaddockError) -> None:
        inbox = self._loading(kind)
        inbox.answered = True
        inbox.end(outcome)

    def _on_slept(self) -> None:
        if self._slept is None or self._slept.done():
            text = "it fell asleep by itself"
            raise ProtocolError(text)
        self._load = None
        self._slept.set_result(None)

    def _on_update(self, update: worker_pb2.GenerationUpdate) -> None:
        number = update.generation
        generation = self._generations.get(number)
        if generation is None:
            self._check_number("generation", number)
            return  # left meanwhile
        if update.HasField("failed"):
            error = error_of_failure(update.failed, model_id=self._model_id)
            update.ClearField("failed")
            if update.HasField("started") or update.HasField("deltas"):
                generation.push(update)
            generation.fail(error)
        else:
            generation.push(update)
        if generation.ended:
            del self._generations[number]

    def _on_reply(self, reply: worker_pb2.Reply) -> None:
        future = self._calls.pop(reply.call, None)
        if future is None:
            self._check_number("call", reply.call)
        elif not future.done():
            if reply.HasField("failed"):
                future.set_exception(error_of_failure(reply.failed, model_id=self._model_id))
            else:
                future.set_result(reply)

    def _check_number(self, what: str, number: int) -> None:
        """Accept a number that was in use once: its owner may have left before the worker knew."""
        if not 0 < number <= self._last_number:
            text = f"it spoke of {what} {number}, which there never was"
            raise ProtocolError(text)

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _send_request(self, frame: worker_pb2.ServerFrame) -> None:
        if self._refusal is not None:
            raise self._refusal()
        if self._transport is not None and self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            message = f"The worker of model {self._model_id!r} does not take requests at the moment."
            raise make_error(Reason.QUEUE_FULL, message, metadata={"model": self._model_id})
        try:
            self.send(frame)
        except FrameError as error:
            message = f"The request is too large for a worker; {size_text(MAX_FRAME_BYTES)} is the most."
            raise make_error(Reason.INVALID_FIELD, message, metadata={"model": self._model_id}) from error

    def _break(self, what: str) -> None:
        """Read no more. The socket stays open until the worker is dead: it would take its end for a stop."""
        if not self.closed.done():
            self.closed.set_result(what)
            if self._transport is not None:
                self._transport.pause_reading()
