"""One HTTP request and its answer: identity, what is logged about it, and who may end it."""

from __future__ import annotations

import re
import secrets
import time
from typing import TYPE_CHECKING, Final, cast

import structlog

from paddock_gateway.interrupt import Interrupt

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope
    from structlog.typing import FilteringBoundLogger

log: Final = cast("FilteringBoundLogger", structlog.get_logger("paddock_gateway"))

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:=+/@-]{1,128}")
_SCOPE_KEY: Final = "paddock.exchange"


def _same(field: str) -> str:
    return field


class Exchange:
    """What is known of one HTTP request. Lives in its ASGI scope; logged once, when the request has ended."""

    def __init__(self, scope: Scope) -> None:
        self._begin = time.monotonic()
        self._first_token_time: float | None = None
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.request_id = _request_id(scope)
        self.interrupt = Interrupt()
        """Ends the generations of the request: its client has gone."""
        self.stop = Interrupt()
        """Ends the request, and tells its client why: the gateway stops."""
        self.name_of: Callable[[str], str] = _same
        """Translates the dotted path of a field of `paddock.v1` to the parameter the caller knows."""
        self.route = ""
        """Path of the route that matched; empty when none did."""
        self.status = 0
        """Status sent; 0 while nothing has been."""
        self.streams = False
        """Whether the answer is a stream of events."""
        self.reason = ""
        """Why the request failed; empty when it did not."""
        self.model = ""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        scope[_SCOPE_KEY] = self

    def settle(self) -> None:
        """Let the rest of the answer, which is all there, go out undisturbed."""
        self.interrupt.disarm()
        self.stop.disarm()

    def note_tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Take note of what has been read and generated so far."""
        if completion_tokens and self._first_token_time is None:
            self._first_token_time = time.monotonic()
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens

    def log(self) -> None:
        """Write the canonical line of this request."""
        entry: dict[str, object] = {
            "method": self.method,
            "route": self.route or "unmatched",
            "path": self.path[:256],
            "status": self.status,
            "duration_ms": self._milliseconds(time.monotonic()),
        }
        if self.reason:
            entry["reason"] = self.reason
        if self.model:
            entry["model"] = self.model
            entry["stream"] = self.streams
            entry["prompt_tokens"] = self.prompt_tokens
            entry["completion_tokens"] = self.completion_tokens
        if self._first_token_time is not None:
            entry["ttft_ms"] = self._milliseconds(self._first_token_time)
        log.info("http_request", **entry)

    def _milliseconds(self, moment: float) -> float:
        return round((moment - self._begin) * 1000, 1)


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange of an ASGI scope that has passed through the application."""
    return cast("Exchange", scope[_SCOPE_KEY])


def _request_id(scope: Scope) -> str:
    """Return the caller's `x-request-id` when it is fit for logs and headers, a new one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return value.decode("ascii")
    return secrets.token_hex(16)
