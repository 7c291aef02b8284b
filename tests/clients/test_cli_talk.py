"""`paddock run` and `paddock chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import ExitCode
from paddock.errors import Reason, make_error
from paddock.v1 import generation_pb2
from paddock.v1 import model_manager_pb2 as pb
from tests.clients.invoke import Paddock, events

if TYPE_CHECKING:
    from tests.clients.fake_server import FakeServer


def test_run_writes_the_answer_and_only_the_answer_to_standard_output(
    paddock: Paddock, server: FakeServer
) -> None:
    result = paddock("run", "tiny", "Hi", "--system", "Be brief.", "-n", "5", "--stop", "x", "--seed", "-3")

    assert (result.stdout, result.stderr) == ("Hello, wörld!\n", "")
    text = generation_pb2.ContentPart
    assert server.manager.requests("Generate") == [
        pb.GenerateRequest(
            model="tiny",
            chat=generation_pb2.ChatInput(
                messages=[
                    generation_pb2.ChatMessage(
                        role=generation_pb2.ROLE_SYSTEM, content=[text(text="Be brief.")]
                    ),
                    generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER, content=[text(text="Hi")]),
                ]
            ),
            sampling=generation_pb2.SamplingParams(seed=-3),
            stop=generation_pb2.StopParams(max_tokens=5, stop_sequences=["x"]),
        )
    ]


def test_run_loads_a_model_that_is_not_loaded_and_shows_it_on_standard_error(paddock: Paddock) -> None:
    result = paddock("run", "cold", "Hi")

    assert result.stdout == "Hello, wörld!\n"
    assert "Loaded cold in 1.5 s." in result.stderr


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_run_reads_standard_input(paddock: Paddock, server: FakeServer, arguments: tuple[str, ...]) -> None:
    paddock("run", "tiny", *arguments, "--raw", input="from stdin")

    request = server.manager.requests("Generate")[0]
    assert isinstance(request, pb.GenerateRequest)
    assert request.prompt == "from stdin"


@pytest.mark.parametrize(
    ("arguments", "piped"), [((), ""), (("-",), "\n"), (("",), None), ((" ", "--raw"), None)]
)
def test_run_refuses_a_prompt_without_a_text(
    paddock: Paddock, server: FakeServer, arguments: tuple[str, ...], piped: str | None
) -> None:
    result = paddock("run", "tiny", *arguments, input=piped)

    assert result.exit_code == ExitCode.USAGE
    assert "There is nothing to answer" in result.stderr
    assert server.manager.calls == []


@pytest.mark.parametrize("command", [("run", "tiny", "Hi"), ("chat", "tiny")], ids=" ".join)
def test_an_error_in_the_middle_of_an_answer_begins_a_line(
    paddock: Paddock, server: FakeServer, command: tuple[str, ...]
) -> None:
    server.manager.truncate = True

    result = paddock(*command, input="Hi\n")

    assert result.stdout == "Hello, wörld!\n"
    assert result.stderr.startswith("Error: ")


def test_run_continues_the_text_when_the_model_has_no_chat_template(
    paddock: Paddock, server: FakeServer
) -> None:
    server.manager.models["tiny"].info.has_chat_template = False

    paddock("run", "tiny", "Once")
    refused = paddock("run", "tiny", "Once", "--system", "Be brief.")

    request = server.manager.requests("Generate")[0]
    assert isinstance(request, pb.GenerateRequest)
    assert request.prompt == "Once"
    assert refused.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("typed", "seconds"), [("30s", 30), ("1h", 3600), ("1h30m", 5400), ("-1s", 30 * 86_400)]
)
def test_run_and_chat_have_a_model_kept_for_as_long_as_is_typed(
    paddock: Paddock, server: FakeServer, typed: str, seconds: int
) -> None:
    paddock("run", "tiny", "Hi", f"--keep-alive={typed}")
    paddock("chat", "tiny", "--keep-alive", typed, input="Hi\n")

    for request in server.manager.requests("Generate"):
        assert isinstance(request, pb.GenerateRequest)
        assert request.keep_alive.ToSeconds() == seconds
    assert len(server.manager.requests("Generate")) == 2


@pytest.mark.parametrize("typed", ["5", "soon", "31d", "721h"])
def test_a_keep_alive_that_is_no_duration_is_refused_with_what_would_be_right(
    paddock: Paddock, server: FakeServer, typed: str
) -> None:
    result = paddock("run", "tiny", "Hi", "--keep-alive", typed)

    assert result.exit_code == ExitCode.USAGE
    assert "--keep-alive" in result.stderr
    assert "must be" in result.stderr
    assert server.manager.calls == []


def test_run_json_is_one_event_a_line(paddock: Paddock) -> None:
    lines = events(paddock("run", "tiny", "Hi", "--json"))

    assert lines[0] == {"event": "started", "generation_id": "g-1", "model": "tiny"}
    assert "".join(line["text"] for line in lines[1:-1]) == "Hello, wörld!"
    assert lines[-2]["finish_reason"] == "stop"
    assert lines[-1]["usage"] == {"prompt_tokens": 3, "cached_prompt_tokens": 1, "completion_tokens": 4}


def test_help_in_a_chat_is_no_question(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("chat", "tiny", input="/help\n")

    assert "/clear forgets" in result.stderr
    assert server.manager.requests("Generate") == []


def test_chat_keeps_what_was_said_until_it_is_cleared(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("chat", "tiny", input="one\n\ntwo\n/clear\nthree\n")

    assert result.stdout == "Hello, wörld!\n" * 3
    assert result.exit_code == ExitCode.OK
    said = [
        [part.text for message in request.chat.messages for part in message.content]
        for request in server.manager.requests("Generate")
        if isinstance(request, pb.GenerateRequest)
    ]
    assert said == [["one"], ["one", "Hello, wörld!", "two"], ["three"]]


def test_chat_goes_on_after_an_error(paddock: Paddock, server: FakeServer) -> None:
    server.manager.errors["Generate"] = make_error(Reason.QUEUE_FULL, "Full.", retry_after_seconds=4)
    result = paddock("chat", "tiny", input="one\ntwo\n")

    assert result.stderr == "Error: Full. Try again in 4 s.\n" * 2
    assert result.exit_code == ExitCode.OK


def test_chat_refuses_a_model_without_a_chat_template(paddock: Paddock, server: FakeServer) -> None:
    server.manager.models["tiny"].info.has_chat_template = False

    result = paddock("chat", "tiny", input="one\n")

    assert result.exit_code == ExitCode.FAILED
    assert "`paddock run tiny TEXT`" in result.stderr
