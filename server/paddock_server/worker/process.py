"""The worker's threads and what each may do.

main      reads frames and hands them on; stays interruptible, so that SIGTERM ends the process at once
engine    loads the model, then computes: `schedule -> decode -> sample -> publish`; frees it to sleep
prepare   renders and tokenizes requests to generate, in the order they came
answer    tokenizes for everyone else, so that a long text holds up no generation
heartbeat says every two seconds that the process lives, also while everything else computes
"""

from __future__ import annotations

import ctypes
import gc
import queue
import signal
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Final

from paddock_server.worker.calls import WaitingCalls
from paddock_server.worker.engine import CancelCallCommand, CancelCommand, Engine, SleepCommand
from paddock_server.worker.errors import Reason, WorkerError
from paddock_server.worker.loading import load_model
from paddock_server.worker.requests import Preparer
from paddock_server.worker.stopwatch import Stopwatch
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from paddock_server.worker.connection import Connection
    from paddock_server.worker.logs import NativeLog

HEARTBEAT_SECONDS: Final = 2.0

MOST_REPLY_BYTES: Final = 4 * 1024 * 1024 - 4096
"""Longest answer: what every gRPC client takes by default, less its envelope."""

TOKENIZER_STACK_BYTES: Final = 256 * 1024 * 1024
"""Stack of the threads that tokenize. Some pre-tokenizers recurse for every character of a run without a
break; pages that are never touched cost nothing."""


class ProtocolError(Exception):
    """The server sent something the protocol has no place for."""


