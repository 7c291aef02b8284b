"""What can be said of a model: one table for `paddock.toml` and for llama-server's INI alike. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from paddock_server.catalog.configured.kinds import (
    MAX_NAME_CHARACTERS,
    Boolean,
    Choice,
    HubName,
    Integer,
    JsonObject,
    Kind,
    Names,
    Number,
    Text,
)
from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS

_MAX_INT32: Final = 2**31 - 1
_MAX_SECONDS: Final = 10 * 365 * 24 * 3600


class Part(Enum):
    """What a key is about."""

    MODEL = auto()
    """The model as it is listed and kept."""

    OPTION = auto()
    """An option of a load, by its name in `RuntimeOptions`."""

    SAMPLING = auto()
    """A default of requests, by its name in `SamplingParams`."""

    REQUEST = auto()
    """Another default of requests."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key: `name` in `paddock.toml` (sampling keys stand in a table `sampling`), `field` where it goes.

    `preset_names` are llama-server's. A value out of `unset_texts` in an INI file leaves the key unset.
    """

    part: Part
    name: str
    field: str
    kind: Kind
    preset_names: tuple[str, ...] = ()
    unset_texts: frozenset[str] = frozenset()

    @property
    def dotted(self) -> str:
        """The name as it stands in messages."""
        return f"sampling.{self.name}" if self.part is Part.SAMPLING else self.name


_MINUS_ONE: Final = frozenset({"-1"})
_MODEL, _OPTION, _SAMPLING, _REQUEST = Part.MODEL, Part.OPTION, Part.SAMPLING, Part.REQUEST

KEYS: Final = (
    Key(_MODEL, "path", "path", Text(4096, in_line=True), ("m", "model", "LLAMA_ARG_MODEL")),
    Key(
        _MODEL,
        "hf",
        "hf",
        HubName(),
        ("hf", "hfr", "hf-repo", "LLAMA_ARG_HF_REPO"),
    ),
    Key(_MODEL, "mmproj", "mmproj", Text(4096, in_line=True), ("mm", "mmproj", "LLAMA_ARG_MMPROJ")),
    Key(_MODEL, "aliases", "aliases", Names(), ("a", "alias", "LLAMA_ARG_ALIAS")),
    Key(_MODEL, "tags", "tags", Names(), ("tags", "LLAMA_ARG_TAGS")),
    Key(_MODEL, "pinned", "pinned", Boolean()),
    Key(_MODEL, "priority", "priority", Integer(-1000, 1000)),
    Key(_MODEL, "group", "group", Text(MAX_NAME_CHARACTERS, in_line=True)),
    Key(_MODEL, "load_on_startup", "load_on_startup", Boolean(), ("load-on-startup",)),
    Key(_MODEL, "hidden", "hidden", Boolean()),
    Key(_MODEL, "description", "description", Text(4096, in_line=True)),
    Key(_MODEL, "idle_timeout_seconds", "idle_timeout_seconds", Number(0, _MAX_SECONDS)),
    Key(
        _MODEL,
        "sleep_idle_seconds",
        "sleep_timeout_seconds",
        Number(0, _MAX_SECONDS),
        ("sleep-idle-seconds",),
        _MINUS_ONE,
    ),
    Key(_MODEL, "drain_seconds", "drain_seconds", Number(0, _MAX_SECONDS), ("stop-timeout",)),
    Key(
        _OPTION,
        "ctx_size",
        "context_size_tokens",
        Integer(0, 1 << 24),
        ("c", "ctx-size", "LLAMA_ARG_CTX_SIZE"),
    ),
    Key(
        _OPTION,
        "parallel",
        "slot_count",
        Integer(1, 256),
        ("np", "parallel", "LLAMA_ARG_N_PARALLEL"),
        _MINUS_ONE,
    ),
    Key(
        _OPTION,
        "n_gpu_layers",
        "gpu_layer_count",
        Integer(-1, 1 << 16, (("auto", -1), ("all", -1))),
        ("ngl", "gpu-layers", "n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS"),
    ),
    Key(
        _OPTION,
        "threads",
        "thread_count",
        Integer(0, 1024, (("-1", 0),)),
        ("t", "threads", "LLAMA_ARG_THREADS"),
    ),
    Key(
        _OPTION,
        "batch_size",
        "batch_size_tokens",
        Integer(32, 8192),
        ("b", "batch-size", "LLAMA_ARG_BATCH"),
    ),
    Key(
        _OPTION,
        "cache_type_k",
        "cache_type_k",
        Choice(tuple(CACHE_TYPE_NUMBERS)),
        ("ctk", "cache-type-k", "LLAMA_ARG_CACHE_TYPE_K"),
    ),
    Key(
        _OPTION,
        "cache_type_v",
        "cache_type_v",
        Choice(tuple(CACHE_TYPE_NUMBERS)),
        ("ctv", "cache-type-v", "LLAMA_ARG_CACHE_TYPE_V"),
    ),
    Key(_OPTION, "replicas", "replica_count", Integer(1, 16)),
    Key(
        _SAMPLING,
        "temperature",
        "temperature",
        Number(0, 100),
        ("temp", "temperature", "LLAMA_ARG_TEMPERATURE"),
    ),
    Key(_SAMPLING, "top_k", "top_k", Integer(0, _MAX_INT32), ("top-k", "LLAMA_ARG_TOP_K")),
    Key(_SAMPLING, "top_p", "top_p", Number(0, 1, low_open=True), ("top-p", "LLAMA_ARG_TOP_P")),
    Key(_SAMPLING, "min_p", "min_p", Number(0, 1), ("min-p", "LLAMA_ARG_MIN_P")),
    Key(
        _SAMPLING,
        "presence_penalty",
        "presence_penalty",
        Number(-2, 2),
        ("presence-penalty", "LLAMA_ARG_PRESENCE_PENALTY"),
    ),
    Key(
        _SAMPLING,
        "frequency_penalty",
        "frequency_penalty",
        Number(-2, 2),
        ("frequency-penalty", "LLAMA_ARG_FREQUENCY_PENALTY"),
    ),
    Key(
        _SAMPLING,
        "repetition_penalty",
        "repetition_penalty",
        Number(0, 10, low_open=True),
        ("repeat-penalty", "LLAMA_ARG_REPEAT_PENALTY"),
    ),
    Key(
        _SAMPLING,
        "penalty_last_tokens",
        "penalty_last_tokens",
        Integer(-1, _MAX_INT32),
        ("repeat-last-n", "LLAMA_ARG_REPEAT_LAST_N"),
    ),
    Key(_SAMPLING, "seed", "seed", Integer(0, (1 << 63) - 1), ("s", "seed", "LLAMA_ARG_SEED"), _MINUS_ONE),
    Key(
        _REQUEST,
        "max_tokens",
        "max_tokens",
        Integer(1, _MAX_INT32),
        ("n", "predict", "n-predict", "LLAMA_ARG_N_PREDICT"),
        _MINUS_ONE,
    ),
    Key(_REQUEST, "system_prompt", "system_prompt", Text()),
    Key(
        _REQUEST,
        "template_arguments",
        "template_arguments_json",
        JsonObject(),
        ("chat-template-kwargs", "LLAMA_ARG_CHAT_TEMPLATE_KWARGS", "LLAMA_CHAT_TEMPLATE_KWARGS"),
    ),
    # A budget in tokens needs an engine that counts reasoning; none at all is an argument of the template.
    Key(
        _REQUEST,
        "reasoning_budget",
        "reasoning_budget",
        Integer(0, 0),
        ("reasoning-budget", "LLAMA_ARG_THINK_BUDGET"),
        _MINUS_ONE,
    ),
)
"""Every key, with its place in both files."""

BY_NAME: Final[Mapping[str, Key]] = MappingProxyType(
    {key.name: key for key in KEYS if key.part is not Part.SAMPLING}
)
SAMPLING_BY_NAME: Final[Mapping[str, Key]] = MappingProxyType(
    {key.name: key for key in KEYS if key.part is Part.SAMPLING}
)
BY_PRESET_NAME: Final[Mapping[str, Key]] = MappingProxyType(
    {name: key for key in KEYS for name in key.preset_names}
)

SERVER_SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "models-dir": "--models-dir",
        "models-max": "--models-max",
        "models-preset": "--models-preset",
        "models-autoload": "--models-autoload",
        "no-models-autoload": "--no-models-autoload",
        "host": "--host",
        "port": "--port",
        "LLAMA_ARG_MODELS_DIR": "--models-dir",
        "LLAMA_ARG_MODELS_MAX": "--models-max",
        "LLAMA_ARG_MODELS_PRESET": "--models-preset",
        "LLAMA_ARG_MODELS_AUTOLOAD": "--models-autoload",
        "LLAMA_ARG_HOST": "--host",
        "LLAMA_ARG_PORT": "--port",
    }
)
"""Keys of llama-server that belong to the server as a whole, and the flag to use instead."""

NOT_PER_MODEL: Final = frozenset({"path", "hf", "mmproj", "aliases"})
"""Keys that say something only of one model, so that they cannot stand among the defaults."""
