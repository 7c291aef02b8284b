"""Who is at an address, and how a running server is. Everything has a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from datetime import UTC, datetime
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paddock.client import Client
from paddock.errors import PaddockError
from paddock.transport import connect
from paddock.types import Model, ModelState
from paddock_server.doctor.findings import Answer, Port, Running

ANSWER_SECONDS: Final = 3.0
"""How long somebody at an address may take to answer."""

_MOST_ANSWER_BYTES: Final = 64 * 1024

# The stub package knows only the synchronous stub.
_HEALTH: Any = health_pb2_grpc


async def grpc_port(host: str, port: int) -> Port:
    """Find out who is at the gRPC address."""
    return await _port("gRPC", host, port, "--grpc-port")


async def http_port(host: str, port: int) -> Port:
    """Find out who is at the HTTP address."""
    return await _port("HTTP", host, port, "--port")


async def _port(purpose: str, host: str, port: int, flag: str) -> Port:
    address = target(host, port)
    if port == 0:
        return Port(purpose, address, flag, Answer.FREE)
    # An address that means every interface is reached on loopback.
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    if not await _is_answered(reachable, port):
        fault = await asyncio.to_thread(_listen_fault, host, port)
        return Port(purpose, address, flag, Answer.REFUSED if fault else Answer.FREE, fault)
    version = await (_grpc_version if purpose == "gRPC" else _http_version)(reachable, port)
    if version is None:
        return Port(purpose, address, flag, Answer.OTHER)
    return Port(purpose, address, flag, Answer.PADDOCK, version)


async def _is_answered(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _listen_fault(host: str, port: int) -> str:
    """Return why an address cannot be listened on, or empty."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            # As the server does: connections that are being wound up do not keep an address.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return ""
    except OSError as error:
        return error.strerror or str(error)


async def _grpc_version(host: str, port: int) -> str | None:
    """Return the version of the Paddock there; None when it is none."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS), Client.connect(target(host, port)) as client:
            return (await client.server_info()).version
    except (PaddockError, TimeoutError):
        return None


async def _http_version(host: str, port: int) -> str | None:
    """Return an empty version when a Paddock gateway is there; None when it is something else."""
    ask = f"GET /health HTTP/1.1\r\nHost: {target(host, port)}\r\nConnection: close\r\n\r\n"
    answer = b""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(ask.encode())
                while len(answer) < _MOST_ANSWER_BYTES and (part := await reader.read(4096)):
                    answer += part
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return "" if b"x-request-id:" in head.lower() and _is_health(body) else None


def _is_health(body: bytes) -> bool:
    """Return whether a body is what a gateway answers: well, or an error of ours."""
    try:
        document: Any = json.loads(body)
    except ValueError:
        return False
    return isinstance(document, dict) and ("status" in document or "error" in document)


async def running_server(address: str) -> Running | None:
    """Ask a server how it is; None when none answers in time. Listing many models may take longer."""
    async with Client.connect(address) as client:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                info = await client.server_info()
        except (PaddockError, TimeoutError):
            return None
        models = await _models(client)
    started = info.start_time or datetime.now(UTC)
    return Running(
        address=address,
        version=info.version,
        uptime_seconds=max(0.0, (datetime.now(UTC) - started).total_seconds()),
        serving=await _is_serving(address),
        loaded=sum(model.state is ModelState.LOADED for model in models),
        failed={
            model.id: model.last_failure.message if model.last_failure else "it does not say why"
            for model in models
            if model.state is ModelState.FAILED
        },
        restarts={
            model.id: model.worker.restart_count
            for model in models
            if model.worker is not None and model.worker.restart_count
        },
        memory={
            device.display_name: (device.held_bytes, device.budget_bytes)
            for device in info.devices
            if device.budget_bytes  # an older server does not say
        },
    )


async def _models(client: Client) -> tuple[Model, ...]:
    try:
        return await client.list()
    except PaddockError:  # it is stopping, which its health says too
        return ()


async def _is_serving(address: str) -> bool:
    async with connect(address) as channel:
        stub = _HEALTH.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return False
    return response.status == health_pb2.HealthCheckResponse.SERVING


def target(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
