"""What `make run` shows: a model loading with progress, an answer streaming, and a server that stays up.

The model is foal, which comes with Paddock and answers questions about it. Nothing here needs a network.
"""

from __future__ import annotations

import interrupts

# isort: split
import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

from steps import CACHE, ROOT, VENV, StepError, fail, say

PADDOCK = VENV / "bin" / "paddock"
MODEL = "foal"
QUESTION = "What is Paddock?"
NEXT_QUESTION = "How do I load a model?"
DEFAULT_GRPC_PORT = 50051
SERVER_LOG = CACHE / "logs" / "server.log"

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 45.0
"""Longer than the server lets running requests go on for when it stops."""
LOG_LINES_SHOWN = 15


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves the demo model and shows it at work.")
    parser.add_argument("--port", type=int, default=8080, help="HTTP port (8080)")
    parser.add_argument("--grpc-port", type=int, default=DEFAULT_GRPC_PORT, help="gRPC port (50051)")
    ports = parser.parse_args()
    try:
        interrupts.raise_from_now_on()
        show(ports.port, ports.grpc_port)
    except StepError as err:
        fail(err)
    except KeyboardInterrupt:
        interrupts.leave()


def show(port: int, grpc_port: int) -> None:
    """Starts the server, loads the model and asks it, and waits until it is told to stop."""
    wanted = {"--port": port, "--grpc-port": grpc_port}
    taken = {name: number for name, number in wanted.items() if is_listening(number)}
    if taken:
        numbers = " and ".join(str(number) for number in taken.values())
        what = f"port {numbers} is" if len(taken) == 1 else f"ports {numbers} are"
        others = " ".join(f"{name} {number + 1}" for name, number in taken.items())
        msg = (
            f"{what} taken, perhaps by a Paddock that runs already (`paddock doctor` says who "
            f"answers); stop it, or choose others: make run ARGS='{others}'"
        )
        raise StepError(msg)
    server = start_server(port, grpc_port)
    is_up = False
    try:
        wait_until_listening(server, port, grpc_port)
        say(f"loading the model {MODEL}")
        paddock(grpc_port, "load", MODEL)
        say(f'asking it: "{QUESTION}"')
        print(flush=True)
        paddock(grpc_port, "run", MODEL, QUESTION, "--temperature", "0")
        tell_what_next(port, grpc_port)
        is_up = True
        server.wait()
    except KeyboardInterrupt:
        say("stopping")
        stop(server)
        if not is_up:
            raise
        if server.returncode == -signal.SIGTERM:  # it had not come to handle signals, or was past that
            return
    finally:
        stop(server)
    if server.returncode != 0:
        msg = f"the server ended with status {server.returncode}.\n{log_tail()}"
        raise StepError(msg)


def start_server(port: int, grpc_port: int) -> subprocess.Popen[bytes]:
    """Starts `paddock up`, its log in a file so that the terminal belongs to the answer."""
    ports = ("--port", str(port), "--grpc-port", str(grpc_port))
    # Without a memory of earlier runs: a model loaded then would be loaded before anybody can watch.
    command = [PADDOCK, "up", "--state-dir", "", *ports]
    say("starting the server: paddock up")
    SERVER_LOG.parent.mkdir(parents=True, exist_ok=True)
    with SERVER_LOG.open("wb") as log:
        # A session of its own: Ctrl-C comes to this script, which then stops the server once.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait_until_listening(server: subprocess.Popen[bytes], *ports: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not all(map(is_listening, ports)):
        if server.poll() is not None:
            msg = f"the server ended before it was ready.\n{log_tail()}"
            raise StepError(msg)
        if time.monotonic() > deadline:
            msg = f"the server was not ready after {START_TIMEOUT_S:.0f} seconds.\n{log_tail()}"
            raise StepError(msg)
        time.sleep(0.1)


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def paddock(grpc_port: int, *arguments: str) -> None:
    """Runs the command line as a user would, in this terminal."""
    done = subprocess.run(
        [PADDOCK, *arguments],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PADDOCK_SERVER": f"127.0.0.1:{grpc_port}"},
        check=False,
    )
    if done.returncode == interrupts.INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode != 0:
        msg = f"paddock {arguments[0]} ended with status {done.returncode}.\n{log_tail()}"
        raise StepError(msg)


def tell_what_next(port: int, grpc_port: int) -> None:
    """Says where things are and what to try. With the answer above it, it fits a terminal of 24 lines."""
    server = "" if grpc_port == DEFAULT_GRPC_PORT else f"PADDOCK_SERVER=127.0.0.1:{grpc_port} "
    bin_dir = PADDOCK.parent.relative_to(ROOT)
    grpcurl, how = grpcurl_here()
    print(
        f"""
The server is up until you press Ctrl-C; its log is {SERVER_LOG.relative_to(ROOT)}.
  HTTP   http://127.0.0.1:{port}/v1  (OpenAI-compatible)
  gRPC   127.0.0.1:{grpc_port}

{MODEL} is small and knows only about Paddock. In another terminal:

  {server}{bin_dir}/paddock run {MODEL} "{NEXT_QUESTION}"
  curl http://127.0.0.1:{port}/v1/chat/completions -d '{{"model": "{MODEL}",
    "messages": [{{"role": "user", "content": "{NEXT_QUESTION}"}}]}}'
  {grpcurl} -plaintext -d '{{"model": "{MODEL}", "chat": {{"messages": [
    {{"role": "ROLE_USER", "content": [{{"text": "{NEXT_QUESTION}"}}]}}]}}}}' \\
    127.0.0.1:{grpc_port} paddock.v1.ModelManager/Generate{how}

With models of yours, GGUF files in a folder, stop this server and start
  {bin_dir}/paddock up --models-dir FOLDER""",
        flush=True,
    )


def grpcurl_here() -> tuple[str, str]:
    """The grpcurl there is, and in a line of its own how to get one where there is none."""
    if shutil.which("grpcurl"):
        return "grpcurl", ""
    own = CACHE / "bin" / "grpcurl"
    how = "" if own.exists() else "\n    (`make tools` builds this grpcurl; it needs Go)"
    return str(own.relative_to(ROOT)), how


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stops the server as its users do, and by force if it does not."""
    for number, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        if server.poll() is not None:
            return
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=patience)


def log_tail() -> str:
    lines = SERVER_LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    if not lines:
        return f"It has written nothing to {SERVER_LOG.relative_to(ROOT)}."
    return "\n".join(
        [f"The last lines of {SERVER_LOG.relative_to(ROOT)}:", *(f"    {line}" for line in lines)]
    )


if __name__ == "__main__":
    main()
