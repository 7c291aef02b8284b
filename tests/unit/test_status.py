from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import (  # pyright: ignore[reportMissingTypeStubs]
    code_pb2,
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status

from paddock.errors import TABLE, Code, FieldViolation, InvalidFieldError, PaddockError, Reason, make_error
from paddock.status import (
    MAX_STATUS_BYTES,
    STATUS_DETAILS_KEY,
    from_generation_error,
    from_rpc_error,
    to_generation_error,
    to_status,
)
from paddock.v1 import model_manager_pb2 as pb


def rpc_error(
    code: grpc.StatusCode, details: str = "", trailing: tuple[tuple[str, str | bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, str | bytes], ...]:
    """What the server sends: `context.abort_with_status` takes a status made like this."""
    return rpc_status.to_status(status).trailing_metadata  # pyright: ignore[reportUnknownMemberType]


def over_the_wire(error: PaddockError, *, request_id: str = "") -> PaddockError:
    status = to_status(error, request_id=request_id)
    return from_rpc_error(
        rpc_error(grpc.StatusCode[error.code.name], status.message, trailing_metadata(status))
    )


def details_of(status: status_pb2.Status) -> set[str]:
    return {detail.TypeName().removeprefix("google.rpc.") for detail in status.details}


@pytest.mark.parametrize("reason", TABLE)
def test_every_row_of_the_table_comes_back_as_it_went_out(reason: str) -> None:
    sent = make_error(
        reason,
        "What happened, with “quotes”.",
        metadata={"model": "m", "needed_bytes": "12"},
        violations=[FieldViolation("sampling.top_p", "must be in (0, 1]")],
        resource="m",
        retry_after_seconds=2.5,
    )

    received = over_the_wire(sent, request_id="r-1")

    assert type(received) is type(sent)
    assert received.reason == sent.reason
    assert received.code is sent.code is TABLE[reason].code
    assert received.message == sent.message
    assert received.metadata == sent.metadata
    assert received.violations == sent.violations
    assert received.resource == sent.resource
    assert received.retry_after_seconds == 2.5
    assert received.request_id == "r-1"


@pytest.mark.parametrize("retry_after_seconds", [None, 2.5])
@pytest.mark.parametrize("reason", TABLE)
def test_every_row_of_the_table_comes_back_from_a_message(
    reason: str, retry_after_seconds: float | None
) -> None:
    sent = make_error(
        reason,
        "What happened, with “quotes”.",
        metadata={"model": "m", "log_tail": "a line\n" * 200},
        violations=[
            FieldViolation("sampling.top_p", "must be in (0, 1]"),
            FieldViolation("model", "is wrong"),
        ],
        resource="m",
        retry_after_seconds=retry_after_seconds,
        request_id="r-0",
    )

    received = from_generation_error(to_generation_error(sent))

    assert type(received) is type(sent)
    assert vars(received) == vars(sent)
    assert from_generation_error(to_generation_error(sent, request_id="r-1")).request_id == "r-1"


def test_a_message_keeps_a_reason_and_a_code_this_client_does_not_know() -> None:
    unknown = pb.GenerationError(code=99, reason="NEWER", message="Sentence.")
    odd = pb.GenerationError(code=code_pb2.Code.Value("ABORTED"), reason="NEWER", message="Sentence.")

    assert (from_generation_error(unknown).reason, from_generation_error(unknown).code) == (
        "NEWER",
        Code.INTERNAL,
    )
    assert from_generation_error(odd).code is Code.ABORTED


def test_a_message_takes_texts_that_are_no_utf8_and_bounds_long_ones() -> None:
    name = "\udcff" + "x" * 1_000_000
    message = to_generation_error(make_error(Reason.MODEL_NOT_FOUND, name, metadata={"file": name}))

    assert message.ByteSize() < 64 * 1024


@pytest.mark.parametrize("reason", TABLE)
def test_the_numeric_code_and_the_details_are_those_of_the_row(reason: str) -> None:
    status = to_status(make_error(reason, "Sentence."))

    assert status.code == code_pb2.Code.Value(TABLE[reason].code.name)
    expected = {"ErrorInfo"}
    if TABLE[reason].retryable:
        expected.add("RetryInfo")
    if TABLE[reason].code is Code.FAILED_PRECONDITION:
        expected.add("PreconditionFailure")
    assert details_of(status) == expected


def test_a_wrong_field_is_named_in_bad_request() -> None:
    status = to_status(InvalidFieldError.of("chat.messages[2].role", "must be set"))

    assert details_of(status) == {"ErrorInfo", "BadRequest"}
    bad_request = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad_request)
    assert [(v.field, v.description) for v in bad_request.field_violations] == [
        ("chat.messages[2].role", "must be set")
    ]


def test_the_errors_own_request_id_is_used_when_the_caller_gives_none() -> None:
    assert over_the_wire(PaddockError(Reason.INTERNAL, "Bug.", request_id="r-2")).request_id == "r-2"


def test_a_reason_of_a_newer_server_keeps_its_reason_and_its_code() -> None:
    received = over_the_wire(PaddockError("FROM_THE_FUTURE", "New.", code=Code.ABORTED))

    assert (received.reason, received.code) == ("FROM_THE_FUTURE", Code.ABORTED)
    assert type(received) is PaddockError


REASON_OF_CODE = {
    grpc.StatusCode.UNAVAILABLE: Reason.SERVER_UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.INVALID_FIELD,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    grpc.StatusCode.UNAUTHENTICATED: Reason.KEY_INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Reason.SCOPE_DENIED,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_without_error_info_the_grpc_code_decides(code: grpc.StatusCode) -> None:
    received = from_rpc_error(rpc_error(code, "lower-level words"))

    assert received.reason == REASON_OF_CODE.get(code, Reason.INTERNAL)
    assert (received.retry_after_seconds is not None) == (code is grpc.StatusCode.UNAVAILABLE)
    assert received.message.startswith("The call failed") == (code not in REASON_OF_CODE)
    assert received.metadata == {"grpc_code": code.name}
    assert received.code.name == (code.name if code.name in Code.__members__ else "INTERNAL")
    assert "lower-level words" in received.message


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff not a status",
        status_pb2.Status(code=14).SerializeToString(),
        status_pb2.Status(
            details=[AnyMessage(type_url="type.googleapis.com/google.rpc.DebugInfo")]
        ).SerializeToString(),
    ],
)
def test_details_that_are_not_ours_are_not_trusted(details: bytes) -> None:
    received = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "x", ((STATUS_DETAILS_KEY, details),)))

    assert received.reason == Reason.SERVER_UNREACHABLE


def test_the_reason_of_another_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=14)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="example.com"))

    received = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "x", trailing_metadata(status)))

    assert received.reason == Reason.SERVER_UNREACHABLE


@pytest.mark.parametrize("character", ["x", "语"])
def test_a_huge_error_fits_the_metadata_limit_and_keeps_reason_and_both_ends(character: str) -> None:
    tail = "first line" + character * 100_000 + "last line"
    sent = make_error(
        Reason.CRASH_LOOP,
        "Crashed. " + character * 5_000,
        metadata={"log_tail": tail, "signal": "SIGSEGV"},
        violations=[FieldViolation(f"f{i}", character * 5_000) for i in range(50)],
    )

    status = to_status(sent)
    received = over_the_wire(sent)

    assert len(status.SerializeToString()) * 4 / 3 < MAX_STATUS_BYTES
    assert received.reason == Reason.CRASH_LOOP
    assert received.metadata["signal"] == "SIGSEGV"
    assert received.metadata["log_tail"].startswith("first line")
    assert received.metadata["log_tail"].endswith("last line")


def test_text_that_is_not_utf8_is_replaced() -> None:
    received = over_the_wire(PaddockError(Reason.MODEL_CORRUPT, "bad\udc80name"))

    assert received.message == "bad?name"