class WorkerProcess:
    """Everything a worker does once it is connected."""

    def __init__(
        self, connection: Connection, log: NativeLog, *, exit_process: Callable[[int], None]
    ) -> None:
        """Make a worker; `serve` starts it.

        Args:
            connection: The socket to the server.
            log: Where llama.cpp's log goes.
            exit_process: Ends the process at once with an exit code; does not return.
        """
        self._connection = connection
        self._log = log
        self._exit = exit_process
        self._loads: queue.SimpleQueue[worker_pb2.Load] = queue.SimpleQueue()
        self._load_allowed = True
        self._load_abort = threading.Event()
        self._engine: Engine | None = None
        self._preparer: Preparer | None = None
        self._most_waiting = 0
        self._starts: queue.SimpleQueue[tuple[worker_pb2.Start, float] | int | None] = queue.SimpleQueue()
        """Requests to prepare, cancels behind them, and None as the last."""
        self._preparing: set[int] = set()
        self._preparation_watch = Stopwatch()
        self._calls = WaitingCalls()

    def serve(self) -> None:
        """Read frames until the server closes the socket. Main thread.

        Raises:
            ProtocolError: The server broke the protocol.
            FrameError: The same, in the framing.
        """
        _start_thread("heartbeat", self._beat)
        _start_thread("engine", self._run_engine)
        for frame in self._connection.receive():
            self._dispatch(frame)

    def _dispatch(self, frame: worker_pb2.ServerFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "start":
            self._start(frame.start)
        elif kind == "cancel":
            self._cancel(frame.cancel.generation)
        elif kind == "call":
            self._call(frame.call)
        elif kind == "cancel_call":
            self._cancel_call(frame.cancel_call.call)
        elif kind == "load" and self._load_allowed:
            self._load_allowed = False
            self._loads.put(frame.load)
        elif kind == "sleep" and self._engine is not None:
            self._load_allowed = True
            self._engine.post(SleepCommand())
        elif kind == "abort_load":
            self._load_abort.set()
        elif kind == "shutdown":
            self._exit(0)
        else:
            text = f"unexpected frame {kind or 'of an unknown kind'}"
            raise ProtocolError(text)

    def _start(self, start: worker_pb2.Start) -> None:
        if self._engine is not None and len(self._preparing) > self._most_waiting:
            error = WorkerError(Reason.QUEUE_FULL, "Too many requests wait to be prepared.")
            self._refuse(start.generation, error)
        else:
            self._preparing.add(start.generation)
            self._starts.put((start, perf_counter()))

    def _cancel(self, generation: int) -> None:
        """Cancel what the engine has at once, and what is still being prepared behind it in the queue."""
        if generation in self._preparing:
            self._starts.put(generation)
        elif self._engine is not None:
            self._engine.cancel(generation)

    def _call(self, call: worker_pb2.Call) -> None:
        if self._engine is not None and len(self._calls) > self._most_waiting:
            error = WorkerError(Reason.QUEUE_FULL, "Too many requests wait to be tokenized.")
            self._reply(worker_pb2.Reply(call=call.call, failed=error.to_failure()))
        else:
            self._calls.put(call)

    def _cancel_call(self, number: int) -> None:
        """Drop a call that waits to be answered; else the engine may have it."""
        if not self._calls.cancel(number) and self._engine is not None:
            self._engine.post(CancelCallCommand(number))

    def _run_engine(self) -> None:
        """Body of the engine thread."""
        while True:
            self._load_and_compute(self._loads.get())
            self._connection.send(worker_pb2.WorkerFrame(slept=worker_pb2.Slept()))

    def _load_and_compute(self, request: worker_pb2.Load) -> None:
        """Load, serve until the model is put to sleep, and free everything."""
        try:
            loaded = load_model(
                request, log=self._log, report=self._report_progress, aborted=self._load_abort.is_set
            )
        except WorkerError as error:
            self._connection.send(worker_pb2.WorkerFrame(load_failed=error.to_failure()))
            self._exit(0)
            return
        with loaded:
            preparer = self._preparer = Preparer(loaded)
            self._most_waiting = loaded.slot_count + loaded.queue_limit
            engine = self._engine = Engine(loaded, send=self._connection.send)
            ready = loaded.to_ready(has_chat_template=preparer.has_chat_template)
            self._connection.send(worker_pb2.WorkerFrame(ready=ready))
            threading.stack_size(TOKENIZER_STACK_BYTES)
            helpers = (
                _start_thread("prepare", self._prepare, engine, preparer),
                _start_thread("answer", self._answer, engine, preparer),
            )
            threading.stack_size(0)
            engine.run()
            # Nothing runs any more, so both threads wait for work and leave at once.
            self._starts.put(None)
            self._calls.close()
            for helper in helpers:
                helper.join()
            self._engine = self._preparer = None
            self._calls = WaitingCalls()
            engine.close()
        give_memory_back()

    def _report_progress(self, stage: worker_pb2.LoadStage.ValueType, fraction: float) -> None:
        progress = worker_pb2.LoadProgress(stage=stage, fraction=fraction)
        self._connection.send(worker_pb2.WorkerFrame(load_progress=progress))

    def _prepare(self, engine: Engine, preparer: Preparer) -> None:
        """Body of the prepare thread."""
        while True:
            item = self._starts.get()
            if item is None:
                return
            if isinstance(item, int):
                engine.post(CancelCommand(item))
                continue
            start, received_at = item
            self._preparation_watch.start()
            try:
                prepared = preparer.generation(start.generation, start.request, received_at=received_at)
            except WorkerError as error:
                self._refuse(start.generation, error)
            else:
                engine.post(prepared)
            self._preparation_watch.stop()
            self._preparing.discard(start.generation)

    def _answer(self, engine: Engine, preparer: Preparer) -> None:
        """Body of the answer thread."""
        while True:
            call = self._calls.take()
            if call is None:
                return
            try:
                if call.HasField("embed"):
                    engine.post(preparer.embedding(call.call, call.embed))
                    reply = None
                else:
                    reply = _checked(preparer.answer(call))
            except WorkerError as error:
                reply = worker_pb2.Reply(call=call.call, failed=error.to_failure())
            if not self._calls.finish():
                engine.post(CancelCallCommand(call.call))  # behind the job, which may be there already
            elif reply is not None:
                self._reply(reply)

    def _reply(self, reply: worker_pb2.Reply) -> None:
        self._connection.send(worker_pb2.WorkerFrame(reply=reply))

    def _refuse(self, generation: int, error: WorkerError) -> None:
        """Answer a generation that the engine never saw."""
        update = worker_pb2.GenerationUpdate(generation=generation, failed=error.to_failure())
        self._connection.send(worker_pb2.WorkerFrame(step=worker_pb2.Step(updates=[update])))

    def _beat(self) -> None:
        """Body of the heartbeat thread."""
        never = threading.Event()
        while not never.wait(HEARTBEAT_SECONDS):
            self._connection.send(worker_pb2.WorkerFrame(heartbeat=self._heartbeat()))

    def _heartbeat(self) -> worker_pb2.Heartbeat:
        engine = self._engine
        if engine is None:
            return worker_pb2.Heartbeat()
        stats = engine.stats
        return worker_pb2.Heartbeat(
            active_sequence_count=stats.active_sequences,
            queued_request_count=stats.queued_requests,
            kv_cache_used_tokens=stats.used_cells,
            step_count=stats.steps,
            step_milliseconds=engine.step_milliseconds,
            preparation_milliseconds=self._preparation_watch.milliseconds,
        )


def _checked(reply: worker_pb2.Reply) -> worker_pb2.Reply:
    """Return the answer if it is short enough to be sent; else raises WorkerError."""
    if reply.ByteSize() > MOST_REPLY_BYTES:
        text = f"The answer of {reply.ByteSize()} bytes is too long; ask in parts."
        raise WorkerError(Reason.INVALID_FIELD, text, field="text")
    return reply


def _start_thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    """Start a thread that never takes SIGTERM: it must interrupt the main thread, which handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def give_memory_back() -> None:
    """Return what the C library keeps for later to the system, where it can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
