"""What the routes do."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response

from paddock.errors import Reason, make_error
from paddock.sizes import size_text
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_gateway.errors import ClientGoneError
from paddock_gateway.exchange import exchange_of
from paddock_gateway.generations import run_generations
from paddock_gateway.refusal import refuse_http
from paddock_gateway.reply import DocumentReply, StreamReply
from paddock_gateway.schema import ModelCard, ModelList, ModelMeta, ModelStatus
from paddock_gateway.translate import plan_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from paddock.api import ModelManagerApi
    from paddock_gateway.interrupt import Interrupt
    from paddock_gateway.parameters import Dialect
    from paddock_gateway.reply import Reply

HEALTH_SECONDS: Final = 5.0
"""How long the server may take to answer before it counts as ill."""

BODY_SILENCE_SECONDS: Final = 60.0
"""A client that sends nothing of its body for this long is refused."""

_PAGE_SIZE: Final = 1000
_STATE_NAMES: Final = {
    model_pb2.MODEL_STATE_LOADING: "loading",
    model_pb2.MODEL_STATE_LOADED: "loaded",
    model_pb2.MODEL_STATE_SLEEPING: "sleeping",
}
_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Bounds of a request for text."""

    max_body_bytes: int
    ping_interval_seconds: float
    stalled_client_seconds: float
    prompts_at_once: int


class Health:
    """`GET /health`: whether the server behind the gateway answers."""

    def __init__(self, api: ModelManagerApi) -> None:
        self._api = api

    async def show(self, request: Request) -> Response:
        """Answer `{"status":"ok"}`, or the error that keeps the server from answering."""
        exchange_of(request.scope).route = "/health"
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._api.get_server_info(pb.GetServerInfoRequest())
        except TimeoutError:
            message = f"The server did not answer within {HEALTH_SECONDS:g} seconds."
            raise make_error(Reason.SERVER_UNREACHABLE, message) from None
        return Response(b'{"status":"ok"}', media_type="application/json")


class Models:
    """`GET /v1/models` and `GET /v1/models/{id}`."""

    def __init__(self, api: ModelManagerApi) -> None:
        self._api = api
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        """Answer with every model there is, loaded or not: a request for one that is not loads it."""
        exchange_of(request.scope).route = "/v1/models"
        cards: list[ModelCard] = []
        token = ""
        while True:
            page = await self._api.list(pb.ListRequest(page_size=_PAGE_SIZE, page_token=token))
            cards += [self._card(model) for model in page.models]
            token = page.next_page_token
            if not token:
                return Response(_encode(ModelList(cards)), media_type="application/json")

    async def show(self, request: Request) -> Response:
        """Answer with one model."""
        exchange = exchange_of(request.scope)
        exchange.route = "/v1/models/{model}"
        model: str = request.path_params["model"]
        response = await self._api.get(pb.GetRequest(model=model))
        return Response(_encode(self._card(response.model)), media_type="application/json")

    def _card(self, model: model_pb2.Model) -> ModelCard:
        failed = model.state == model_pb2.MODEL_STATE_FAILED
        card = ModelCard(
            id=model.id,
            aliases=list(model.aliases),
            tags=list(model.tags),
            # Nobody knows when a file's model was made; while it is loaded the load is the next best thing.
            created=model.load_time.seconds or self._created,
            status=ModelStatus(_STATE_NAMES.get(model.state, "unloaded"), failed),
        )
        if model.HasField("info"):
            card.meta = ModelMeta(
                n_vocab=model.info.vocabulary_size,
                n_ctx_train=model.info.trained_context_tokens,
                n_embd=model.info.embedding_dimension_count,
                n_params=model.info.parameter_count,
                size=model.size_bytes,
            )
        return card


class Generate:
    """`POST /v1/chat/completions` and `POST /v1/completions`. An ASGI application: it streams by itself."""

    def __init__(self, api: ModelManagerApi, dialect: Dialect, route: str, limits: GenerationLimits) -> None:
        self._api = api
        self._dialect = dialect
        self._route = route
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Ends early, with `ClientGoneError`, when its client goes away."""
        exchange = exchange_of(scope)
        exchange.route = self._route
        plan = plan_of(self._dialect, await read_body(scope, receive, self._limits.max_body_bytes))
        exchange.model = plan.model
        exchange.name_of = plan.name_of
        reply = (StreamReply if plan.stream else DocumentReply)(plan, exchange, send)
        watcher = asyncio.create_task(watch_client(receive, exchange.interrupt, reply, self._limits))
        try:
            async with exchange.interrupt.block():
                await run_generations(
                    self._api, plan.requests, reply.take, at_once=self._limits.prompts_at_once
                )
                reply.answer.check_complete()
        finally:
            exchange.model = reply.answer.model or plan.model
            await _end(watcher)
        await reply.finish()


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the body of a request; refuses one of more than `limit` bytes before taking it in."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            _refuse_size(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_SILENCE_SECONDS):
                message = await receive()
        except TimeoutError:
            refuse_http(408, "request_timeout", "The body of the request did not arrive.")
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            _refuse_size(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def _refuse_size(limit: int) -> None:
    # The rest of the body is not worth reading, so the connection cannot be used again.
    refuse_http(
        413,
        "request_too_large",
        f"The body is larger than {size_text(limit)}, the most this gateway takes.",
        headers=(("connection", "close"),),
    )


async def watch_client(
    receive: Receive, interrupt: Interrupt, reply: Reply, limits: GenerationLimits
) -> None:
    """Interrupt a request whose client goes away, and keep its connection alive until then."""
    interval, patience = limits.ping_interval_seconds, limits.stalled_client_seconds
    wait = interval
    while True:
        try:
            async with asyncio.timeout(wait):
                message = await receive()
        except TimeoutError:
            try:
                wait = await reply.keep_alive(interval, patience)
            except TimeoutError:
                break
        else:
            if message["type"] == "http.disconnect":
                break
    interrupt.interrupt(ClientGoneError())


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for it; a failure of its own is raised."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
