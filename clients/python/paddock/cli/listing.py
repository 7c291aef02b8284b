"""The columns of `paddock ls` and `paddock ps`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

from rich.text import Text

from paddock.cli.output import (
    brief_text,
    count_text,
    download_text,
    seconds_since,
    state_text,
)
from paddock.sizes import size_text
from paddock.types import (
    ArtifactState,
    HuggingFaceSource,
    MemoryPhase,
    Model,
    ModelInfo,
    ModelState,
    RuntimeOptions,
    WorkerInfo,
)

Cell = Callable[[Model, datetime | None], "str | Text"]

NONE: Final = "-"
"""Stands where there is nothing to show."""


def memory_text(model: Model) -> str:
    """Return what a model takes of all devices, and whether that is yet to come or to go; what its process
    has resident where no bytes are kept account of."""
    charge = model.memory
    size = sum(charge.bytes.values()) if charge is not None else 0
    size = size or sum(worker.resident_bytes for worker in model.workers)
    if not size:
        return NONE
    phase = charge.phase if charge is not None else MemoryPhase.MEASURED
    return f"{size_text(size)} {_PHASES[phase]}".strip()


_PHASES: Final[Mapping[MemoryPhase, str]] = {
    MemoryPhase.UNKNOWN: "",
    MemoryPhase.PREDICTED: "predicted",
    MemoryPhase.MEASURED: "",
    MemoryPhase.RELEASING: "releasing",
}


def expiry_verb(model: Model) -> str:
    """Return what happens when the model's time is up."""
    options = model.runtime_options or RuntimeOptions()
    sleep, idle = options.sleep_timeout_seconds, options.idle_timeout_seconds
    return "sleeps" if sleep and (not idle or sleep < idle) else "goes"


def _expires(model: Model, now: datetime | None) -> str:
    if model.pinned or model.expire_time is None:
        return NONE
    return f"{expiry_verb(model)} in {brief_text(-seconds_since(model.expire_time, now))}"


def _waiting(model: Model, now: datetime | None) -> str:
    queued = sum(worker.queued_request_count for worker in model.workers)
    counts = ((model.waiting_request_count, "load"), (queued, "slot"))
    return ", ".join(f"{count} {what}" for count, what in counts if count) or NONE


def _state(model: Model, now: datetime | None) -> Text:
    state = _bare_state(model)
    return state.append(", pinned") if model.pinned else state


def file_fault(model: Model) -> str:
    """Return what keeps a model's files from being loaded; empty where nothing is known to."""
    if model.artifact_state is ArtifactState.ABSENT:
        return "absent"
    # A server knows facts of every file that it could read.
    return "broken" if model.info is None and model.artifact_state is ArtifactState.DOWNLOADED else ""


def _bare_state(model: Model) -> Text:
    if model.state is ModelState.UNLOADED and model.download is not None:
        return download_text(model.download)
    if model.state is ModelState.UNLOADED and (fault := file_fault(model)):
        return Text(fault, style="red" if fault == "broken" else "dim")
    failed = model.state is ModelState.FAILED and model.last_failure
    return state_text(model.state, model.last_failure.reason if failed and model.last_failure else "")


def _ago(time: datetime | None, now: datetime | None) -> str:
    return NONE if time is None else f"{brief_text(seconds_since(time, now))} ago"


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
    "SIZE": lambda model, now: size_text(model.size_bytes),
    "MEMORY": lambda model, now: memory_text(model),
    # Requests that use the model, whether they have a slot or wait for one.
    "REQUESTS": lambda model, now: str(model.lease_count) if model.lease_count else NONE,
    # Requests that wait for the model to be loaded, or for one of its slots.
    "WAITING": _waiting,
    "ACTIVE": _sum(lambda worker: worker.active_request_count),
    "KV CACHE": _of_workers(_kv_cache),
    "RESTARTS": _sum(lambda worker: worker.restart_count),
    "PID": _of_workers(lambda workers: ", ".join(str(worker.pid) for worker in workers)),
    "EXPIRES": _expires,
    "USED": lambda model, now: _ago(model.last_use_time, now),
    "LOADED": lambda model, now: _ago(model.load_time, now),
    "PARAMETERS": _of_info(lambda info: count_text(info.parameter_count)),
    "QUANTIZATION": _of_info(lambda info: info.quantization),
    "CONTEXT": _of_info(lambda info: str(info.trained_context_tokens)),
    "ARCHITECTURE": _of_info(lambda info: info.architecture),
    "PRIORITY": lambda model, now: str(model.priority) if model.priority else NONE,
    "GROUP": lambda model, now: model.group or NONE,
    "ALIASES": lambda model, now: ", ".join(model.aliases) or NONE,
    "SOURCE": _source,
}
"""What each column shows of a model, by its title."""

LS: Final = ("MODEL", "STATE", "SIZE", "MEMORY", "USED", "QUANTIZATION", "PARAMETERS", "CONTEXT")
LS_WIDE: Final = (
    *LS,
    *("REQUESTS", "WAITING", "RESTARTS", "EXPIRES", "ARCHITECTURE", "GROUP", "ALIASES", "SOURCE"),
)
PS: Final = ("MODEL", "STATE", "MEMORY", "REQUESTS", "WAITING", "EXPIRES", "USED", "KV CACHE", "RESTARTS")
PS_WIDE: Final = (*PS, *("ACTIVE", "SIZE", "PRIORITY", "GROUP", "PID", "LOADED"))
# The most telling ones come first: a narrow terminal has no room for the last.


def rows(
    models: Sequence[Model], columns: Sequence[str], now: datetime | None = None
) -> list[tuple[str | Text, ...]]:
    """Return the cells of a table, a row a model."""
    return [tuple(COLUMNS[name](model, now) for name in columns) for model in models]
