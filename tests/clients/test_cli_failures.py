from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paddock.cli.failures import FLAGS, ExitCode, describe, exit_code, near_names
from paddock.errors import TABLE, InvalidFieldError, ModelNotFoundError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.clients.invoke import COMMANDS

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

EXPECTED = {
    Reason.MODEL_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.HUB_FILE_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.HUB_ACCESS_DENIED: ExitCode.FAILED,
    Reason.HUB_UNREACHABLE: ExitCode.UNAVAILABLE,
    Reason.MODEL_NOT_LOADED: ExitCode.FAILED,
    Reason.MODEL_IN_USE: ExitCode.FAILED,
    Reason.OPTIONS_CONFLICT: ExitCode.FAILED,
    Reason.LOAD_IN_PROGRESS: ExitCode.FAILED,
    Reason.LOAD_ABORTED: ExitCode.FAILED,
    Reason.LOAD_ID_MISMATCH: ExitCode.FAILED,
    Reason.WATCH_TOO_SLOW: ExitCode.FAILED,
    Reason.REVISION_GONE: ExitCode.FAILED,
    Reason.INSUFFICIENT_MEMORY: ExitCode.CANNOT_LOAD,
    Reason.DISK_FULL: ExitCode.CANNOT_LOAD,
    Reason.QUEUE_FULL: ExitCode.UNAVAILABLE,
    Reason.RATE_LIMITED: ExitCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: ExitCode.UNAVAILABLE,
    Reason.WORKER_CRASHED: ExitCode.UNAVAILABLE,
    Reason.SERVER_UNREACHABLE: ExitCode.SERVER_UNREACHABLE,
    Reason.CRASH_LOOP: ExitCode.CANNOT_LOAD,
    Reason.UNSUPPORTED_MODEL: ExitCode.CANNOT_LOAD,
    Reason.MODEL_UNLOADED: ExitCode.FAILED,
    Reason.INVALID_CONFIG: ExitCode.FAILED,
    Reason.INVALID_FIELD: ExitCode.USAGE,
    Reason.INVALID_GRAMMAR: ExitCode.USAGE,
    Reason.TEMPLATE_ERROR: ExitCode.FAILED,
    Reason.CONTEXT_LENGTH_EXCEEDED: ExitCode.USAGE,
    Reason.MODEL_CORRUPT: ExitCode.CANNOT_LOAD,
    Reason.LOAD_STALLED: ExitCode.CANNOT_LOAD,
    Reason.KEY_MISSING: ExitCode.FAILED,
    Reason.KEY_INVALID: ExitCode.FAILED,
    Reason.SCOPE_DENIED: ExitCode.FAILED,
    Reason.NOT_IMPLEMENTED: ExitCode.FAILED,
    Reason.DEADLINE_EXCEEDED: ExitCode.FAILED,
    Reason.CANCELLED: ExitCode.FAILED,
    Reason.INTERNAL: ExitCode.FAILED,
}


@pytest.mark.parametrize("reason", TABLE)
def test_every_reason_has_its_exit_code(reason: str) -> None:
    assert exit_code(reason) is EXPECTED[Reason(reason)]


def test_a_reason_of_a_newer_server_is_a_failure() -> None:
    assert exit_code("FROM_THE_FUTURE") is ExitCode.FAILED


@pytest.mark.parametrize("reason", TABLE)
def test_every_error_is_described_in_one_line(reason: str) -> None:
    for metadata in ({}, {"model": "m"}):
        text = describe(make_error(reason, "It happened.", metadata=metadata), "host:1")

        assert text
        assert "\n" not in text
        assert "None" not in text


