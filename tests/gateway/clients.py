"""Clients of the gateway under test: the OpenAI SDK, and plain HTTP."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai

from paddock_gateway.app import create_app
from paddock_gateway.serve import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock_gateway.app import GatewayOptions
    from paddock_gateway.serve import Gateway
    from tests.gateway.fake_api import FakeApi

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Once"}
CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"


@asynccontextmanager
async def in_process(
    api: FakeApi, options: GatewayOptions | None = None
) -> AsyncGenerator[httpx.AsyncClient]:
    """Plain HTTP straight into the application, without a socket. Streams arrive whole."""
    transport = httpx.ASGITransport(app=create_app(api, options))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@asynccontextmanager
async def served(
    api: FakeApi, *, options: GatewayOptions | None = None, drain_seconds: float = 5.0
) -> AsyncGenerator[Gateway]:
    """The gateway on a real socket."""
    async with serve(api, port=0, options=options, drain_seconds=drain_seconds) as gateway:
        yield gateway


@asynccontextmanager
async def sdk(api: FakeApi, **kwargs: Any) -> AsyncGenerator[openai.AsyncOpenAI]:
    """The OpenAI SDK over a real socket, without retries."""
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(served(api, **kwargs))
        yield await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        )


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
    """Post a request body with more parameters in it."""
    return await client.post(path, json={**body, **more})


def events(response: httpx.Response) -> list[Any]:
    """Return the data of a stream's events, decoded; `[DONE]` stays text."""
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


class RawConnection:
    """A request on a bare socket, for tests about the connection itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read_until(self, separator: bytes) -> bytes:
        """Return everything up to and including a separator."""
        async with asyncio.timeout(10):
            return await self._reader.readuntil(separator)

    async def read_rest(self) -> bytes:
        """Return everything up to the end of the connection."""
        async with asyncio.timeout(10):
            return await self._reader.read()

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        await self._writer.wait_closed()


async def connect(gateway: Gateway) -> RawConnection:
    """Open a bare connection that the test closes itself."""
    return RawConnection(*await asyncio.open_connection(gateway.host, gateway.port))


@asynccontextmanager
async def connection(gateway: Gateway) -> AsyncGenerator[RawConnection]:
    """A bare connection to the gateway."""
    raw = await connect(gateway)
    try:
        yield raw
    finally:
        await raw.close()


def request_bytes(path: str, body: dict[str, Any], *headers: str, host: str = "127.0.0.1") -> bytes:
    """Return a POST request as it goes over the wire."""
    payload = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(payload)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + payload
