"""What surrounds every RPC: its request id, one log line at its end, and errors as `google.rpc.Status`."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from grpc_status import rpc_status

from paddock.status import to_status
from paddock_server.rpc.calls import request_id_of, watched_call

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from paddock.errors import PaddockError

REQUEST_ID_METADATA: Final = "x-request-id"
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
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(method, handler.stream_stream),
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
    """Watch the call under the caller's request id, and end it with a status when it failed."""
    offered = (value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_METADATA)
    request_id = request_id_of(next(offered, ""))
    context.set_trailing_metadata(((REQUEST_ID_METADATA, request_id),))
    async with watched_call(method.rpartition("/")[2], request_id) as call:
        yield
    if call.error is not None:
        await context.abort_with_status(_status(call.error, request_id))


def _status(error: PaddockError, request_id: str) -> Any:
    """Return the error as a status whose trailing metadata also carries the request id."""
    found = to_status(error, request_id=request_id)
    status = rpc_status.to_status(found)  # pyright: ignore[reportUnknownMemberType]  # google.rpc has no stubs
    return _Status(
        status.code, status.details, (*status.trailing_metadata, (REQUEST_ID_METADATA, request_id))
    )


class _Status(grpc.Status):
    """A code, its message and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata
