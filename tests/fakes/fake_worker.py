"""A worker process for tests: the real protocol on the real socket, no model, and every vice on request.

Run as the real one: `python -m tests.fakes.fake_worker --fd N --instance-id ID --parent-pid PID`. How it
behaves is said by `tests.fakes.behaviour`. One thread: it waits for the socket until the next thing is due.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from paddock_server.worker.framing import MAX_FRAME_BYTES, PROTOCOL_VERSION, FrameDecoder, encode_frame
from paddock_server.worker.v1 import worker_pb2
from tests.fakes.behaviour import behaviour_of_environment, sidecar_of
from tests.fakes.fake_engine import FakeEngine, answer

if TYPE_CHECKING:
    from tests.fakes.behaviour import Behaviour

GRANDCHILD_SECONDS: Final = 60


class FakeWorker:
    """The loop: frames in, and what is due: heartbeats, progress, steps."""

    def __init__(self, connection: socket.socket, instance_id: str, behaviour: Behaviour) -> None:
        self._socket = connection
        self._instance_id = instance_id
        self._behaviour = behaviour
        self._decoder = FrameDecoder()
        self._heartbeat_due = time.monotonic() + behaviour.heartbeat_seconds
        self._load: worker_pb2.Load | None = None
        self._load_start = 0.0
        self._load_steps_done = 0
        self._load_hangs = False
        self._engine: FakeEngine | None = None
        self._step_due = 0.0
        self._fault_done = False

    def run(self) -> NoReturn:
        """Say hello and serve until told otherwise."""
        if self._behaviour.die_in_handshake:
            self._crash()
        if self._behaviour.hang_in_handshake:
            self._live_on()
        self._send(
            worker_pb2.WorkerFrame(
                hello=worker_pb2.Hello(
                    protocol_version=PROTOCOL_VERSION + self._behaviour.wrong_version,
                    instance_id="somebody else" if self._behaviour.wrong_instance_id else self._instance_id,
                    pid=os.getpid(),
                    engine="fake 1",
                )
            )
        )
        while True:
            readable, _, _ = select.select([self._socket], [], [], self._wait_seconds())
            if readable:
                self._read()
            self._do_what_is_due()

    def _wait_seconds(self) -> float | None:
        due: list[float] = []
        if self._behaviour.heartbeat_seconds:
            due.append(self._heartbeat_due)
        if self._load is not None and not self._load_hangs:
            due.append(self._load_step_due())
        if self._engine is not None and self._engine.has_work:
            due.append(self._step_due)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _read(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            os._exit(0)
        for body in self._decoder.feed(data):
            self._on_frame(worker_pb2.ServerFrame.FromString(body))

    def _on_frame(self, frame: worker_pb2.ServerFrame) -> None:
        match frame.WhichOneof("frame"):
            case "load":
                self._on_load(frame.load)
            case "abort_load":
                if self._load is not None and not self._behaviour.ignore_abort:
                    self._fail_load("LOAD_ABORTED", "The load was aborted.")
            case "start":
                self._running().start(frame.start)
            case "cancel":
                self._running().cancel(frame.cancel.generation)
                log(f"cancelled {frame.cancel.generation}")
            case "call":
                self._send(worker_pb2.WorkerFrame(reply=answer(frame.call)))
            case "cancel_call":
                log(f"cancelled call {frame.cancel_call.call}")
            case "sleep":
                self._sleep()
            case "shutdown":
                log("shutdown")
                if not self._behaviour.hang_on_shutdown:
                    os._exit(0)
            case None:
                message = "the server sent an empty frame"
                raise ValueError(message)

    def _sleep(self) -> None:
        assert not self._running().has_work, "a sleep while something runs"
        log("asleep")
        if self._behaviour.hang_in_sleep:
            return
        self._engine = None
        self._load_steps_done = 0
        self._send(worker_pb2.WorkerFrame(slept=worker_pb2.Slept()))

    def _running(self) -> FakeEngine:
        assert self._engine is not None, "a request before ready"
        return self._engine

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._behaviour.heartbeat_seconds and now >= self._heartbeat_due:
            self._heartbeat_due = now + self._behaviour.heartbeat_seconds
            beat = self._engine.heartbeat() if self._engine else worker_pb2.Heartbeat()
            self._send(worker_pb2.WorkerFrame(heartbeat=beat))
        if self._load is not None and not self._load_hangs and now >= self._load_step_due():
            self._advance_load(self._load)
        if self._engine is not None and self._engine.has_work and now >= self._step_due:
            self._step(self._engine, now)

    # Load

    def _on_load(self, load: worker_pb2.Load) -> None:
        sidecar = sidecar_of(Path(load.model_path))
        if sidecar.is_file():
            self._behaviour = self._behaviour.updated(sidecar.read_text())
        for line in self._behaviour.stderr_lines:
            log(line)
        flood(self._behaviour.flood_stderr_bytes, self._behaviour.flood_line_bytes)
        self._load = load
        self._load_start = time.monotonic()

    def _load_step_due(self) -> float:
        part = (self._load_steps_done + 1) / self._behaviour.progress_steps
        return self._load_start + self._behaviour.load_seconds * part

    def _advance_load(self, load: worker_pb2.Load) -> None:
        behaviour = self._behaviour
        fraction = self._load_steps_done / behaviour.progress_steps
        if behaviour.crash_at is not None and fraction >= behaviour.crash_at:
            self._crash()
        if behaviour.fail_load_reason:
            self._fail_load(behaviour.fail_load_reason, behaviour.fail_load_message)
        if behaviour.hang_in_load and fraction >= 0.5:
            self._load_hangs = True
            return
        self._load_steps_done += 1
        fraction = self._load_steps_done / behaviour.progress_steps
        self._progress(worker_pb2.LOAD_STAGE_WEIGHTS, fraction)
        if self._load_steps_done < behaviour.progress_steps:
            return
        if behaviour.crash_at is not None and behaviour.crash_at >= 1:
            self._crash()
        self._progress(worker_pb2.LOAD_STAGE_WARMUP, 1.0)
        self._load = None
        self._engine = FakeEngine(behaviour, load)
        self._send(worker_pb2.WorkerFrame(ready=self._engine.ready()))

    def _progress(self, stage: worker_pb2.LoadStage.ValueType, fraction: float) -> None:
        progress = worker_pb2.LoadProgress(stage=stage, fraction=fraction)
        self._send(worker_pb2.WorkerFrame(load_progress=progress))

    def _fail_load(self, reason: str, message: str) -> NoReturn:
        failure = worker_pb2.Failure(
            reason=reason,
            message=message,
            field=self._behaviour.fail_load_field,
            metadata=self._behaviour.fail_load_metadata,
        )
        self._send(worker_pb2.WorkerFrame(load_failed=failure))
        os._exit(0)

    # Service

    def _step(self, engine: FakeEngine, now: float) -> None:
        behaviour = self._behaviour
        self._step_due = now + (1 / behaviour.tokens_per_second if behaviour.tokens_per_second else 0)
        made = engine.most_tokens()
        if behaviour.crash_after_tokens is not None and made >= behaviour.crash_after_tokens:
            self._crash()
        if behaviour.fault is not None and not self._fault_done and made >= behaviour.fault_after_tokens:
            self._fault_done = True
            self._commit(behaviour.fault)
        flood(behaviour.stderr_bytes_per_step, behaviour.flood_line_bytes)
        self._send(worker_pb2.WorkerFrame(step=engine.step()))

    def _commit(self, fault: str) -> None:
        log(f"fault {fault}")
        match fault:
            case "garbage":
                self._socket.sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
            case "not_a_message":
                self._socket.sendall(struct.pack(">I", 4) + b"\xff\xff\xff\xff")
            case "empty_frame":
                self._send(worker_pb2.WorkerFrame())
            case "second_hello":
                hello = worker_pb2.Hello(protocol_version=PROTOCOL_VERSION, instance_id=self._instance_id)
                self._send(worker_pb2.WorkerFrame(hello=hello))
            case "ready":
                self._send(worker_pb2.WorkerFrame(ready=worker_pb2.Ready()))
            case "load_progress":
                self._progress(worker_pb2.LOAD_STAGE_WEIGHTS, 0.5)
            case "unknown_generation":
                update = worker_pb2.GenerationUpdate(generation=1 << 40)
                self._send(worker_pb2.WorkerFrame(step=worker_pb2.Step(updates=[update])))
            case "unknown_call":
                self._send(worker_pb2.WorkerFrame(reply=worker_pb2.Reply(call=1 << 40)))
            case "close_connection":
                self._socket.close()
                self._live_on()
            case "silence":
                self._live_on()
            case _:
                raise AssertionError(fault)

    def _crash(self) -> NoReturn:
        log("the fake was told to crash")
        if self._behaviour.crash_signal:
            os.kill(os.getpid(), signal.Signals[self._behaviour.crash_signal])
        os._exit(self._behaviour.exit_code)

    def _live_on(self) -> NoReturn:
        while True:
            signal.pause()

    def _send(self, frame: worker_pb2.WorkerFrame) -> None:
        try:
            self._socket.sendall(encode_frame(frame))
        except OSError:  # the server has closed the connection: the same as its end
            os._exit(0)


def log(line: str) -> None:
    """Write a line to standard error, in one piece."""
    os.write(2, line.encode() + b"\n")


def flood(byte_count: int, line_bytes: int) -> None:
    """Write so many bytes to standard error, the first of each line not UTF-8, and wait until they are
    taken."""
    line = b"\xff" + b"x" * (line_bytes - 2) + b"\n" if line_bytes else b"x" * 4096
    chunk = line * (1 + (1 << 16) // len(line))
    while byte_count > 0:
        byte_count -= os.write(2, chunk[:byte_count])


def fork_grandchild(kind: str) -> None:
    """Leave a process behind that holds everything this one has open and does not listen to SIGTERM."""
    if os.fork():
        return
    if kind == "session":
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log(f"grandchild {os.getpid()}")
    time.sleep(GRANDCHILD_SECONDS)
    os._exit(0)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process with its parent; at once if that is gone already."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def exit_at_once(number: int, frame: object) -> NoReturn:
    """Obey SIGTERM."""
    del number, frame
    os._exit(0)


def main() -> NoReturn:
    """Run as a worker process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--instance-id", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    behaviour = behaviour_of_environment()
    die_with_parent(arguments.parent_pid)
    if behaviour.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, exit_at_once)
    if behaviour.fork_grandchild:
        fork_grandchild(behaviour.fork_grandchild)
    FakeWorker(socket.socket(fileno=arguments.fd), arguments.instance_id, behaviour).run()


if __name__ == "__main__":
    main()
