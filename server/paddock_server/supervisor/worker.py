"""One live worker: its process, its connection, and the one task that watches both until the end."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import PaddockError, Reason, make_error
from paddock_server.supervisor.exit import LOG_TAIL_LINES, OomWatch, WorkerExit, split_return_code
from paddock_server.supervisor.failures import WorkerCrashedError
from paddock_server.supervisor.generation import Generation
from paddock_server.supervisor.loading import follow_load
from paddock_server.supervisor.stop import descend, is_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from paddock.v1 import model_manager_pb2 as pb
    from paddock_server.supervisor.connection import Connection
    from paddock_server.supervisor.launcher import WorkerSpec
    from paddock_server.supervisor.process import WorkerProcess
    from paddock_server.supervisor.timeouts import SupervisorTimeouts
    from paddock_server.worker.v1 import worker_pb2

_WATCH_TICKS: Final = 4
"""The hang time-out in looks at the frame count: a loop that was itself held up does not take that for
silence."""

_GOODBYE_SECONDS: Final = 1.0
"""A worker whose load failed exits by itself; this long before the ladder hurries it."""


class Worker:
    """A live worker process. Made by `Launcher.start`, once it has introduced itself.

    It ends in one of two ways: somebody calls `stop`, or it crashes. Crashed is whatever nobody asked for: an
    exit, a signal, a closed connection, a frame that breaks the protocol, silence, work that does not end.
    Either way everything that runs on it is ended with an error at once, and `exited` resolves when the
    process, and whatever it started, is gone.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        process: WorkerProcess,
        connection: Connection,
        *,
        instance_id: str,
        timeouts: SupervisorTimeouts,
    ) -> None:
        self.instance_id = instance_id
        self.pid = process.pid
        self.start_time = process.start_time
        """When the process was started, in seconds since the epoch."""
        self.exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        """Resolves when the process is gone. Not to be cancelled: shield it, or use `asyncio.wait`."""
        self._spec = spec
        self._process = process
        self._connection = connection
        self._timeouts = timeouts
        self._log: FilteringBoundLogger = structlog.get_logger().bind(
            model=spec.model_id, load_id=spec.load_id, pid=process.pid
        )
        self._oom = OomWatch()
        self._stop_asked = False
        self._cause = ""
        self._ending = False
        self._hurried = asyncio.Event()
        self._stop_task: asyncio.Task[WorkerExit] | None = None
        self._watch_task = asyncio.create_task(self._watch(), name=f"watch-worker-{process.pid}")
        self._watch_task.add_done_callback(self._on_watch_done)

    @property
    def heartbeat(self) -> worker_pb2.Heartbeat | None:
        """The latest sign of life."""
        return self._connection.heartbeat

    @property
    def last_frame_time(self) -> float:
        """When the latest frame of any kind came, by the event loop's clock."""
        return self._connection.last_frame_time

    def resident_bytes(self) -> int:
        """Return the memory the process has resident; 0 once it is gone."""
        return self._process.resident_bytes()

    def log_tail(self, count: int = LOG_TAIL_LINES) -> tuple[str, ...]:
        """Return the last lines this process wrote, oldest first."""
        return self._spec.log.tail(count, pid=self.pid)

    async def load(
        self,
        request: worker_pb2.Load,
        on_progress: Callable[[worker_pb2.LoadProgress], None],
        *,
        size_bytes: int,
    ) -> worker_pb2.Ready:
        """Load the model; to be called first, and again after `sleep`. `on_progress` is called in the
        caller's task.

        Time-outs count from the last progress; how long the whole may take grows with `size_bytes`, the size
        of all of the model's files. When it raises, the process has ended; except when cancelled, which
        leaves the load running until `stop`.

        Raises:
            PaddockError: The reason of `load_failed`; LOAD_STALLED; LOAD_ABORTED after `abort_load` or
                `stop`; WORKER_CRASHED, as `WorkerCrashedError`.
        """
        inbox = self._connection.start_load(request)
        try:
            return await follow_load(
                inbox, size_bytes=size_bytes, timeouts=self._timeouts, on_progress=on_progress
            )
        except PaddockError:
            if inbox.answered:
                await is_gone(self._process, _GOODBYE_SECONDS)
                await self.stop(grace_seconds=0)
            elif inbox.aborted:
                await self.stop(grace_seconds=0)
            elif inbox.outcome is None:
                self.kill("its load stalled")
                await asyncio.wait({self.exited}, timeout=self._timeouts.kill)
            raise

    async def sleep(self) -> None:
        """Have the worker free its model and everything that belongs to it; nothing may run on it.

        Raises:
            PaddockError: WORKER_CRASHED; the reason given to `stop`.
        """
        await self._connection.sleep()

    def begin_load(self, load_id: str) -> None:
        """Say which load comes next, after `sleep`: what the process writes from now on belongs to it."""
        self._process.log_pipe.relabel(load_id)
        self._log = self._log.bind(load_id=load_id)

    def abort_load(self) -> None:
        """Have the load in progress given up: `load` raises LOAD_ABORTED. Without one, nothing happens."""
        self._connection.abort_load()

    def generate(self, request: pb.GenerateRequest) -> Generation:
        """Return a generation, which starts when it is entered: `async with worker.generate(request) as
        updates`."""
        return Generation(self._connection, request)

    async def call(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        """Ask a question and wait for its answer. Fills in the number of `call`.

        Raises:
            PaddockError: What the worker answered; WORKER_CRASHED; the reason given to `stop`.
        """
        return await self._connection.call(call)

    async def stop(self, *, grace_seconds: float, reason: str = Reason.MODEL_UNLOADED) -> WorkerExit:
        """End the worker and return what became of it. Joins a stop under way; a worker that is gone is no
        error.

        What still runs on it ends with `reason` at once; it has `grace_seconds` to obey the shutdown frame,
        then come SIGTERM and SIGKILL to its process group. Cancelling the call does not cancel the stop.
        """
        if self._stop_task is None:
            if self._ending or self._process.exited.done():
                return await asyncio.shield(self.exited)
            self._stop_task = self._begin_stop(grace_seconds, reason)
        return await asyncio.shield(self._stop_task)

    def hurry(self) -> None:
        """End the worker at once, because the server does: without a grace, also in a stop under way."""
        self._hurried.set()
        if self._stop_task is None and not self._ending and not self._process.exited.done():
            self._stop_task = self._begin_stop(0, Reason.SHUTTING_DOWN)

    def _begin_stop(self, grace_seconds: float, reason: str) -> asyncio.Task[WorkerExit]:
        # Before any signal, so that the exit it causes is never taken for a crash.
        self._stop_asked = True
        self._connection.fail_all(
            lambda: _stopped(self._spec.model_id, reason),
            load=lambda: _load_stopped(self._spec.model_id, reason),
        )
        return asyncio.create_task(self._stop(grace_seconds), name=f"stop-worker-{self.pid}")

    def kill(self, cause: str) -> None:
        """Kill the worker for a fault of its own, which `cause` says, to go after `because`. Counts as a
        crash."""
        if self._cause or self._stop_asked or self._process.exited.done():
            return
        self._ending = True
        self._cause = cause
        self._log.warning("worker_killed", signal="SIGKILL", cause=cause)
        self._process.signal_group(signal.SIGKILL)

    async def _stop(self, grace_seconds: float) -> WorkerExit:
        gone = await descend(
            self._process,
            self._connection,
            grace_seconds=grace_seconds,
            hurried=self._hurried,
            timeouts=self._timeouts,
            log=self._log,
        )
        if not gone:
            return self._exit_so_far()
        return await asyncio.shield(self.exited)

    async def _watch(self) -> None:
        """See the worker through to its end; the only writer of `exited`."""
        fault = await self._until_end()
        if not self._is_intended():
            await self._end_crashed(fault)
        # Unbounded on purpose: whoever waits for a process that cannot be killed has been told by then.
        return_code = await self._process.exited
        ends = {self._connection.closed, self._process.log_pipe.closed}
        await asyncio.wait(ends, timeout=self._timeouts.drain_after_exit)
        self._connection.close()
        self._process.log_pipe.close()
        result = self._exit_of(return_code)
        self.exited.set_result(result)
        if result.intended:
            self._log.info("worker_exited", exit_code=result.exit_code, signal=result.signal)
            self._connection.fail_all(lambda: _stopped(self._spec.model_id, Reason.MODEL_UNLOADED))
        else:
            self._log.warning("worker_crashed", **result.metadata())
            self._fail_crashed(result)

    async def _until_end(self) -> str:
        """Wait for the exit or the end of the connection, whichever is first, or return why it must be
        ended."""
        ends = {self._process.exited, self._connection.closed}
        seen = silent_ticks = 0
        while silent_ticks < _WATCH_TICKS:
            done, _ = await asyncio.wait(
                ends, timeout=self._timeouts.hang / _WATCH_TICKS, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return self._connection.closed.result() if self._connection.closed.done() else ""
            self._oom.sample()
            overrun = self._overrun()
            if overrun:
                return overrun
            # The handshake's time-out is in charge of the hello, the load's of what comes next (an engine is
            # long to import, and does not beat before), the ladder of a stop.
            if self._connection.frame_count != seen or seen <= 1 or self._stop_asked:
                seen, silent_ticks = self._connection.frame_count, 0
            else:
                silent_ticks += 1
        return f"it sent nothing for {self._timeouts.hang:g} s"

    def _overrun(self) -> str:
        """Return what the worker has been at for too long by its own account, or nothing. Its heart beats on:
        it is a thread of its own, and a call that does not end lets it run."""
        beat, timeouts = self._connection.heartbeat, self._timeouts
        if beat is None or self._stop_asked:
            return ""
        if beat.step_milliseconds > timeouts.step * 1000:
            return f"one step took longer than {timeouts.step:g} s"
        if beat.preparation_milliseconds > timeouts.preparation * 1000:
            return f"it prepared one request for longer than {timeouts.preparation:g} s"
        return ""

    async def _end_crashed(self, fault: str) -> None:
        """Make sure that a worker at fault is gone, and tell who waits even when it cannot be made to."""
        self._ending = True
        if not fault and not await is_gone(self._process, self._timeouts.exit_after_eof):
            fault = "it closed its connection and did not exit"
        if fault:
            self.kill(fault)
        if not await is_gone(self._process, self._timeouts.kill):
            self._log.error("worker_unkillable", waited_seconds=self._timeouts.kill)
            self._fail_crashed(self._exit_so_far())

    def _fail_crashed(self, result: WorkerExit) -> None:
        model_id = self._spec.model_id
        self._connection.fail_all(
            lambda: WorkerCrashedError.of(model_id, result),
            load=lambda: WorkerCrashedError.of(model_id, result, doing="while it loaded"),
        )

    def _is_intended(self) -> bool:
        return self._stop_asked or self._connection.load_has_failed

    def _exit_of(self, return_code: int) -> WorkerExit:
        exit_code, signal_name = split_return_code(return_code)
        intended = self._is_intended()
        unexplained = signal_name == signal.SIGKILL.name and not intended and not self._cause
        return WorkerExit(
            exit_code=exit_code,
            signal=signal_name,
            intended=intended,
            log_tail=self.log_tail(),
            cause=self._cause,
            oom_killed=unexplained and self._oom.has_struck(),
        )

    def _exit_so_far(self) -> WorkerExit:
        return WorkerExit(None, "", self._is_intended(), self.log_tail(), cause=self._cause)

    def _on_watch_done(self, task: asyncio.Task[None]) -> None:
        """Pass a bug in the watch on to whoever waits for the exit, rather than let them wait for ever."""
        if not self.exited.done() and not task.cancelled():
            error = task.exception()
            if error is not None:
                self.exited.set_exception(error)


def _stopped(model_id: str, reason: str) -> PaddockError:
    message = (
        "The server is shutting down."
        if reason == Reason.SHUTTING_DOWN
        else f"Model {model_id!r} was unloaded before the request was done."
    )
    return make_error(reason, message, metadata={"model": model_id})


def _load_stopped(model_id: str, reason: str) -> PaddockError:
    if reason == Reason.MODEL_UNLOADED:
        reason = Reason.LOAD_ABORTED
        return make_error(
            reason, f"Model {model_id!r} was unloaded while it loaded.", metadata={"model": model_id}
        )
    return _stopped(model_id, reason)
