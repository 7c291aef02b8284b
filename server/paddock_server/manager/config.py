"""Settings of the manager."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from paddock_server.catalog import Problem
from paddock_server.manager.admission import Admission
from paddock_server.memory import DEFAULT_CACHE_TYPE
from paddock_server.supervisor import RestartPolicy


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """What the operator can set. The options of a model are defaults for loads that leave them out."""

    models_max: int = 4
    """Most models with a worker at once; 0 is no limit."""

    autoload: bool = True
    """Whether a request that leaves it open loads a model that is not loaded."""

    autoload_downloads: bool = False
    """Whether a request that may load a model may download it first. Whoever can send requests could then
    fill the disk with whatever the hub has."""

    context_size_tokens: int = 8192
    """Cells of a model's KV cache, over all its sequences; 0 takes the trained context."""

    slot_count: int = 4
    """Sequences a model decodes at once."""

    gpu_layer_count: int = -1
    """Layers offloaded to the accelerator; -1 offloads all."""

    thread_count: int = 0
    """Threads a worker computes with; 0 takes one per physical core."""

    batch_size_tokens: int = 512
    """Most tokens a worker decodes in one step."""

    cache_type_k: str = DEFAULT_CACHE_TYPE
    """Type of the keys in the KV cache; a name of `memory.CACHE_TYPES`."""

    cache_type_v: str = DEFAULT_CACHE_TYPE
    """Type of the values in the KV cache."""

    queue_limit: int = 128
    """Requests that may wait for one model: for its load in the server, and for a slot in its worker."""

    waiting_requests_max: int = 4096
    """Requests that may wait for models to be loaded, over all models."""

    target_step_milliseconds: int = 50
    """Length of step a worker aims at while it takes a prompt in beside streams."""

    idle_timeout_seconds: float = 0.0
    """Idle time after which a model is unloaded; 0 keeps it."""

    sleep_timeout_seconds: float = 0.0
    """Idle time after which a model gives its memory back and sleeps; 0 has it stay awake."""

    drain_seconds: float = 30.0
    """How long running requests may go on when a model is unloaded and the caller does not say."""

    stop_grace_seconds: float = 5.0
    """How long a worker may take to leave by itself when it is told to."""

    patience_seconds: float = 10.0
    """How long a load waits for a model to become idle by itself. Then one that never is has to let its
    requests end and go: traffic on it must not keep others out for ever. Loading a model takes seconds, so
    much less would swap more than serve."""

    admission_timeout_seconds: float = 600.0
    """How long a load may wait for room, if its caller does not say: as long as the longest answers take."""

    waiting_models_max: int = 64
    """Models that may wait for room at once."""

    restart: RestartPolicy = field(default_factory=RestartPolicy)
    """When a worker that died is started again."""

    load_restart: RestartPolicy = field(default_factory=lambda: RestartPolicy(max_crash_count=2))
    """The same for a worker that died before its model was ever loaded. A file that makes llama.cpp abort
    does so every time; one repetition tells it from bad luck."""

    state_file: Path | None = None
    """Where operators' loads are kept over a restart; None keeps them nowhere."""

    hub_cache: Path | None = None
    """The Hugging Face Hub's cache, where downloads go; None does without the hub."""

    downloads_file: Path | None = None
    """Where unfinished downloads are kept over a restart; None keeps them nowhere."""

    restore: bool = True
    """Whether what is kept over a restart is taken up at the start: loads and downloads."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a reload finds of the server's own settings."""

    config: ManagerConfig
    admission: Admission
    problems: tuple[Problem, ...] = ()
    """Changes that only a restart takes over."""
