"""`python -m paddock_server.worker --fd N --instance-id ID --parent-pid PID`: a worker process.

The server starts it, connected by an inherited stream socket, and is the only one who does. It exits

- with code 0 when the socket ends, on SIGTERM, on `shutdown` and after a load that failed;
- with code 70 on a bug, with a traceback on standard error;
- by a signal when llama.cpp aborts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from paddock_server.worker.connection import Connection, ServerGoneError
from paddock_server.worker.environment import set_library_environment
from paddock_server.worker.framing import PROTOCOL_VERSION
from paddock_server.worker.parent import die_with_parent
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from types import TracebackType

EXIT_BUG: Final = 70
"""Exit code after an exception nobody expected (EX_SOFTWARE)."""

SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep the interpreter from the engine; Python's 5 ms are a step of a small model."""


def main() -> NoReturn:
    """Run a worker until there is nothing left to work for."""
    parser = argparse.ArgumentParser(prog="python -m paddock_server.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    parser.add_argument("--instance-id", required=True, help="token to introduce itself with")
    parser.add_argument("--parent-pid", type=int, required=True, help="process id of the server")
    arguments = parser.parse_args()

    die_with_parent(arguments.parent_pid)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: _exit(0))
    sys.excepthook = _on_uncaught
    threading.excepthook = lambda hook: _on_uncaught(hook.exc_type, hook.exc_value, hook.exc_traceback)
    sys.setswitchinterval(SWITCH_SECONDS)
    set_library_environment()

    connection = Connection(socket.socket(fileno=arguments.fd))
    connection.send(
        worker_pb2.WorkerFrame(
            hello=worker_pb2.Hello(
                protocol_version=PROTOCOL_VERSION,
                instance_id=arguments.instance_id,
                pid=os.getpid(),
                engine=_engine_name(),
            )
        )
    )
    _serve(connection)
    _exit(0)


def _serve(connection: Connection) -> None:
    # Imported here, behind the greeting: loading the library takes longer than all the rest.
    from paddock_server.worker import llama
    from paddock_server.worker.logs import NativeLog
    from paddock_server.worker.process import WorkerProcess

    log = NativeLog()
    log.install()
    llama.init_backend()
    WorkerProcess(connection, log, exit_process=_exit).serve()


def _engine_name() -> str:
    """Return name and version of the bindings without importing them."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python, not installed"
    match = re.search(r'__version__ = "([^"]+)"', Path(spec.origin).read_text(encoding="utf-8"))
    return f"llama-cpp-python {match[1] if match else 'of unknown version'}"


def _on_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """End the process after an exception in any thread: never go on with broken state."""
    from paddock_server.worker.bounded import StopThread

    if issubclass(kind, StopThread):
        return
    if issubclass(kind, ServerGoneError):
        _exit(0)
    traceback.print_exception(kind, error, trace)
    _exit(EXIT_BUG)


def _exit(code: int) -> NoReturn:
    """End the process at once, whatever its threads do: llama.cpp's neither can nor need be stopped first."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
