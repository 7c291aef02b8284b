"""The command line in a terminal of its own: keys, bars, colours."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import ExitCode
from paddock.v1 import model_manager_pb2 as pb
from tests.clients.fake_server import WAY_OUT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.clients.fake_server import FakeServer

COMMAND = [sys.executable, "-m", "paddock"]
CTRL_D = "\x04"


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self._process = process
        self._terminal = terminal
        self.text = ""

    def read_until(self, text: str) -> str:
        """Read until `text` has been written; return what was written since the last call."""
        return self._read(text)

    def read_to_end(self) -> str:
        """Read until the command has ended."""
        return self._read(None)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self._process.wait(WAY_OUT_SECONDS)

    def _read(self, until: str | None) -> str:
        deadline = time.monotonic() + WAY_OUT_SECONDS
        while until is None or until not in self.text:
            assert select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))[0], self.text
            try:
                data = os.read(self._terminal, 65_536)
            except OSError:  # how Linux tells that the other end is closed
                data = b""
            if not data:
                assert until is None, self.text
                break
            self.text += data.decode(errors="replace")
        seen, self.text = self.text, ""
        return seen


@contextmanager
def terminal(server: FakeServer, *arguments: str, **environment: str) -> Generator[Terminal]:
    controller, follower = os.openpty()
    env = {**os.environ, "PADDOCK_SERVER": server.target, "TERM": "xterm-256color", "COLUMNS": "100"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*COMMAND, *arguments], stdin=follower, stdout=follower, stderr=follower, env={**env, **environment}
    ) as process:
        os.close(follower)
        try:
            yield Terminal(process, controller)
        finally:
            process.kill()
            os.close(controller)


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: FakeServer) -> None:
    with terminal(server, "chat", "endless") as chat:
        chat.read_until("> ")
        chat.type("hello\n")
        chat.read_until("xxx")
        chat.interrupt()
        assert "Stopped." in chat.read_until("> ")
        assert server.manager.cancelled["Generate"].wait(WAY_OUT_SECONDS)

        chat.type("and now\n")
        chat.read_until("xxx")
        chat.interrupt()
        chat.read_until("> ")
        chat.type(CTRL_D)
        chat.read_to_end()
        assert chat.exit_code() == ExitCode.OK

    second = server.manager.requests("Generate")[1]
    assert isinstance(second, pb.GenerateRequest)
    said = [part.text for message in second.chat.messages for part in message.content]
    assert [said[0], set(said[1]), said[2]] == ["hello", {"x"}, "and now"]


def test_ctrl_c_at_the_prompt_of_a_chat_clears_the_line(server: FakeServer) -> None:
    with terminal(server, "chat", "tiny") as chat:
        chat.read_until("> ")
        chat.type("never mind")
        chat.read_until("never mind")
        chat.interrupt()
        chat.read_until("> ")
        chat.type("hello\n")
        assert "Hello, wörld!" in chat.read_until("> ")
        chat.type(CTRL_D)
        chat.read_to_end()
        assert chat.exit_code() == ExitCode.OK

    (request,) = server.manager.requests("Generate")
    assert isinstance(request, pb.GenerateRequest)
    assert request.chat.messages[0].content[0].text == "hello"


def test_ctrl_c_ends_a_run_and_stops_its_generation(server: FakeServer) -> None:
    with terminal(server, "run", "endless", "hello") as run:
        run.read_until("xxx")
        run.interrupt()
        assert "Traceback" not in run.read_to_end()
        assert run.exit_code() == ExitCode.INTERRUPTED

    assert server.manager.cancelled["Generate"].wait(WAY_OUT_SECONDS)


def test_ctrl_c_leaves_a_load_running_and_says_so(server: FakeServer) -> None:
    with terminal(server, "load", "stuck") as load:
        load.read_until("Working")
        load.interrupt()
        text = load.read_to_end()
        assert load.exit_code() == ExitCode.INTERRUPTED

    assert "The load goes on; `paddock unload stuck` aborts it." in text
    assert "Traceback" not in text


def test_a_load_in_a_terminal_shows_a_bar_and_a_line_for_each_stage(server: FakeServer) -> None:
    with terminal(server, "load", "cold") as load:
        text = load.read_to_end()
        assert load.exit_code() == ExitCode.OK

    assert "━" in text
    assert re.search("✓.* Starting worker", text)
    assert "Loaded cold in 1.5 s." in text


def test_a_run_in_a_terminal_tells_tokens_and_speed(server: FakeServer) -> None:
    with terminal(server, "run", "tiny", "hello") as run:
        text = run.read_to_end()

    assert "3 + 4 tokens, 6.0 tokens/s" in text


@pytest.mark.parametrize("command", ["ls", "load"])
def test_no_color_is_honoured(server: FakeServer, command: str) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[0-9;]*m")
    arguments = (command, "cold") if command == "load" else (command,)

    with terminal(server, *arguments) as coloured:
        assert colour.search(coloured.read_to_end())
    server.manager.__post_init__()
    with terminal(server, *arguments, NO_COLOR="1") as plain:
        assert not colour.search(plain.read_to_end())


def test_a_reader_that_has_gone_ends_the_command_quietly(server: FakeServer) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", "endless", "hello", "--server", server.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.read(3) == b"xxx"
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait(WAY_OUT_SECONDS) == ExitCode.FAILED
