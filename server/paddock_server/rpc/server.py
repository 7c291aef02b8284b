"""The gRPC server: options, services, address."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paddock.listening import GRPC, bind_error, cannot_listen, host_port
from paddock.v1 import model_manager_pb2, model_manager_pb2_grpc
from paddock_server.manager.tasks import Tasks
from paddock_server.rpc.health import SERVING, HealthServicer, follow_models
from paddock_server.rpc.interceptor import CallInterceptor
from paddock_server.rpc.multiplex import GenerationStreams
from paddock_server.rpc.servicer import ModelManagerServicer

if TYPE_CHECKING:
    from paddock.api import ModelManagerApi

MAX_RECEIVE_BYTES: Final = 16 * 1024 * 1024
"""Room for a long conversation with images in one request."""

MAX_SEND_BYTES: Final = 4 * 1024 * 1024
"""What every gRPC client takes by default; responses are made to stay below it."""

SERVICE: Final = model_manager_pb2.DESCRIPTOR.services_by_name["ModelManager"].full_name

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
    # Without this, a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
    # A stream may be silent for minutes while a model loads. Clients may ping every ten seconds to keep
    # middleboxes from dropping it, and the server pings too, to notice a client whose machine has gone.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class AddressInUseError(Exception):
    """The address cannot be listened on; the message says which and what to do."""


class RpcServer:
    """The gRPC server with its health service."""

    def __init__(self, service: ModelManagerApi, *, host: str, port: int, with_reflection: bool) -> None:
        self._server = grpc.aio.server(interceptors=(CallInterceptor(),), options=_OPTIONS)
        self._service = service
        self._health = HealthServicer()
        self._tasks = Tasks()
        self._streams = GenerationStreams(service)
        servicer = ModelManagerServicer(service, self._streams)
        model_manager_pb2_grpc.add_ModelManagerServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            bound_port = self._server.add_insecure_port(host_port(host, port))
        except RuntimeError as error:
            # gRPC does not say why.
            why = bind_error(host, port) or error
            raise AddressInUseError(cannot_listen(GRPC, host, port, why)) from error
        self.address = host_port(host, bound_port)

    async def start(self) -> None:
        """Accept calls, and say so in the health service."""
        self._tasks.run(follow_models(self._service, self._health), "model-health")
        # Its first pass takes in all models there are, which nobody is to wait for: 0.12 s for 10,000.
        await asyncio.sleep(0)
        await self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, SERVING)

    def announce_stop(self) -> None:
        """Turn every service's health to NOT_SERVING, for good, and end shared streams once they are idle."""
        self._health.stop()
        self._streams.drain()

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, let running ones end for that long, then cancel them."""
        await self._server.stop(grace_seconds)
        await self._tasks.cancel()
