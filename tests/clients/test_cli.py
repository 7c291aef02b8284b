from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import ExitCode
from paddock.errors import Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.clients.invoke import COMMANDS, Paddock, events

if TYPE_CHECKING:
    from tests.clients.fake_server import FakeServer


def test_ls_lists_every_model_with_its_state(paddock: Paddock) -> None:
    result = paddock("ls")

    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == [
        *("MODEL", "STATE", "SIZE", "MEMORY", "USED", "QUANTIZATION", "PARAMETERS", "CONTEXT")
    ]
    assert [line[0] for line in lines[1:]] == ["broken", "cold", "endless", "stuck", "tiny"]
    assert lines[1][1:3] == ["failed", "(WORKER_CRASHED)"]
    assert (result.exit_code, result.stderr) == (ExitCode.OK, "")


def test_ls_of_a_server_without_models_writes_a_note_and_no_result(
    paddock: Paddock, server: FakeServer
) -> None:
    server.manager.models.clear()

    result = paddock("ls")

    assert result.stdout == ""
    assert "--models-dir" in result.stderr


def test_ps_lists_models_with_a_worker_only(paddock: Paddock) -> None:
    lines = paddock("ps").stdout.splitlines()

    assert [line.split()[0] for line in lines[1:]] == ["endless", "tiny"]


def test_ps_shows_memory_requests_expiry_restarts_and_use(paddock: Paddock, server: FakeServer) -> None:
    tiny = server.manager.models["tiny"]
    tiny.lease_count, tiny.worker.queued_request_count = 5, 2
    tiny.worker.restart_count = 1
    tiny.memory.phase = model_pb2.MEMORY_PHASE_MEASURED
    tiny.memory.bytes["RAM"] = 60 * 2**20
    tiny.runtime_options.sleep_timeout.FromSeconds(4 * 86_400)
    tiny.last_use_time.FromSeconds(int(time.time()) - 90)
    tiny.expire_time.FromSeconds(int(time.time()) + 3 * 86_400 + 60)

    header, _, line = paddock("ps").stdout.splitlines()

    assert re.split(r"\s{2,}", header.strip()) == [
        *("MODEL", "STATE", "MEMORY", "REQUESTS", "WAITING", "EXPIRES", "USED", "KV CACHE", "RESTARTS")
    ]
    cells = re.split(r"\s{2,}", line.strip())
    assert cells[:6] == ["tiny", "loaded", "60.0 MiB", "5", "2 slot", "sleeps in 3d"]
    assert cells[6:] == ["2m ago", "0 of 512", "1"]


@pytest.mark.parametrize(
    "command", [("ls",), ("ls", "--wide"), ("ps",), ("show", "endless"), ("estimate", "tiny")], ids=" ".join
)
def test_what_goes_into_a_pipe_is_whole_without_padding_and_colour(
    paddock: Paddock, server: FakeServer, command: tuple[str, ...]
) -> None:
    long = "long-" * 5000 + "end"
    endless = server.manager.models["endless"]
    endless.description, endless.worker.restart_count = long, 1
    endless.aliases.append(long)
    server.manager.models[long] = model_pb2.Model(id=long, state=model_pb2.MODEL_STATE_LOADED)
    server.manager.models[long].memory.bytes["RAM"] = 1

    out = paddock(*command).stdout

    assert out
    assert long in out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line != line.rstrip()]
    assert "…" not in out


def test_ls_and_ps_show_models_that_sleep(paddock: Paddock, server: FakeServer) -> None:
    server.manager.models["tiny"].state = model_pb2.MODEL_STATE_SLEEPING

    for command in ("ls", "ps"):
        assert "sleeping" in paddock(command).stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["ls", "ps"])
def test_wide_lists_say_more(paddock: Paddock, command: str) -> None:
    narrow, wide = paddock(command).stdout.splitlines()[0], paddock(command, "--wide").stdout.splitlines()[0]

    assert wide.startswith(narrow.strip())
    assert len(wide.split()) > len(narrow.split())


