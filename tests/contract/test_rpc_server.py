"""What surrounds the RPCs: health, reflection, request ids, log lines, the port."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from paddock.transport import connect
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_manager_pb2_grpc
from paddock_server.rpc.server import SERVICE, AddressInUseError, RpcServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# The stub packages know only the synchronous stubs.
HEALTH: Any = health_pb2_grpc
REFLECTION: Any = reflection_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class EchoService:
    """Answers Get, and never ends a Watch by itself."""

    def __init__(self) -> None:
        self.watching = asyncio.Event()
        self.closed = asyncio.Event()

    async def get(self, request: pb.GetRequest) -> pb.GetResponse:
        structlog.contextvars.bind_contextvars(model=request.model)
        response = pb.GetResponse()
        response.model.id = request.model
        return response

    async def watch(self, request: pb.WatchRequest) -> AsyncIterator[pb.WatchResponse]:
        del request
        try:
            yield pb.WatchResponse(revision=1)
            self.watching.set()
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
async def server(service: EchoService) -> AsyncIterator[RpcServer]:
    untyped: Any = service
    server = RpcServer(untyped, host="127.0.0.1", port=0, with_reflection=True)
    await server.start()
    yield server
    await server.stop(0)


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_is_serving_overall_and_per_service(server: RpcServer, name: str) -> None:
    async with connect(server.address) as channel:
        stub = HEALTH.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=name))

    assert response.status == SERVING


async def test_health_watch_sees_the_server_going(server: RpcServer) -> None:
    async with connect(server.address) as channel:
        stub = HEALTH.HealthStub(channel)
        watch: Any = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        first = await watch.read()
        server.announce_stop()
        second = await watch.read()
        watch.cancel()

    assert (first.status, second.status) == (SERVING, NOT_SERVING)


async def test_reflection_lists_and_describes_the_service(server: RpcServer) -> None:
    async with connect(server.address) as channel:
        stub = REFLECTION.ServerReflectionStub(channel)
        call: Any = stub.ServerReflectionInfo(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
                ]
            )
        )
        responses = [response async for response in call]

    assert SERVICE in [service.name for service in responses[0].list_services_response.service]
    assert responses[1].file_descriptor_response.file_descriptor_proto


async def test_the_callers_request_id_is_logged_and_comes_back(
    server: RpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with connect(server.address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        call: Any = stub.Get(pb.GetRequest(model="m"), metadata=(("x-request-id", "req-1"),))
        await call
        trailing = dict(await call.trailing_metadata())

    assert trailing["x-request-id"] == "req-1"
    line = next(line for line in "".join(capsys.readouterr()).splitlines() if "req-1" in line)
    for expected in ("Get", "OK", "duration_ms", "model"):
        assert expected in line


@pytest.mark.parametrize("bad", ["a b", "x" * 129, "\N{SNOWMAN}".encode().hex() + "!"])
async def test_a_request_id_unfit_for_a_log_is_replaced(server: RpcServer, bad: str) -> None:
    async with connect(server.address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        call: Any = stub.Get(pb.GetRequest(model="m"), metadata=(("x-request-id", bad),))
        await call
        trailing = dict(await call.trailing_metadata())

    assert trailing["x-request-id"] not in ("", bad)


async def test_cancelling_a_stream_closes_the_services_generator(
    server: RpcServer, service: EchoService
) -> None:
    async with connect(server.address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        call: Any = stub.Watch(pb.WatchRequest())
        await call.read()
        await service.watching.wait()
        call.cancel()
        await asyncio.wait_for(service.closed.wait(), 10)


async def test_a_deadline_closes_the_services_generator(server: RpcServer, service: EchoService) -> None:
    async with connect(server.address) as channel:
        stub = model_manager_pb2_grpc.ModelManagerStub(channel)
        call: Any = stub.Watch(pb.WatchRequest(), timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        await asyncio.wait_for(service.closed.wait(), 10)

    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_second_server_on_the_port_is_refused_with_advice(server: RpcServer) -> None:
    port = int(server.address.rpartition(":")[2])
    untyped: Any = EchoService()

    with pytest.raises(AddressInUseError, match=r"another program has the port.*--grpc-port\."):
        RpcServer(untyped, host="127.0.0.1", port=port, with_reflection=False)
