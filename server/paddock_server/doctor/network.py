"""Who is at an address, and how a running server is. Everything has a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paddock.client import Client
from paddock.errors import PaddockError
from paddock.listening import GRPC, Front, bind_error, host_port, listen_fault
from paddock.transport import connect
from paddock.types import Model, ModelState
from paddock_server.doctor.probes import in_thread
from paddock_server.doctor.serving import Answer, Port, Running, Unanswered

ANSWER_SECONDS: Final = 3.0
"""How long somebody at an address may take to answer."""

LIST_SECONDS: Final = 10.0
"""How long a server may take to list its models, of which there may be thousands."""

_MOST_ANSWER_BYTES: Final = 64 * 1024
REACHED_AT: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""Where addresses that mean every interface are reached."""

# The stub package knows only the synchronous stub.
_HEALTH: Any = health_pb2_grpc


async def examine_port(front: Front, host: str, port: int) -> Port:
    """Find out who is at an address that a server would listen on."""
    address = host_port(host, port)
    if port == 0:
        return Port(front, address, Answer.NOBODY)
    try:
        found = await _looked_up(host, port)
    except (OSError, UnicodeError) as error:
        return Port(front, address, Answer.NOBODY, fault=listen_fault(front, error))
    refusal = bind_error(found[0], port)
    if refusal is None:
        return Port(front, address, Answer.NOBODY)
    if isinstance(refusal, OSError) and refusal.errno == errno.EADDRINUSE:
        for numeric in found:
            reachable = REACHED_AT.get(numeric, numeric)
            if await _is_answered(reachable, port):
                version = await (_grpc_version if front is GRPC else _http_version)(reachable, port)
                return Port(
                    front, address, Answer.OTHER if version is None else Answer.PADDOCK, version or ""
                )
    return Port(front, address, Answer.NOBODY, fault=listen_fault(front, refusal))


async def _looked_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host as numbers: whoever gets them looks nothing up.

    Raises:
        OSError, UnicodeError: there is none, or none was found in time.
    """
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await in_thread(look_up)
    except TimeoutError:
        message = f"the name service did not answer within {ANSWER_SECONDS:g} s"
        raise socket.gaierror(socket.EAI_AGAIN, message) from None
    return [str(entry[4][0]) for entry in found]


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


async def _grpc_version(host: str, port: int) -> str | None:
    """Return the version of the Paddock there; None when it is none."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS), Client.connect(host_port(host, port)) as client:
            return (await client.server_info()).version
    except (PaddockError, TimeoutError):
        return None


async def _http_version(host: str, port: int) -> str | None:
    """Return an empty version when a Paddock gateway is there; None when it is something else."""
    ask = f"GET /health HTTP/1.1\r\nHost: {host_port(host, port)}\r\nConnection: close\r\n\r\n"
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


async def ask_server(address: str) -> Running | Unanswered:
    """Ask a server how it is."""
    async with Client.connect(address) as client:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                info = await client.server_info()
        except TimeoutError:
            return Unanswered(address, f"there was no answer within {ANSWER_SECONDS:g} s")
        except PaddockError as error:
            return Unanswered(address, error.message)
        models = await _models(client)
    started = info.start_time or datetime.now(UTC)
    known = models or ()
    return Running(
        address=address,
        version=info.version,
        uptime_seconds=max(0.0, (datetime.now(UTC) - started).total_seconds()),
        serving=await _is_serving(address),
        loaded=None if models is None else sum(model.state is ModelState.LOADED for model in models),
        failed={
            model.id: model.last_failure.message if model.last_failure else "it does not say why"
            for model in known
            if model.state is ModelState.FAILED
        },
        restarts={model.id: count for model in known if (count := _restart_count(model))},
        memory={
            device.display_name: (device.held_bytes, device.budget_bytes)
            for device in info.devices
            if device.budget_bytes  # an older server does not say
        },
    )


def _restart_count(model: Model) -> int:
    return sum(worker.restart_count for worker in model.workers)


async def _models(client: Client) -> tuple[Model, ...] | None:
    try:
        async with asyncio.timeout(LIST_SECONDS):
            return await client.list()
    except (PaddockError, TimeoutError):
        return None


async def _is_serving(address: str) -> bool | None:
    async with connect(address) as channel:
        stub = _HEALTH.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return None
    return response.status == health_pb2.HealthCheckResponse.SERVING