def test_what_to_do_is_said_with_the_error() -> None:
    def described(reason: Reason, **arguments: object) -> str:
        return describe(make_error(reason, "It happened.", **arguments), "host:1")  # pyright: ignore[reportArgumentType]

    conflict = {"model": "m", "fields": "slot_count"}
    assert "host:1" in described(Reason.SERVER_UNREACHABLE)
    assert "`paddock up`" in described(Reason.SERVER_UNREACHABLE)
    assert "`paddock ls`" in describe(ModelNotFoundError.of("nope"), "host:1")
    assert "'nope'" in describe(ModelNotFoundError.of("nope"), "host:1")
    assert "`paddock load m`" in described(Reason.MODEL_NOT_LOADED, metadata={"model": "m"})
    assert "`--on-conflict reload`" in described(Reason.OPTIONS_CONFLICT, metadata=conflict)
    assert "(--parallel)" in described(Reason.OPTIONS_CONFLICT, metadata=conflict)
    assert "`paddock logs m`" in described(Reason.CRASH_LOOP, metadata={"model": "m"})
    assert "Try again in 4 s." in described(Reason.QUEUE_FULL, retry_after_seconds=4.0)
    assert "Try again" in described(Reason.HUB_UNREACHABLE, metadata={"status": "503"})
    assert described(Reason.HUB_UNREACHABLE) == "It happened."  # which says what to do
    assert "r-7" in described(Reason.INTERNAL, request_id="r-7")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Foal", ["foal"]),
        ("foal.gguf", ["foal"]),
        ("my-own.GGUF", ["My-Own"]),
        ("hf:ORG/repo:q4_k_m", ["org/repo:Q4_K_M"]),
        ("sub/iner", ["sub/inner"]),
        ("nothing of the kind", []),
    ],
)
def test_names_are_near_whatever_their_case_and_ending(typed: str, meant: list[str]) -> None:
    assert near_names(typed, ["foal", "My-Own", "org/repo:Q4_K_M", "sub/inner"]) == meant


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hf:org/repo", " `paddock pull hf:org/repo` downloads it."),
        ("sub/inner", ""),
        *[
            (path, " A path is no name: `paddock up --models-dir` serves files.")
            for path in ("./tiny", "/models/tiny", "~/tiny", "models/tiny.gguf", "TINY.GGUF")
        ],
    ],
)
def test_the_hint_of_an_unknown_name_fits_its_form(name: str, hint: str) -> None:
    error = ModelNotFoundError.of(name)
    start = f"There is no model named {name!r}."

    assert describe(error, "host:1") == f"{start} `paddock ls` shows the models there are.{hint}"
    assert describe(error, "host:1", ["near", "by"]) == f"{start} Did you mean near, by?"


REQUESTS = (pb.LoadRequest, pb.UnloadRequest, pb.StreamLogsRequest, pb.GenerateRequest)
TYPED = {
    name
    for command in COMMANDS.values()
    for parameter in command.params
    for name in (*parameter.opts, parameter.metavar)
}


@pytest.mark.parametrize("field", FLAGS)
def test_a_wrong_field_is_told_by_the_flag_that_is_typed_for_it(field: str) -> None:
    error = InvalidFieldError.of(field, "must be right")

    assert describe(error, "host:1") == f"{FLAGS[field]}: must be right"
    assert FLAGS[field] in TYPED
    assert any(_has(request.DESCRIPTOR, field.split(".")) for request in REQUESTS), "no such field"


def _has(message: Descriptor | None, path: list[str]) -> bool:
    field = message.fields_by_name.get(path[0]) if message is not None else None
    return field is not None and (len(path) == 1 or _has(field.message_type, path[1:]))


def test_an_element_of_a_list_is_told_by_its_flag_and_an_unknown_field_by_its_name() -> None:
    assert describe(InvalidFieldError.of("stop.stop_sequences[0]", "is long"), "") == "--stop: is long"
    assert describe(InvalidFieldError.of("from.the_future", "is wrong"), "") == "from.the_future: is wrong"


def test_every_option_of_a_load_has_a_flag() -> None:
    names = {f"runtime_options.{field.name}" for field in model_pb2.RuntimeOptions.DESCRIPTOR.fields}

    assert names == {field for field in FLAGS if field.startswith("runtime_options.")}
