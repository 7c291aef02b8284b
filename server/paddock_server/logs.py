"""Logging: structlog to standard error, JSON unless it is a terminal; stdlib loggers go the same way."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Final, Literal, TextIO, cast

import structlog

from paddock.sizes import size_text

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor


class LogOutput:
    """Where lines go: a descriptor that costs nobody more than the line when it cannot be written, because
    the disk behind it is full or its reader has gone. Once it can be again, it says what is missing."""

    def __init__(self, descriptor: int, *, as_json: bool) -> None:
        self._descriptor = descriptor
        self._as_json = as_json
        self._lock = threading.Lock()
        self._lost = 0
        self._is_cut = False

    def write(self, text: str) -> int:
        """Write whole lines, or none of them to the end."""
        with self._lock:
            data = (self._gap() + text).encode(errors="replace")
            try:
                written = os.write(self._descriptor, data)
            except OSError:  # There is no other place to say so.
                written = 0
            if written == len(data):
                self._lost, self._is_cut = 0, False
            else:
                self._lost += text.count("\n")
                self._is_cut = self._is_cut or written > 0
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""

    def _gap(self) -> str:
        if not self._lost:
            return ""
        line = {"event": "log_lines_lost", "count": self._lost, "level": "warning"}
        text = json.dumps(line) if self._as_json else f"log_lines_lost count={self._lost}"
        return ("\n" if self._is_cut else "") + text + "\n"


def console_renderer() -> structlog.dev.ConsoleRenderer:
    """Return what writes lines for people. Tracebacks are plain: the default shows the local variables of
    each frame, and those of a server are prompts, answers and tokens."""
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )


def _sizes_for_people(logger: object, method: str, entry: EventDict) -> EventDict:
    """Write numbers of bytes as people read them; the log for programs keeps the numbers."""
    del logger, method
    all_of_it = entry.get("event") in _EVENTS_OF_SIZES
    for key, value in entry.items():
        if type(value) is int and (all_of_it or key.endswith("_bytes")):
            entry[key] = size_text(value)
    return entry


_EVENTS_OF_SIZES: Final = frozenset({"memory_budget"})
"""Events whose keys are names of devices, and whose numbers are bytes."""


def configure_logging(level: str, log_format: Literal["auto", "json", "console"]) -> None:
    """Set logging up for this process. Called once, by the command that is run."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: list[Processor] = (
        [_sizes_for_people, console_renderer()]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    # Both write whole lines, and nothing else of a text stream is asked for.
    output = cast("TextIO", LogOutput(sys.stderr.fileno(), as_json=not console))
    numeric_level = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric_level),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(numeric_level)
    # uvicorn's own line per request would repeat the gateway's canonical one.
    logging.getLogger("uvicorn.access").disabled = True
