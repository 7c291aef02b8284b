"""The ASGI application: routes, request ids, the canonical log line, and what becomes of errors."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from paddock.api import request_id
from paddock.errors import PaddockError, Reason, make_error
from paddock_gateway.endpoints import Generate, GenerationLimits, Health, Models
from paddock_gateway.errors import CLIENT_GONE_STATUS, ClientGoneError, reply_to
from paddock_gateway.exchange import Exchange, exchange_of, log
from paddock_gateway.parameters import Dialect
from paddock_gateway.refusal import RequestRefusedError, refuse_http
from paddock_gateway.reply import send_document
from paddock_gateway.sse import event

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from paddock.api import ModelManagerApi

LAST_EVENT_SECONDS: Final = 5.0
"""How long a client may take to accept the event that says why its stream breaks off."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Settings of the application."""

    max_body_bytes: int = 15 * 2**20
    """Largest request body. Images travel in it."""

    ping_interval_seconds: float = 15.0
    """Silence on a stream after which a comment is sent."""

    stalled_client_seconds: float = 120.0
    """A client that takes nothing off the socket for this long counts as gone."""

    prompts_at_once: int = 8
    """Prompts of one completion request that are generated for at a time."""

    allowed_hosts: frozenset[str] | None = None
    """Names a `Host` header may have, without port; None allows any. `serve` sets it for loopback addresses:
    a page whose name was rebound to 127.0.0.1 still sends its own name."""

    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may read answers; `*` is all. None by default."""


class GatewayApp:
    """The application. Outermost layer: identity, the log line, clients that are gone, stopping what runs."""

    def __init__(self, inner: ASGIApp, stalled_client_seconds: float) -> None:
        self._inner = inner
        self._stalled_client_seconds = stalled_client_seconds
        self._exchanges: set[Exchange] = set()
        self._abandoned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        exchange = Exchange(scope)
        header = (b"x-request-id", exchange.request_id.encode())

        async def send_identified(message: Message) -> None:
            if message.get("more_body"):
                # A part of a stream: `watch_client` looks at how long it takes, which costs less per token.
                await send(message)
                return
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await self._send_in_time(send, message)

        token = request_id.set(exchange.request_id)
        self._exchanges.add(exchange)
        try:
            with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
                try:
                    await self._inner(scope, receive, send_identified)
                except ClientGoneError:
                    exchange.reason = "CLIENT_GONE"
                    exchange.status = exchange.status or CLIENT_GONE_STATUS
                except asyncio.CancelledError:
                    if not self._abandoned:
                        raise
                finally:
                    exchange.log()
        finally:
            self._exchanges.discard(exchange)
            request_id.reset(token)

    async def _send_in_time(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._stalled_client_seconds):
                await send(message)
        except TimeoutError:
            raise ClientGoneError from None

    def interrupt(self) -> None:
        """End every request that runs, with SHUTTING_DOWN."""
        for exchange in self._exchanges:
            exchange.stop.interrupt(make_error(Reason.SHUTTING_DOWN, "The gateway is shutting down."))

    def abandon(self) -> None:
        """Take it that requests which are cancelled from now on have nobody left to answer: it is no error,
        and the HTTP server is to make none of it."""
        self._abandoned = True


class ErrorBoundary:
    """Turns what goes wrong inside into HTTP: an error answer, or the last event of a stream."""

    def __init__(self, router: Router, allowed_hosts: frozenset[str] | None) -> None:
        self._router = router
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        exchange = exchange_of(scope)
        scope["app"] = self._router  # makes a wrong method an exception instead of plain text
        try:
            self._check_host(scope)
            async with exchange.stop.block():
                await self._router(scope, receive, send)
        except ClientGoneError:
            raise  # nobody is left to answer
        except (PaddockError, RequestRefusedError) as error:
            await _fail(exchange, send, error)
        except HTTPException as error:
            await _fail(exchange, send, _wrong_method(scope, error))
        except asyncio.CancelledError:
            exchange.reason = Reason.CANCELLED
            raise
        except Exception:  # noqa: BLE001 - the one place where a bug becomes an answer
            log.exception("request_failed")
            await _fail(exchange, send, _bug(exchange))

    def _check_host(self, scope: Scope) -> None:
        if self._allowed_hosts is None:
            return
        for name, value in scope["headers"]:
            if name == b"host" and _host_name(value.decode("latin-1")) in self._allowed_hosts:
                return
        refuse_http(
            403,
            "host_not_allowed",
            "This gateway listens on the loopback address and answers only to: "
            + ", ".join(sorted(self._allowed_hosts)),
        )


def create_app(api: ModelManagerApi, options: GatewayOptions | None = None) -> GatewayApp:
    """Make the application.

    Args:
        api: The server: in this process, or over a channel.
        options: Settings; the defaults when left out.
    """
    options = options or GatewayOptions()
    limits = GenerationLimits(
        max_body_bytes=options.max_body_bytes,
        ping_interval_seconds=options.ping_interval_seconds,
        stalled_client_seconds=options.stalled_client_seconds,
        prompts_at_once=options.prompts_at_once,
    )
    health, models = Health(api), Models(api)
    chat, completions = "/v1/chat/completions", "/v1/completions"
    router = Router(
        [
            Route("/health", health.show),
            Route("/v1/health", health.show),
            Route("/v1/models", models.list),
            Route("/v1/models/{model:path}", models.show),
            Route(chat, Generate(api, Dialect.CHAT, chat, limits), methods=["POST"]),
            Route(completions, Generate(api, Dialect.COMPLETION, completions, limits), methods=["POST"]),
        ],
        redirect_slashes=False,
        default=_no_route,
    )
    app: ASGIApp = ErrorBoundary(router, options.allowed_hosts)
    if options.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id",),
        )
    return GatewayApp(app, options.stalled_client_seconds)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        refuse_http(404, "unknown_url", f"There is nothing at {scope['method']} {scope['path'][:256]}.")


async def _fail(exchange: Exchange, send: Send, error: PaddockError | RequestRefusedError) -> None:
    """Tell the client, in the way that is still open."""
    reply = reply_to(error, exchange.name_of)
    exchange.reason = reply.reason
    if exchange.status == 0:
        await send_document(send, reply.status, reply.body, reply.headers)
    elif exchange.streams:
        # Without `[DONE]`: no client can take the answer for whole.
        # A client that does not read it in time sees its connection closed instead.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_EVENT_SECONDS):
                await send({"type": "http.response.body", "body": event(reply.body), "more_body": False})


def _bug(exchange: Exchange) -> PaddockError:
    return make_error(
        Reason.INTERNAL, f"Something went wrong in the gateway; its log says what, at {exchange.request_id}."
    )


def _wrong_method(scope: Scope, error: HTTPException) -> RequestRefusedError:
    allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
    return RequestRefusedError(
        error.status_code,
        "method_not_allowed",
        f"{scope['path'][:256]} takes {allowed}, not {scope['method']}.",
        headers=(("allow", allowed),),
    )


def _host_name(host: str) -> str:
    """Return a `Host` header without its port, in lower case; brackets of an IPv6 address stay."""
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).lower()
