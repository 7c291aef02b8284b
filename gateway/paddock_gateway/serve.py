"""Running the application in the event loop that is there already."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import uvicorn

from paddock.daemons import is_exposed
from paddock.listening import HTTP, cannot_listen, host_port
from paddock_gateway.app import GatewayOptions, create_app
from paddock_gateway.exchange import log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from paddock.api import ModelManagerApi
    from paddock_gateway.app import GatewayApp

BACKLOG: Final = 2048
MAX_PORT: Final = 65535
KEEP_ALIVE_SECONDS: Final = 30
"""How long an idle connection is kept open for its next request."""

INTERRUPT_SECONDS: Final = 5.0
"""What interrupted requests get to tell their clients why, before their connections are cut."""

AT_ONCE_SECONDS: Final = 2.0
"""The same when the gateway is to stop at once."""

CUT_SECONDS: Final = 2.0
"""What is left to do for requests whose connections have been cut; it is not to send anything."""


class ListenError(Exception):
    """The gateway cannot listen where it was told to; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that accepts requests."""

    host: str
    port: int
    """The real port when 0 was asked for."""

    @property
    def url(self) -> str:
        """Base URL, without `/v1`."""
        return f"http://{host_port(self.host, self.port)}"


class _Server(uvicorn.Server):
    """uvicorn as a guest: the signals are the host's, and it says when it is ready."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.ready.set()


@contextlib.asynccontextmanager
async def serve(
    api: ModelManagerApi,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    drain_seconds: float = 30.0,
    options: GatewayOptions | None = None,
    at_once: asyncio.Event | None = None,
) -> AsyncGenerator[Gateway]:
    """Serve HTTP for as long as the block runs, then stop gracefully.

    At the end of the block nothing new is accepted and running requests may finish. Those that still run
    after `drain_seconds` end with SHUTTING_DOWN.

    Args:
        api: The server: in this process, or over a channel.
        host: Address to listen on. A loopback address answers only requests that call it by such a name.
        port: Port to listen on; 0 takes a free one.
        drain_seconds: How long running requests get.
        options: Settings; the defaults when left out.
        at_once: Ends that time when it is set.

    Raises:
        ListenError: the address is taken or not ours.
    """
    options = options or GatewayOptions()
    if options.allowed_hosts is None and not is_exposed(host):
        options = replace(options, allowed_hosts=_loopback_names(host))
    listener = await _listen(host, port)
    _cut_stalled(listener, options.stalled_client_seconds)
    app = create_app(api, options)
    config = uvicorn.Config(
        app,
        access_log=False,  # the application writes the one line per request
        backlog=BACKLOG,
        lifespan="off",
        log_config=None,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=None,  # `_stop` is in charge: uvicorn would log a traceback per request
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ws="none",
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await _ready(server, running)
        yield Gateway(host, listener.getsockname()[1])
    finally:
        await _stop(server, running, app, drain_seconds, at_once or asyncio.Event())
        listener.close()


async def _ready(server: _Server, running: asyncio.Task[None]) -> None:
    """Wait until the server accepts connections; raise what ended it when it does not get there."""
    ready = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait({ready, running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()
    if running.done():
        running.result()
        message = "The HTTP server stopped before it was ready."
        raise ListenError(message)


async def _stop(
    server: _Server,
    running: asyncio.Task[None],
    app: GatewayApp,
    drain_seconds: float,
    at_once: asyncio.Event,
) -> None:
    """Stop accepting, let requests finish, interrupt those that do not, cut those that cannot be told."""
    server.should_exit = True
    hurried = asyncio.create_task(at_once.wait(), name="stop-gateway-at-once")
    try:
        await asyncio.wait({running, hurried}, timeout=drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            app.interrupt()
            await asyncio.wait({running}, timeout=AT_ONCE_SECONDS if hurried.done() else INTERRUPT_SECONDS)
        if not running.done():
            await _cut(server, running)
    finally:
        hurried.cancel()
        running.cancel()
        await asyncio.wait({running, hurried}, timeout=CUT_SECONDS)
    await _end_requests(server, app)
    if running.done() and not running.cancelled():
        running.result()


async def _cut(server: _Server, running: asyncio.Task[None]) -> None:
    """End the connections that are left: their requests find their clients gone, and end."""
    log.warning("gateway_connections_cut", count=len(server.server_state.connections))
    server.force_exit = True
    for connection in list(server.server_state.connections):
        # Annotated as never None, and None until the connection has been made.
        if connection.transport is not None:  # pyright: ignore[reportUnnecessaryComparison]
            connection.transport.abort()
    await asyncio.wait({running}, timeout=CUT_SECONDS)


async def _end_requests(server: _Server, app: GatewayApp) -> None:
    """See that no request is left in the event loop of the host, where nobody would end it."""
    left = set(server.server_state.tasks)
    if left:
        _, left = await asyncio.wait(left, timeout=CUT_SECONDS)
    if left:
        app.abandon()
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=CUT_SECONDS)


async def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens: an address that is taken is one clear error, before anything runs."""
    if not 0 <= port <= MAX_PORT:  # getaddrinfo would quietly take another
        error = ValueError(f"ports go from 0 to {MAX_PORT}")
        raise ListenError(cannot_listen(HTTP, host, port, error))
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ListenError(cannot_listen(HTTP, host, port, error)) from error


def _cut_stalled(listener: socket.socket, seconds: float) -> None:
    """Have the system end connections whose client takes nothing for so long, where it can (Linux).

    The HTTP server waits for room by itself before it answers the next request of a connection, and keeps
    what is left to send after an answer has ended; no time-out of the application reaches either.
    """
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))


def _loopback_names(host: str) -> frozenset[str]:
    """Return the names a loopback address may be called by in a `Host` header."""
    own = f"[{host}]" if ":" in host else host.lower()
    return frozenset({"localhost", "127.0.0.1", "[::1]", own})
