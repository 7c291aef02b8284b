"""Worker processes: started, spoken to, watched, stopped. Knows nothing of why.

launcher    starts a process and waits for its hello
worker      one live worker: load, generate, call, stop; watches over its end
connection  frames, dispatched to the generation, call or load they belong to
process     the child itself: session, log pipe, exit, signals to its group
"""

from __future__ import annotations

from paddock_server.supervisor.backoff import Restart, RestartPolicy
from paddock_server.supervisor.exit import WorkerExit
from paddock_server.supervisor.failures import WorkerCrashedError
from paddock_server.supervisor.generation import Generation
from paddock_server.supervisor.launcher import Launcher, LocalLauncher, WorkerSpec, worker_environment
from paddock_server.supervisor.log_ring import LogBatch, LogFollower, LogLine, LogRing
from paddock_server.supervisor.timeouts import SupervisorTimeouts
from paddock_server.supervisor.worker import Worker

__all__ = [
    "Generation",
    "Launcher",
    "LocalLauncher",
    "LogBatch",
    "LogFollower",
    "LogLine",
    "LogRing",
    "Restart",
    "RestartPolicy",
    "SupervisorTimeouts",
    "Worker",
    "WorkerCrashedError",
    "WorkerExit",
    "WorkerSpec",
    "worker_environment",
]
