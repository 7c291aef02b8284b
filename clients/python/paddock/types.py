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


class ModelOrigin(StrEnum):
    """Where a server knows a model from."""

    HUB_CACHE = "hub_cache"
    MODELS_DIR = "models_dir"
    PRESET = "preset"
    CONFIG_FILE = "config_file"
    UNKNOWN = "unknown"


class Modality(StrEnum):
    """A kind of input."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


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
    sleep_timeout_seconds: float | None = None
    """Idle time before the model gives its memory back and sleeps; 0 keeps it awake."""
    thread_count: int | None = None
    """Threads that compute. `None` takes one per physical core."""
    batch_size_tokens: int | None = None
    """Most tokens decoded in one step, 32 to 8192."""
    cache_type_k: str | None = None
    """Type of the keys in the KV cache: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0 or q5_1."""
    cache_type_v: str | None = None
    """Type of the values in the KV cache; one of the same names."""
    replica_count: int | None = None
    """Worker processes that serve the model, 1 to 16; each takes the memory of the whole model."""


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
    input_modalities: tuple[Modality, ...] = ()
    """What its files can take in; kinds newer than this client are left out."""
    template_has_tools: bool = False
    """Whether the chat template shows tools to the model."""
    template_has_thinking: bool = False
    """Whether the chat template knows of thinking."""


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


class MemoryPhase(StrEnum):
    """What the figures of a `MemoryCharge` are."""

    UNKNOWN = "unknown"
    PREDICTED = "predicted"
    """From the file and the options, while it loads."""
    MEASURED = "measured"
    RELEASING = "releasing"
    """The worker is being stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCharge:
    """What a model is charged with in the server's memory ledger."""

    phase: MemoryPhase
    bytes: Mapping[str, int]
    """By device; `RAM` is the main memory."""


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
    """When the idle model will be put to sleep or unloaded; moves forward on use."""
    workers: tuple[WorkerInfo, ...] = ()
    """Every worker there is, `worker` first; several for a model with replicas."""
    memory: MemoryCharge | None = None
    """What it is charged with; `None` while nothing is reserved for it."""
    lease_count: int = 0
    """Requests that use it now."""
    waiting_request_count: int = 0
    """Requests that wait for it to be loaded."""
    download: Download | None = None
    """The download of its files; `None` when there is none."""
    aliases: tuple[str, ...] = ()
    """Other names requests may use."""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    priority: int = 0
    """How much it is worth keeping beside others."""
    origin: ModelOrigin = ModelOrigin.UNKNOWN
    """Where the server knows it from."""
    description: str = ""
    group: str = ""
    load_on_startup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigProblem:
    """Something wrong in a configuration file of the server."""

    file: str
    line: int
    """From 1; 0 where the file as a whole is meant."""
    key: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What a reload of the configuration changed. Models are named by their ids."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged_count: int
    problems: tuple[ConfigProblem, ...]
    """What was left out of the files."""


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
    """The server's own memory, or one of its accelerators."""

    display_name: str
    total_bytes: int
    free_bytes: int
    budget_bytes: int = 0
    """What all models together may have."""
    held_bytes: int = 0
    """What models hold of it now."""


class MemoryVerdict(StrEnum):
    """Whether a model fits."""

    FITS = "fits"
    FITS_AFTER_EVICTION = "fits_after_eviction"
    NEVER_FITS = "never_fits"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """Memory of one kind on one device."""

    device: str
    """Name of the device, `RAM` or for example `CUDA0`."""
    kind: str
    """For example `weights` or `kv_cache`; a kind this client does not know is `other`."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device, seen from a model that is to be loaded."""

    device: str
    needed_bytes: int
    """What was measured, where `measured` says so, else the sum of the parts."""
    budget_bytes: int
    """What all models together may have."""
    held_bytes: int
    """What loaded models have now."""
    measured: bool
    """Whether an earlier load of the same files with the same options was measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a model would take in memory."""

    parts: tuple[MemoryPart, ...]
    devices: tuple[DeviceMemory, ...]
    verdict: MemoryVerdict
    options: RuntimeOptions
    """Options the estimate is for: those asked for, and what was chosen for the others."""
    roughness: str
    """Why the estimate may be far off; empty when it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What the server says about itself."""

    version: str
    instance_id: str
    """New on every start of the server."""
    start_time: datetime | None
    features: tuple[str, ...]
    devices: tuple[Device, ...]