def test_json_lists_hold_every_field_of_the_protocol(paddock: Paddock) -> None:
    (shown, *_) = json.loads(paddock("ls", "--json").stdout)

    assert set(shown) == {field.name for field in model_pb2.Model.DESCRIPTOR.fields}


def test_json_lists_hold_what_the_client_knows(paddock: Paddock) -> None:
    models = json.loads(paddock("ls", "--json").stdout)
    loaded = json.loads(paddock("ps", "--json").stdout)

    assert [model["id"] for model in models] == ["broken", "cold", "endless", "stuck", "tiny"]
    assert models[0]["last_failure"]["signal"] == "SIGKILL"
    assert [model["worker"]["pid"] for model in loaded] == [4242, 4242]
    assert models[4]["load_time"] == "2023-11-14T22:13:20+00:00"


def test_show_says_what_is_known_and_why_a_model_failed(paddock: Paddock) -> None:
    text = paddock("show", "broken").stdout

    assert "The worker was ended by SIGKILL." in text
    assert text.count("SIGKILL") == 1
    assert "last line" in text
    assert json.loads(paddock("show", "tiny", "--json").stdout)["info"]["architecture"] == "llama"


def test_load_shows_progress_on_standard_error_and_nothing_on_standard_output(paddock: Paddock) -> None:
    result = paddock("load", "cold")

    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "Starting worker: Starting a worker.",
        "Starting worker: warning: Died once.",
        "Starting worker: done",
        "Reading weights: Reading cold.gguf.",
        "Reading weights: 50% (500 B of 1000 B)",
        "Working: nothing to do",
        "Loaded cold in 1.5 s.",
    ]


def test_load_of_a_loaded_model_says_so(paddock: Paddock) -> None:
    assert paddock("load", "tiny").stderr == "tiny is loaded already.\n"


def test_load_json_is_one_event_a_line_and_ends_with_loaded(paddock: Paddock) -> None:
    result = paddock("load", "cold", "--json")

    progress, loaded = events(result)[:-1], events(result)[-1]
    assert {event["event"] for event in progress} == {"progress"}
    assert progress[4]["fraction"] == 0.5
    assert loaded["event"] == "loaded"
    assert loaded["model"]["state"] == "loaded"
    assert result.stderr == ""


def test_load_sends_only_the_options_that_were_typed(paddock: Paddock, server: FakeServer) -> None:
    paddock("load", "tiny")
    paddock("load", "tiny", "-c", "0", "--parallel", "8", "--on-conflict", "reload")

    assert server.manager.requests("Load") == [
        pb.LoadRequest(model="tiny", conflict_policy=pb.LOAD_CONFLICT_POLICY_FAIL),
        pb.LoadRequest(
            model="tiny",
            conflict_policy=pb.LOAD_CONFLICT_POLICY_RELOAD,
            runtime_options=model_pb2.RuntimeOptions(context_size_tokens=0, slot_count=8),
        ),
    ]


