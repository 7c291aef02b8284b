"""Sending an answer over ASGI: a stream of events, or one document.

The streaming path calls ASGI's `send` itself: a response object around it costs a third more per token.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from paddock_gateway.chunks import StreamEncoder
from paddock_gateway.collect import Collector
from paddock_gateway.sse import HEADERS, PING

if TYPE_CHECKING:
    from starlette.types import Send

    from paddock.v1 import model_manager_pb2 as pb
    from paddock_gateway.answer import Answer
    from paddock_gateway.errors import RawHeaders
    from paddock_gateway.exchange import Exchange
    from paddock_gateway.translate import Plan


class Reply(Protocol):
    """An answer to a request for text."""

    @property
    def answer(self) -> Answer:
        """What has been said so far."""
        ...

    async def take(self, prompt_index: int, response: pb.GenerateResponse) -> None:
        """Take one event of the generation of a prompt."""
        ...

    async def keep_alive(self, interval: float, patience: float) -> float:
        """Keep a silent connection alive; return the seconds until that is due again.

        Args:
            interval: Seconds of silence after which something is sent.
            patience: Seconds for which a client may take nothing; TimeoutError is raised after them.
        """
        ...

    async def finish(self) -> None:
        """Send what is left to send once every generation has ended well."""
        ...


class StreamReply:
    """An answer as server-sent events. Nothing is sent before the first generation has its slot."""

    def __init__(self, plan: Plan, exchange: Exchange, send: Send) -> None:
        self._encoder = StreamEncoder(plan, int(time.time()))
        self._exchange = exchange
        self._send = send
        self._sending = False
        self._last_send_time = time.monotonic()
        exchange.streams = True

    @property
    def answer(self) -> Answer:
        """See `Reply.answer`."""
        return self._encoder

    async def take(self, prompt_index: int, response: pb.GenerateResponse) -> None:
        """See `Reply.take`: everything one event makes leaves in one send."""
        encoder = self._encoder
        events = encoder.encode(prompt_index, response)
        self._exchange.note_tokens(encoder.prompt_tokens, encoder.generated_tokens)
        if self._exchange.status == 0:
            if not encoder.started:
                return
            await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        if events:
            await self._write(events)
        if encoder.complete:
            # A client may hang up on reading `[DONE]`: that is no reason to break anything off.
            self._exchange.settle()

    async def keep_alive(self, interval: float, patience: float) -> float:
        """See `Reply.keep_alive`: a comment after `interval` seconds of silence, once there are headers."""
        silence = time.monotonic() - self._last_send_time
        if self._sending:
            if silence > patience:
                raise TimeoutError
            return interval
        if silence < interval:
            return interval - silence
        if self._exchange.status:
            async with asyncio.timeout(patience):
                await self._write(PING)
        return interval

    async def finish(self) -> None:
        """See `Reply.finish`: end the body."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, body: bytes) -> None:
        self._sending = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._sending = False
        self._last_send_time = time.monotonic()


class DocumentReply:
    """An answer as one JSON document."""

    def __init__(self, plan: Plan, exchange: Exchange, send: Send) -> None:
        self._collector = Collector(plan, int(time.time()))
        self._exchange = exchange
        self._send = send

    @property
    def answer(self) -> Answer:
        """See `Reply.answer`."""
        return self._collector

    async def take(self, prompt_index: int, response: pb.GenerateResponse) -> None:
        """See `Reply.take`."""
        collector = self._collector
        collector.add(prompt_index, response)
        self._exchange.note_tokens(collector.prompt_tokens, collector.generated_tokens)

    async def keep_alive(self, interval: float, patience: float) -> float:
        """See `Reply.keep_alive`: a document that has not begun has nothing to send meanwhile."""
        del patience
        return interval

    async def finish(self) -> None:
        """See `Reply.finish`: send the document."""
        self._exchange.settle()
        await send_document(self._send, 200, self._collector.body())


async def send_document(send: Send, status: int, body: bytes, headers: RawHeaders | None = None) -> None:
    """Send a whole answer; JSON unless the headers say otherwise."""
    if headers is None:
        headers = [(b"content-type", b"application/json")]
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
