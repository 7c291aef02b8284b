"""A child process in a session of its own: its start, its log pipe, its exit, its end by force."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final, cast

import psutil

from paddock_server.supervisor.log_ring import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paddock_server.supervisor.log_ring import LogRing

_HAS_WAITID: Final = hasattr(os, "waitid")


class LogPipe(asyncio.Protocol):
    """Reads what a process writes, always and at once, into a ring that forgets.

    The process never waits for a reader of its log. A chunk is at most what a pipe holds, and the event loop
    runs everything else that is due between two chunks.
    """

    def __init__(self, ring: LogRing) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Resolves when every process that held the pipe has let go of it, or `close` was called."""
        self._ring = ring
        self._splitter: LineSplitter | None = None
        self._transport: asyncio.ReadTransport | None = None

    def begin(self, *, load_id: str, pid: int) -> None:
        """Say who writes. The pipe is older than the process whose id the lines carry."""
        self._splitter = LineSplitter(load_id=load_id, pid=pid)

    def relabel(self, load_id: str) -> None:
        """Have the lines from now on carry another load: the process has slept and loads again."""
        if self._splitter is not None:
            self._splitter.load_id = load_id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.ReadTransport", transport)

    def data_received(self, data: bytes) -> None:
        if self._splitter is not None:
            self._ring.extend(self._splitter.feed(data))

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # an end is an end
        if self._splitter is not None:
            self._ring.extend(self._splitter.finish())
        if not self.closed.done():
            self.closed.set_result(None)

    def close(self) -> None:
        """Read no more, whoever still holds the other end."""
        if self._transport is not None:
            self._transport.close()


class WorkerProcess:
    """A running child, the leader of a session and process group. Nothing of the group outlives it."""

    def __init__(self, popen: subprocess.Popen[bytes], log_pipe: LogPipe) -> None:
        self.pid = popen.pid
        self.start_time = time.time()
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Resolves to `subprocess`' return code once the process has been reaped."""
        self.log_pipe = log_pipe
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._pid_fd: int | None = None
        self._watch_exit()

    @classmethod
    async def spawn(
        cls, argv: Sequence[str], *, env: Mapping[str, str], pass_fd: int, log: LogRing, load_id: str
    ) -> WorkerProcess:
        """Start a process with nothing of ours open but `pass_fd`. Its two outputs are one pipe, read into
        `log`.

        Raises:
            OSError: It could not be started.
        """
        loop = asyncio.get_running_loop()
        read_fd, write_fd = os.pipe()
        reader = os.fdopen(read_fd, "rb", buffering=0)
        try:
            _, log_pipe = await loop.connect_read_pipe(lambda: LogPipe(log), reader)
        except BaseException:
            reader.close()
            os.close(write_fd)
            raise
        try:
            popen = _popen(argv, env, pass_fd, write_fd)
        except BaseException:
            log_pipe.close()
            raise
        finally:
            os.close(write_fd)
        log_pipe.begin(load_id=load_id, pid=popen.pid)
        return cls(popen, log_pipe)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and whatever it started. To a process that has been reaped,
        nothing."""
        if self.exited.done():
            return
        # Not permitted: on macOS what is left of the group is the zombie itself.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def resident_bytes(self) -> int:
        """Return the memory the process has resident; 0 once it is gone."""
        if self.exited.done():
            return 0
        try:
            return psutil.Process(self.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return 0

    def _watch_exit(self) -> None:
        try:
            self._pid_fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # not this kernel, or no descriptors left
            threading.Thread(target=self._wait_in_thread, name=f"wait-{self.pid}", daemon=True).start()
        else:
            self._loop.add_reader(self._pid_fd, self._on_exit)

    def _wait_in_thread(self) -> None:
        if _HAS_WAITID:
            # Leaves the zombie for `_on_exit`: until that is reaped, its group cannot be another's.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(self._on_exit)

    def _on_exit(self) -> None:
        if self._pid_fd is not None:
            self._loop.remove_reader(self._pid_fd)
            os.close(self._pid_fd)
            self._pid_fd = None
        # While the leader is a zombie the group's number cannot be another's: the moment to end the rest of
        # it.
        self.signal_group(signal.SIGKILL)
        self.exited.set_result(self._popen.wait())


def _popen(
    argv: Sequence[str], env: Mapping[str, str], pass_fd: int, output_fd: int
) -> subprocess.Popen[bytes]:
    """Fork and execute, which blocks for about a millisecond. From the main thread: the death of the thread
    that forked is what a parent-death signal is sent for."""
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        env=env,
        pass_fds=(pass_fd,),
        start_new_session=True,
    )
