"""What surrounds the work for one request, whatever carries it: a request id, one log line, errors kept."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from paddock.api import request_id as request_id_var
from paddock.errors import PaddockError, Reason, make_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

log = structlog.get_logger()

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Call:
    """What became of a call; complete once its `watched_call` has been left."""

    error: PaddockError | None = None
    """How it failed; None when it did not."""


def request_id_of(offered: str | bytes) -> str:
    """Return the caller's own request id when it is fit for a log line, or a new one."""
    if isinstance(offered, str) and _REQUEST_ID.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


@asynccontextmanager
async def watched_call(rpc: str, request_id: str) -> AsyncGenerator[Call]:
    """Bind the request id, catch the error the block raises, and log the call once it has ended.

    The error is in the `Call` after the block; a bug is one with reason INTERNAL. To be entered in a task, or
    at least a context, of the call's own.
    """
    request_id_var.set(request_id)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(rpc=rpc, request_id=request_id)
    begin = time.monotonic()
    call = Call()
    code = "CANCELLED"
    try:
        try:
            yield call
            code = "OK"
        except PaddockError as raised:
            call.error, code = raised, raised.code
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:  # the one place where a bug becomes a status
            log.exception("rpc_bug")
            call.error = make_error(
                Reason.INTERNAL, f"A bug in the server; its log says more under request id {request_id}."
            )
            code = call.error.code
    finally:
        _log_call(code, call.error, time.monotonic() - begin)


def _log_call(code: str, error: PaddockError | None, seconds: float) -> None:
    """Write the canonical line. Model, load and tokens were bound on the way by the service."""
    fields: dict[str, object] = {"code": str(code), "duration_ms": round(seconds * 1000, 1)}
    if error is not None:
        fields |= {"reason": str(error.reason), "error": error.message}
    if code == "INTERNAL":
        log.error("rpc", **fields)
    else:
        log.info("rpc", **fields)
