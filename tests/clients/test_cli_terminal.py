"""The command line in a terminal of its own: keys, bars, colours."""

from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import ExitCode
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.clients.fake_server import WAY_OUT_SECONDS
from tests.clients.terminal import COMMAND, terminal

if TYPE_CHECKING:
    from tests.clients.fake_server import FakeServer

CTRL_D = "\x04"


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: FakeServer) -> None:
    with terminal(server.target, "chat", "endless") as chat:
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
    with terminal(server.target, "chat", "tiny") as chat:
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
    with terminal(server.target, "run", "endless", "hello") as run:
        run.read_until("xxx")
        run.interrupt()
        assert "Traceback" not in run.read_to_end()
        assert run.exit_code() == ExitCode.INTERRUPTED

    assert server.manager.cancelled["Generate"].wait(WAY_OUT_SECONDS)


def test_ctrl_c_leaves_a_load_running_and_says_so(server: FakeServer) -> None:
    with terminal(server.target, "load", "stuck") as load:
        load.read_until("Working")
        load.interrupt()
        text = load.read_to_end()
        assert load.exit_code() == ExitCode.INTERRUPTED

    assert "The load goes on; `paddock unload stuck` aborts it." in text
    assert "Traceback" not in text


def test_a_load_in_a_terminal_shows_a_bar_and_a_line_for_each_stage(server: FakeServer) -> None:
    with terminal(server.target, "load", "cold") as load:
        text = load.read_to_end()
        assert load.exit_code() == ExitCode.OK

    assert "━" in text
    assert re.search("✓.* Starting worker", text)
    assert "Loaded cold in 1.5 s." in text


def test_a_run_in_a_terminal_tells_tokens_and_speed(server: FakeServer) -> None:
    with terminal(server.target, "run", "tiny", "hello") as run:
        text = run.read_to_end()

    assert "3 + 4 tokens, 6.0 tokens/s" in text


@pytest.mark.parametrize("command", ["ls", "load"])
def test_no_color_is_honoured(server: FakeServer, command: str) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[0-9;]*m")
    arguments = (command, "cold") if command == "load" else (command,)

    with terminal(server.target, *arguments) as coloured:
        assert colour.search(coloured.read_to_end())
    server.manager.__post_init__()
    with terminal(server.target, *arguments, NO_COLOR="1") as plain:
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


def test_a_long_name_is_whole_and_what_has_no_room_beside_it_is_named(server: FakeServer) -> None:
    name = "a-model-with-a-name-that-never-seems-to-come-to-an-end-" * 2 + "q4_k_m"
    server.manager.models = {name: server.manager.models["tiny"]}
    server.manager.models[name].id = name

    with terminal(server.target, "ps") as ps:
        header, line, note = plain_lines(ps.read_to_end())
        assert ps.exit_code() == ExitCode.OK
    with terminal(server.target, "ps", "--wide") as wide:
        whole = plain_lines(wide.read_to_end())
        assert wide.exit_code() == ExitCode.OK

    assert (header.split(), line.split()) == (["MODEL", "STATE"], [name, "loaded"])
    assert note.startswith("Left out: MEMORY, REQUESTS, ")
    assert [text.split()[0] for text in whole] == ["MODEL", name], "a line a model"
    assert whole[0].endswith("LOADED")


def plain_lines(text: str) -> list[str]:
    """Lines as a person sees them, without colours."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        ("ls", ["MODEL", "STATE", "SIZE", "MEMORY"]),
        ("ps", ["MODEL", "STATE", "MEMORY", "REQUESTS"]),
    ],
)
def test_lists_keep_to_a_terminal_of_80_columns_and_show_the_most_telling(
    server: FakeServer, command: str, columns: list[str]
) -> None:
    name = "qwen2.5-coder-7b-instruct-q4_k_m"
    busy = server.manager.models.pop("tiny")
    server.manager.models = {name: busy}
    busy.id, busy.state = name, model_pb2.MODEL_STATE_UNLOADING
    busy.memory.phase = model_pb2.MEMORY_PHASE_RELEASING
    busy.memory.bytes["RAM"] = 23 * 2**29
    busy.lease_count, busy.worker.queued_request_count = 64, 31
    busy.runtime_options.sleep_timeout.FromSeconds(300)
    busy.expire_time.FromSeconds(int(time.time()) + 3 * 86_400)
    busy.last_use_time.FromSeconds(int(time.time()) - 45)

    with terminal(server.target, command, COLUMNS="80") as listed:
        header, line, note = plain_lines(listed.read_to_end())
        assert listed.exit_code() == ExitCode.OK

    assert max(len(header), len(line)) <= 80
    assert header.split() == columns
    assert line.startswith(f"{name}  unloading  ")
    assert "11.5 GiB releasing" in line
    assert note.startswith("Left out: ")
