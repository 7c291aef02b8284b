"""A real `paddock up` or `paddock gateway` in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

START_SECONDS = 60
"""Generous: two busy cores import everything well within it."""


@dataclass(slots=True)
class ServerProcess:
    """A running server with its gateway."""

    process: subprocess.Popen[bytes]
    log: Path
    grpc_address: str = ""
    http_address: str = ""

    @property
    def http_url(self) -> str:
        """Root of the gateway's routes."""
        return f"http://{self.http_address}"

    def events(self) -> list[dict[str, Any]]:
        """Return the log lines written so far, parsed."""
        events: list[dict[str, Any]] = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the last line may be half written; other programs' lines are not ours
        return events

    def workers(self) -> list[psutil.Process]:
        """Return the live worker processes of this server."""
        return [
            child for child in psutil.Process(self.process.pid).children(recursive=True) if _is_worker(child)
        ]

    def stop(self, timeout_seconds: float = 60) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_seconds)


@contextmanager
def paddock_up(
    models_dir: Path | None, log: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Generator[ServerProcess]:
    """Run `paddock up` on free ports until the block ends; whatever happened in it, no process is left.

    Without a directory it serves what it serves by default: the demo model, and a directory of the user's.
    """
    command = [str(Path(sys.executable).parent / "paddock"), "up"]
    command += ["--grpc-port", "0", "--port", "0", "--log-format", "json"]
    command += [] if models_dir is None else ["--models-dir", str(models_dir)]
    env = {**os.environ, "PADDOCK_STATE_DIR": "", **(environment or {})}
    with _running([*command, *flags], log, env) as process:
        server = ServerProcess(process, log)
        _await_ready(server)
        yield server


@contextmanager
def paddock_gateway(grpc_address: str, log: Path) -> Generator[ServerProcess]:
    """Run `paddock gateway` on a free port in front of a server, until the block ends."""
    command = [str(Path(sys.executable).parent / "paddock"), "gateway", "--server", grpc_address]
    with _running([*command, "--port", "0", "--log-format", "json"], log, dict(os.environ)) as process:
        gateway = ServerProcess(process, log, grpc_address=grpc_address)
        _await_ready(gateway)
        yield gateway


@contextmanager
def _running(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> Generator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Poll until the condition holds; fail when it has not after that long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            message = f"not within {seconds} s: {condition}"
            raise AssertionError(message)
        time.sleep(0.02)


def _await_ready(server: ServerProcess) -> None:
    def ready() -> bool:
        if server.process.poll() is not None:
            message = f"the server exited with {server.process.returncode}:\n{server.log.read_text()[-3000:]}"
            raise AssertionError(message)
        for event in server.events():
            if event.get("event") == "server_ready":
                server.grpc_address = event["grpc"]
            if event.get("event") == "gateway_ready":
                server.http_address = event["http"]
        return bool(server.grpc_address and server.http_address)

    wait_until(ready, START_SECONDS)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "paddock_server.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
