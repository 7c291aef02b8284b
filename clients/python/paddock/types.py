"""What the client takes and returns: plain dataclasses, no protobuf.

Times are aware `datetime`s in UTC, durations are seconds, sizes are bytes. `None`: the server did not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias


class ModelState(StrEnum):
    """Lifecycle of the worker process of a model."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"
    UNLOADING = "unloading"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """A state of a newer server. Treat it as not ready."""


class ArtifactState(StrEnum):
    """Lifecycle of the files of a model on the server's disk."""

    ABSENT = "absent"
    DOWNLOADING = "downloading"
    DOWNLOADED = "downloaded"
    UNKNOWN = "unknown"


class Stage(StrEnum):
    """Stages of a load, in order."""

    RESOLVE = "resolve"
    DOWNLOAD = "download"
    VERIFY = "verify"
    ADMIT = "admit"
    SPAWN = "spawn"
    WEIGHTS = "weights"
    WARMUP = "warmup"
    UNKNOWN = "unknown"
    """A stage of a newer server. Show it as "working"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A file under one of the server's model directories."""

    path: str
    """Relative to a model directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSource:
    """Files in a Hugging Face Hub repository."""

    repo_id: str
    """For example `Qwen/Qwen2.5-7B-Instruct-GGUF`."""
    file_pattern: str
    """File name or glob that selects one GGUF file or one set of shards, for example `*q4_k_m.gguf`."""
    revision: str = ""
    """Branch, tag or commit; empty means `main`."""


ModelSource: TypeAlias = LocalSource | HuggingFaceSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """Options of a worker. `None` takes the server's default."""

    context_size_tokens: int | None = None
    """Tokens the KV cache holds, shared by all sequences; 0 takes the trained context."""
    gpu_layer_count: int | None = None
    """Layers on the accelerator; -1 means all."""
    slot_count: int | None = None
    """Sequences decoded in one batch, 1 to 256. Requests beyond them queue."""
    idle_timeout_seconds: float | None = None
    """Idle time before the model is unloaded; 0 never unloads it."""
    thread_count: int | None = None
    """Threads that compute. `None` takes one per physical core."""
    batch_size_tokens: int | None = None
    """Most tokens decoded in one step, 32 to 8192."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts read from the model file."""

    architecture: str
    quantization: str
    parameter_count: int
    trained_context_tokens: int
    embedding_dimension_count: int
    has_chat_template: bool
    vocabulary_size: int
    display_name: str
    embedding_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """The process serving a loaded model."""

    pid: int
    start_time: datetime | None
    restart_count: int
    active_request_count: int
    """Sequences being decoded now."""
    queued_request_count: int
    """Requests waiting for a slot."""
    resident_bytes: int
    kv_cache_used_tokens: int
    kv_cache_total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failure the server remembers."""

    reason: str
    """Out of `paddock.Reason`, or newer."""
    message: str
    metadata: Mapping[str, str]
    failure_time: datetime | None
    log_tail: tuple[str, ...]
    """Last lines the worker wrote to its standard error, oldest first."""
    exit_code: int | None
    """Exit code of the worker, when it exited by itself."""
    signal: str
    """Signal that ended the worker, for example `SIGSEGV`; empty when none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A download of a model's files, while it is not done."""

    completed_bytes: int
    """Bytes on disk, counting those of earlier attempts."""
    total_bytes: int
    """Bytes of all files; 0 until the repository has been listed."""
    bytes_per_second: int
    """Bytes that arrive now; 0 when none do."""
    paused: bool
    failure: Failure | None
    """Why it failed; `None` while it runs, waits or is paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model the server knows."""

    id: str
    state: ModelState
    artifact_state: ArtifactState
    source: ModelSource | None
    load_id: str
    """Changes with every load; empty while unloaded."""
    runtime_options: RuntimeOptions | None
    """Options in effect; `None` while unloaded."""
    info: ModelInfo | None
    worker: WorkerInfo | None
    last_failure: Failure | None
    size_bytes: int
    load_time: datetime | None
    last_use_time: datetime | None
    expire_time: datetime | None
    """When the idle model will be unloaded; moves forward on use."""
    download: Download | None = None
    """The download of its files; `None` when there is none."""


class ProgressKind(StrEnum):
    """What a `LoadProgress` says about its stage."""

    STARTED = "started"
    ADVANCED = "advanced"
    FINISHED = "finished"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """One event of a load. Fields that do not belong to its `kind` keep their defaults."""

    stage: Stage
    kind: ProgressKind
    event_time: datetime | None = None
    message: str = ""
    """STARTED: a sentence for a person."""
    fraction: float | None = None
    """ADVANCED: completed part, 0 to 1; `None` when unknown."""
    completed_bytes: int = 0
    """ADVANCED: bytes done, in stages that move bytes."""
    total_bytes: int = 0
    """ADVANCED: bytes in all; 0 when unknown."""
    cached: bool = False
    """FINISHED: whether there was nothing to do."""
    stage_seconds: float | None = None
    """FINISHED: time the stage took."""
    warning: Failure | None = None
    """WARNING: what went wrong without ending the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """A finished unload."""

    model: Model
    aborted_request_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChanged:
    """A model appeared or changed."""

    revision: int
    model: Model
    previous_state: ModelState | None
    """State before the change; `None` in the initial state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDeleted:
    """A model and its files are gone."""

    revision: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """Everything up to `revision` has been sent."""

    revision: int


WatchEvent: TypeAlias = ModelChanged | ModelDeleted | Synced


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line a worker wrote to its standard error."""

    read_time: datetime | None
    load_id: str
    pid: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator of the server."""

    display_name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What the server says about itself."""

    version: str
    instance_id: str
    """New on every start of the server."""
    start_time: datetime | None
    features: tuple[str, ...]
    devices: tuple[Device, ...]
