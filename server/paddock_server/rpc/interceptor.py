"""What surrounds every call: a request id, one log line at its end, and errors as `google.rpc.Status`."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from paddock.api import request_id as request_id_var
from paddock.errors import PaddockError, Reason, make_error
from paddock.status import to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

log = structlog.get_logger()

REQUEST_ID_METADATA: Final = "x-request-id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PREFIX: Final = "/paddock.v1."


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of Paddock's own services. Health and reflection are left as they are."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the call's surroundings added."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(method, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _unary(method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: Any) -> Any:
        async with _surroundings(method, context):
            return await behaviour(request, context)

    return call


def _streaming(
    method: str, behaviour: Callable[[Any, Any], AsyncGenerator[Any]]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        async with _surroundings(method, context), aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return call


@asynccontextmanager
async def _surroundings(method: str, context: Any) -> AsyncGenerator[None]:
    """Bind the request id, turn an error into a status, and log the call once it has ended."""
    request_id = _request_id(context)
    request_id_var.set(request_id)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(rpc=method.rpartition("/")[2], request_id=request_id)
    context.set_trailing_metadata(((REQUEST_ID_METADATA, request_id),))
    begin = time.monotonic()
    error: PaddockError | None = None
    code = "CANCELLED"
    try:
        try:
            yield
            code = "OK"
        except PaddockError as raised:
            error, code = raised, raised.code
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:  # the one place where a bug becomes a status
            log.exception("rpc_bug")
            error = make_error(
                Reason.INTERNAL, f"A bug in the server; its log says more under request id {request_id}."
            )
            code = error.code
    finally:
        _log_call(code, error, time.monotonic() - begin)
    if error is not None:
        await context.abort_with_status(_status(error, request_id))


def _request_id(context: Any) -> str:
    """Return the caller's own request id when it is fit for a log line, or a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_METADATA and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _status(error: PaddockError, request_id: str) -> Any:
    """Return the error as a status whose trailing metadata also carries the request id."""
    status = rpc_status.to_status(to_status(error, request_id=request_id))
    return _Status(
        status.code, status.details, (*status.trailing_metadata, (REQUEST_ID_METADATA, request_id))
    )


class _Status(grpc.Status):
    """A code, its message and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


def _log_call(code: str, error: PaddockError | None, seconds: float) -> None:
    """Write the canonical line. Model, load and tokens were bound on the way by the service."""
    fields: dict[str, object] = {"code": str(code), "duration_ms": round(seconds * 1000, 1)}
    if error is not None:
        fields |= {"reason": str(error.reason), "error": error.message}
    if code == "INTERNAL":
        log.error("rpc", **fields)
    else:
        log.info("rpc", **fields)
