"""The columns of `paddock ls` and `paddock ps`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from paddock.cli.output import ago_text, bytes_text, count_text, state_text, until_text
from paddock.types import HuggingFaceSource, Model, ModelInfo, ModelState, WorkerInfo

if TYPE_CHECKING:
    from rich.text import Text

Cell = Callable[[Model, datetime | None], "str | Text"]

NONE: Final = "-"
"""Stands where there is nothing to show."""


def _state(model: Model, now: datetime | None) -> Text:
    failed = model.state is ModelState.FAILED and model.last_failure
    return state_text(model.state, model.last_failure.reason if failed and model.last_failure else "")


def _of_info(text: Callable[[ModelInfo], str]) -> Cell:
    return lambda model, now: text(model.info) or NONE if model.info else NONE


def _of_workers(text: Callable[[Sequence[WorkerInfo]], str]) -> Cell:
    return lambda model, now: text(model.workers) if model.workers else NONE


def _sum(number: Callable[[WorkerInfo], int], text: Callable[[int], str] = str) -> Cell:
    """Return the cell of a number that the replicas of a model have together."""
    return _of_workers(lambda workers: text(sum(number(worker) for worker in workers)))


def _kv_cache(workers: Sequence[WorkerInfo]) -> str:
    used = sum(worker.kv_cache_used_tokens for worker in workers)
    total = sum(worker.kv_cache_total_tokens for worker in workers)
    return f"{used} of {total}" if total else NONE


def _source(model: Model, now: datetime | None) -> str:
    if isinstance(model.source, HuggingFaceSource):
        return f"hf:{model.source.repo_id}"
    return model.source.path if model.source else NONE


COLUMNS: Final[Mapping[str, Cell]] = {
    "MODEL": lambda model, now: model.id,
    "STATE": _state,
    "SIZE": lambda model, now: bytes_text(model.size_bytes),
    # Resident bytes of the worker processes.
    "MEMORY": _sum(lambda worker: worker.resident_bytes, bytes_text),
    "ACTIVE": _sum(lambda worker: worker.active_request_count),
    "QUEUED": _sum(lambda worker: worker.queued_request_count),
    "KV CACHE": _of_workers(_kv_cache),
    "RESTARTS": _sum(lambda worker: worker.restart_count),
    "PID": _of_workers(lambda workers: ", ".join(str(worker.pid) for worker in workers)),
    "EXPIRES": lambda model, now: until_text(model.expire_time, now),
    "USED": lambda model, now: ago_text(model.last_use_time, now),
    "LOADED": lambda model, now: ago_text(model.load_time, now),
    "PARAMETERS": _of_info(lambda info: count_text(info.parameter_count)),
    "QUANTIZATION": _of_info(lambda info: info.quantization),
    "CONTEXT": _of_info(lambda info: str(info.trained_context_tokens)),
    "ARCHITECTURE": _of_info(lambda info: info.architecture),
    "SOURCE": _source,
}
"""What each column shows of a model, by its title."""

LS: Final = ("MODEL", "STATE", "SIZE", "MEMORY", "PARAMETERS", "QUANTIZATION", "CONTEXT", "USED")
LS_WIDE: Final = (
    *LS,
    *("ACTIVE", "QUEUED", "RESTARTS", "EXPIRES", "ARCHITECTURE", "SOURCE"),
)
PS: Final = ("MODEL", "STATE", "MEMORY", "ACTIVE", "QUEUED", "KV CACHE", "RESTARTS", "EXPIRES", "USED")
PS_WIDE: Final = (*PS, *("SIZE", "PID", "LOADED"))


def rows(
    models: Sequence[Model], columns: Sequence[str], now: datetime | None = None
) -> list[tuple[str | Text, ...]]:
    """Return the cells of a table, a row a model."""
    return [tuple(COLUMNS[name](model, now) for name in columns) for model in models]
