"""Every row of the error table over a real channel: code, reason, details, and back to the same exception."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from grpc_status import rpc_status

from paddock import errors
from paddock.errors import TABLE, Code, FieldViolation, PaddockError, Reason, make_error
from paddock.transport import GrpcApi, connect
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_manager_pb2_grpc
from paddock_server.rpc.server import RpcServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


UNTYPED: Any = rpc_status
DETAILS: Any = importlib.import_module("google.rpc.error_details_pb2")


class RaisingService:
    """Raises the error whose reason is the model's name; everything else about a service is absent."""

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        raise _error(request.model)

    async def generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(started=pb.Started(generation_id="g"))
        raise _error(request.model)


def _error(reason: str) -> PaddockError:
    if reason == "BUG":
        raise ZeroDivisionError
    violations = (
        (FieldViolation("sampling.top_p", "must be at most 1"),) if reason == Reason.INVALID_FIELD else ()
    )
    resource = "m" if reason == Reason.MODEL_NOT_FOUND else ""
    return make_error(
        reason,
        f"A sentence about {reason}.",
        metadata={"model": "m"},
        violations=violations,
        resource=resource,
    )


@pytest.fixture
async def address() -> AsyncIterator[str]:
    service: Any = RaisingService()
    server = RpcServer(service, host="127.0.0.1", port=0, with_reflection=False)
    await server.start()
    yield server.address
    await server.stop(0)


def test_every_reason_has_a_row() -> None:
    assert set(TABLE) == set(Reason)


@pytest.mark.parametrize("reason", list(Reason))
async def test_a_row_reaches_the_caller_whole(address: str, reason: Reason) -> None:
    row = TABLE[reason]
    async with connect(address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Get(pb.GetRequest(model=reason))
        details = _details(caught.value)
        with pytest.raises(errors.error_class(reason)) as raised:
            await GrpcApi(channel).get(pb.GetRequest(model=reason))

    assert row.code.name == caught.value.code().name
    info = details["ErrorInfo"]
    assert (reason, "paddock", {"model": "m"}) == (info.reason, info.domain, dict(info.metadata))
    assert row.retryable == ("RetryInfo" in details)
    assert (reason == Reason.INVALID_FIELD) == ("BadRequest" in details)
    assert (reason == Reason.MODEL_NOT_FOUND) == ("ResourceInfo" in details)
    assert (row.code is Code.FAILED_PRECONDITION) == ("PreconditionFailure" in details)
    assert reason == raised.value.reason
    assert f"A sentence about {reason}." == raised.value.message
    assert raised.value.request_id


async def test_a_status_may_end_a_stream_after_its_first_message(address: str) -> None:
    async with connect(address) as channel:
        stream = GrpcApi(channel).generate(pb.GenerateRequest(model=Reason.WORKER_CRASHED))
        first = await anext(stream)
        with pytest.raises(errors.ModelUnavailableError):
            await anext(stream)

    assert first.HasField("started")


async def test_a_bug_is_internal_and_tells_nothing_but_the_request_id(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with connect(address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Get(pb.GetRequest(model="BUG"), metadata=(("x-request-id", "req-7"),))

    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "req-7" in (caught.value.details() or "")
    assert "ZeroDivisionError" not in (caught.value.details() or "")
    assert "ZeroDivisionError" in "".join(capsys.readouterr())


def _details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = UNTYPED.from_call(error)
    assert status is not None
    found: dict[str, Any] = {}
    for detail in status.details:
        name = detail.type_url.rpartition(".")[2]
        message = getattr(DETAILS, name)()
        assert detail.Unpack(message)
        found[name] = message
    return found
