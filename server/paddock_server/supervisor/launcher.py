"""Starting workers. `Launcher` is the seam for other places than this machine; `LocalLauncher` starts
processes."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from paddock.errors import Reason, make_error
from paddock_server.supervisor.connection import Connection
from paddock_server.supervisor.failures import WorkerCrashedError
from paddock_server.supervisor.log_ring import LogRing
from paddock_server.supervisor.process import WorkerProcess
from paddock_server.supervisor.timeouts import SupervisorTimeouts
from paddock_server.supervisor.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()

# -P: what lies in the current directory is not to be imported.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "paddock_server.worker")

PASSED_VARIABLES: Final = frozenset(
    {
        "DYLD_FALLBACK_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LLAMA_CPP_LIB_PATH",
        "LOGNAME",
        "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_TF32_OVERRIDE",
        "NVIDIA_VISIBLE_DEVICES",
        "PATH",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
)
"""Variables a worker gets by name. Everything not listed stays here: tokens and keys are what environments
hold."""

PASSED_PREFIXES: Final = (
    "ASAN_", "CUDA_", "GGML_", "GOMP_", "GPU_", "HIP_", "HSA_", "KMP_", "LC_", "LSAN_", "MALLOC_", "MKL_",
    "OMP_", "ONEAPI_", "OPENBLAS_", "PYTHON", "ROCM_", "ROCR_", "SYCL_", "TSAN_", "UBSAN_", "VK_",
    "ZE_",
)  # fmt: skip
"""Variables a worker gets by the start of their name: settings of interpreters, threads, devices and
sanitizers."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a launcher needs to know. What to load is sent later, over the connection."""

    model_id: str
    """Model the worker is for; in messages and logs only."""

    load_id: str
    """Load the worker belongs to; in the log lines."""

    log: LogRing
    """Where the worker's output goes. Belongs to the model and outlives the worker."""


class Launcher(Protocol):
    """Starts workers, wherever they run."""

    async def start(self, spec: WorkerSpec) -> Worker:
        """Start a worker and return it once it has introduced itself.

        Raises:
            PaddockError: WORKER_CRASHED when it could not be started or ended before its hello; LOAD_STALLED
                with `stage` `spawn` when the hello did not come in time. Nothing is left running.
        """
        ...

    def hurry(self) -> None:
        """End all workers at once, with SHUTTING_DOWN for what runs on them."""
        ...


class LocalLauncher:
    """Starts each worker as a process of this machine."""

    def __init__(
        self,
        command: Sequence[str] = WORKER_COMMAND,
        timeouts: SupervisorTimeouts | None = None,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = tuple(command)
        self._timeouts = timeouts or SupervisorTimeouts()
        self._extra_env = dict(extra_env or {})
        self._workers: set[Worker] = set()

    def hurry(self) -> None:
        """End all workers at once."""
        for worker in list(self._workers):
            worker.hurry()

    async def start(self, spec: WorkerSpec) -> Worker:
        """Start a process and wait for its hello, its exit or the time-out, whichever is first."""
        instance_id = secrets.token_hex(16)
        connection = Connection(model_id=spec.model_id, instance_id=instance_id)
        process = await self._spawn(spec, connection, instance_id)
        worker = Worker(spec, process, connection, instance_id=instance_id, timeouts=self._timeouts)
        self._workers.add(worker)
        worker.exited.add_done_callback(lambda _: self._workers.discard(worker))
        log.info("worker_started", model=spec.model_id, load_id=spec.load_id, pid=worker.pid)
        try:
            await asyncio.wait(
                {connection.hello, worker.exited},
                timeout=self._timeouts.handshake,
                return_when=asyncio.FIRST_COMPLETED,
            )
        except asyncio.CancelledError:
            await worker.stop(grace_seconds=0)
            raise
        if connection.hello.done():
            return worker
        if worker.exited.done():
            raise WorkerCrashedError.of(spec.model_id, worker.exited.result(), doing="before its hello")
        seconds = f"{self._timeouts.handshake:g}"
        worker.kill(f"it did not say hello within {seconds} s")
        await asyncio.wait({worker.exited}, timeout=self._timeouts.kill)
        message = f"The worker of model {spec.model_id!r} did not say hello within {seconds} s of its start."
        metadata = {"model": spec.model_id, "stage": "spawn", "limit": "handshake", "limit_seconds": seconds}
        raise make_error(Reason.LOAD_STALLED, message, metadata=metadata)

    async def _spawn(self, spec: WorkerSpec, connection: Connection, instance_id: str) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        with theirs:
            try:
                await loop.create_unix_connection(lambda: connection, sock=ours)
            except BaseException:
                ours.close()
                raise
            arguments = (
                "--fd",
                str(theirs.fileno()),
                "--instance-id",
                instance_id,
                "--parent-pid",
                str(os.getpid()),
            )
            try:
                return await WorkerProcess.spawn(
                    (*self._command, *arguments),
                    env=worker_environment(os.environ, self._extra_env),
                    pass_fd=theirs.fileno(),
                    log=spec.log,
                    load_id=spec.load_id,
                )
            except OSError as error:
                connection.close()
                message = f"The worker of model {spec.model_id!r} could not be started: {error}."
                metadata = {"model": spec.model_id, "cause": str(error)}
                raise make_error(Reason.WORKER_CRASHED, message, metadata=metadata) from error
            except BaseException:
                connection.close()
                raise


def worker_environment(environment: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker gets to see of an environment: nothing that may hold a secret."""
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES)
    }
    # A debugger started on a crash of ggml would hold up its exit for seconds.
    return passed | {"GGML_NO_BACKTRACE": "1"} | dict(extra)