def test_unload_tells_how_many_requests_it_aborted(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("unload", "tiny", "--force")

    assert result.stderr == "Unloaded tiny. 2 requests were aborted.\n"
    assert server.manager.requests("Unload") == [pb.UnloadRequest(model="tiny", mode=pb.UNLOAD_MODE_FORCE)]


def test_sleep_and_pin_say_what_they_did(paddock: Paddock) -> None:
    assert "tiny sleeps" in paddock("sleep", "tiny").stderr
    assert paddock("pin", "tiny").stderr == "tiny is pinned.\n"
    assert paddock("pin", "tiny", "--off").stderr == "tiny is not pinned.\n"
    assert paddock("unpin", "tiny").stderr == "tiny is not pinned.\n"


def test_reload_writes_what_changed_and_notes_what_was_left_out(paddock: Paddock) -> None:
    result = paddock("reload")

    assert result.stdout == "added\tnew\nchanged\ttiny\n"
    assert result.stderr == "models.ini:3: nope: is no option\n2 models are as they were.\n"
    assert json.loads(paddock("reload", "--json").stdout)["problems"][0]["line"] == 3


def test_logs_are_results_and_lost_lines_a_note(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("logs", "tiny", "--tail", "5")

    assert result.stdout == "first\nsecond\n"
    assert result.stderr == "... 3 lines lost ...\n"
    assert server.manager.requests("StreamLogs") == [pb.StreamLogsRequest(model="tiny", tail_line_count=5)]


def test_tokenize_shows_half_characters_as_bytes(paddock: Paddock) -> None:
    assert paddock("tokenize", "tiny", "hé").stdout == "104\t\"h\"\n195\tb'\\xc3'\n169\tb'\\xa9'\n"
    assert json.loads(paddock("tokenize", "tiny", "-", "--json", input="h").stdout) == {
        "token_ids": [104],
        "pieces": ["h"],
    }


def test_version_tells_its_own_and_the_servers(paddock: Paddock) -> None:
    result = paddock("version")

    assert result.stdout.splitlines()[0].startswith("paddock ")
    assert result.stdout.splitlines()[1].split() == ["server", "9.9.9"]


def test_version_works_without_a_server(paddock: Paddock) -> None:
    result = paddock("version", "--server", "127.0.0.1:1")

    assert result.exit_code == ExitCode.OK
    assert result.stderr == "No server answers at 127.0.0.1:1.\n"


CLIENT_COMMANDS = [
    ("ls",),
    ("ps",),
    ("show", "tiny"),
    ("load", "tiny"),
    ("unload", "tiny"),
    ("logs", "tiny"),
    ("watch", "tiny"),
    ("tokenize", "tiny", "text"),
    ("run", "tiny", "Hi"),
    ("chat", "tiny"),
]


@pytest.mark.parametrize("command", CLIENT_COMMANDS, ids=lambda command: command[0])
def test_without_a_server_every_command_says_how_to_start_one(
    paddock: Paddock, command: tuple[str, ...]
) -> None:
    result = paddock(*command, "--server", "127.0.0.1:1", input="")

    assert result.exit_code == ExitCode.SERVER_UNREACHABLE
    assert result.stdout == ""
    assert result.stderr == (
        "Error: No Paddock server answers at 127.0.0.1:1. "
        "Start it with `paddock up`, or name another with --server.\n"
    )


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.INTERNAL, ExitCode.FAILED),
        (Reason.INVALID_FIELD, ExitCode.USAGE),
        (Reason.MODEL_NOT_FOUND, ExitCode.NOT_FOUND),
        (Reason.QUEUE_FULL, ExitCode.UNAVAILABLE),
        (Reason.MODEL_CORRUPT, ExitCode.CANNOT_LOAD),
    ],
)
@pytest.mark.parametrize("command", CLIENT_COMMANDS, ids=lambda command: command[0])
def test_every_command_ends_an_error_with_one_line_and_its_exit_code(
    paddock: Paddock, server: FakeServer, command: tuple[str, ...], reason: Reason, code: ExitCode
) -> None:
    server.manager.error = make_error(reason, "It happened.")

    result = paddock(*command, input="")

    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("load",),
        ("nope",),
        ("load", "tiny", "--on-conflict", "explode"),
        ("logs", "tiny", "--tail", "-1"),
        ("run", "tiny", "text", "--max-tokens", "0"),
        ("show", "bad\udc80name"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(paddock: Paddock, arguments: tuple[str, ...]) -> None:
    result = paddock(*arguments)

    assert result.exit_code == ExitCode.USAGE
    assert "Traceback" not in result.output


def test_standard_input_that_is_not_text_is_refused(paddock: Paddock) -> None:
    result = paddock("run", "tiny", "-", input=b"\xff\xfe")

    assert result.exit_code == ExitCode.USAGE
    assert "not valid UTF-8" in result.stderr


def test_the_load_of_a_run_that_fails_is_its_failure(paddock: Paddock, server: FakeServer) -> None:
    server.manager.errors["Load"] = make_error(Reason.MODEL_CORRUPT, "Bad magic in cold.gguf.")

    result = paddock("run", "cold", "Hi")

    assert result.exit_code == ExitCode.CANNOT_LOAD
    assert result.stderr == "Error: Bad magic in cold.gguf.\n"


def test_estimate_shows_parts_and_a_verdict(paddock: Paddock, server: FakeServer) -> None:
    result = paddock("estimate", "tiny", "--ctx-size", "0", "--cache-type-k", "q8_0")

    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["DEVICE", "FOR", "MEMORY"]
    assert ["RAM", "kv", "cache"] in [line[:3] for line in lines]
    assert ["RAM", "all", "4.0", "MiB", "of", "8.0", "MiB"] in lines
    assert ["RAM", "held", "by", "endless", "47.7", "MiB"] in lines
    assert not [line for line in lines if "tiny" in line], "what it holds itself is part of the estimate"
    assert lines[-1] == ["RAM", "free", "now", "8.0", "MiB"]
    assert "It fits now." in result.stderr
    (request,) = server.manager.requests("EstimateMemory")
    assert isinstance(request, pb.EstimateMemoryRequest)
    assert request.runtime_options.cache_type_k == "q8_0"
    assert request.runtime_options.HasField("context_size_tokens")


def test_an_estimate_of_several_replicas_says_so(paddock: Paddock) -> None:
    result = paddock("estimate", "tiny", "--ctx-size", "9", "--replicas", "3")
    assert "With 9 tokens of context for 4 sequences in each of 3 replicas." in result.stderr


def test_an_estimate_that_is_rough_says_so(paddock: Paddock) -> None:
    assert "Only roughly." in paddock("estimate", "broken").stderr


def test_an_estimate_that_was_measured_says_so(paddock: Paddock) -> None:
    result = paddock("estimate", "cold")

    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["RAM", "all,", "measured", "4.0", "MiB", "of", "8.0", "MiB"] in lines
    assert "RAM: measured when the model was loaded so before" in result.stderr
    assert "measured" not in paddock("estimate", "tiny").stderr


def test_estimate_as_json_is_what_the_client_knows(paddock: Paddock) -> None:
    found = json.loads(paddock("estimate", "tiny", "--json").stdout)

    assert found["verdict"] == "fits"
    assert found["parts"][1] == {"device": "RAM", "kind": "kv_cache", "size_bytes": 1 << 20}
    assert found["devices"][0]["measured"] is False
    assert found["options"]["slot_count"] == 4


@pytest.mark.parametrize("command", ["show", "load", "run", "chat"])
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(paddock: Paddock, command: str) -> None:
    result = paddock(command, "Tiny.gguf", input="text")

    assert result.exit_code == ExitCode.NOT_FOUND
    assert result.stderr == "Error: There is no model named 'Tiny.gguf'. Did you mean tiny?\n"


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("unload", "tiny"), "aborted_request_count"),
        (("sleep", "tiny"), "state"),
        (("pin", "tiny"), "pinned"),
        (("unpin", "tiny"), "pinned"),
        (("version",), "server"),
        (("check-config",), "problems"),
    ],
    ids=str,
)
def test_commands_that_only_tell_write_json_too(paddock: Paddock, command: tuple[str, ...], key: str) -> None:
    result = paddock(*command, "--json")

    assert key in json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (ExitCode.OK, "")


def test_all_commands_but_those_that_stay_have_json() -> None:
    without = {
        name
        for name, command in COMMANDS.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    }

    assert without == {"chat", "up", "serve", "gateway"}


def test_version_is_a_flag_too(paddock: Paddock) -> None:
    assert paddock("--version").stdout == paddock("version").stdout
