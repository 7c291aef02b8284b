"""Configuration of the server: flags, over environment, over a TOML file, over defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from paddock_server.catalog.configured.toml_file import MODEL_TABLES
from paddock_server.catalog.configured.toml_lines import key_lines
from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS, DEFAULT_CACHE_TYPE

ENV_PREFIX = "PADDOCK_"

CHANGES_IN_PLACE = frozenset(
    {
        "models_max",
        "memory_budget",
        "memory_margin",
        "models_autoload",
        "autoload_downloads",
        "ctx_size",
        "parallel",
        "n_gpu_layers",
        "threads",
        "batch_size",
        "cache_type_k",
        "cache_type_v",
        "queue_limit",
        "target_step_milliseconds",
        "idle_timeout_seconds",
        "sleep_idle_seconds",
        "total_queue_limit",
        "drain_seconds",
    }
)
"""The settings that a reload takes over; the others need a restart."""

DEMO_DIR = Path(__file__).resolve().parent / "demo"
"""Holds foal, the small model that comes with Paddock (models/foal in the repository)."""


class ConfigError(Exception):
    """A setting is wrong; the message names it and says what would be right."""


def _known_cache_type(value: str) -> str:
    if value not in CACHE_TYPE_NUMBERS:
        message = f"{value!r} is none of {', '.join(CACHE_TYPE_NUMBERS)}"
        raise ValueError(message)
    return value


CacheType = Annotated[str, AfterValidator(_known_cache_type)]
"""A type that llama-server names for `--cache-type-k` and `--cache-type-v`."""


def default_state_dir() -> Path:
    """Return where the server keeps what it must remember: `$XDG_STATE_HOME/paddock` or its stand-in."""
    return _own_directory("XDG_STATE_HOME", "state")


def default_models_dir() -> Path:
    """Return where models are looked for when nobody says where: `$XDG_DATA_HOME/paddock/models`."""
    return _own_directory("XDG_DATA_HOME", "share") / "models"


def default_hub_cache() -> Path:
    """Return where huggingface_hub and llama-server keep what they download."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expandvars(os.environ[variable])).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or str(Path(cache) / "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _own_directory(variable: str, fallback: str) -> Path:
    """Return Paddock's directory in the base directory a variable names, or in `~/.local/FALLBACK`."""
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / ".local" / fallback) / "paddock"


class ServerConfig(BaseSettings):
    """Settings of `paddock serve` and `paddock up`, named as in llama-server where they mean the same."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    models_dir: Annotated[tuple[Path, ...], NoDecode] = ()
    """Directories searched for models. In the environment, separated like PATH. Without any, the demo model
    and the default directory are served: see `model_directories`."""

    models_preset: Path | None = None
    """llama-server's INI file about models, read as it is."""

    config_file: Path | None = None
    """The TOML file these settings were read from; its tables of models are the catalog's."""

    hf_cache: bool = True
    """Whether the Hugging Face Hub's cache is served too, and downloads are offered. It is where
    huggingface_hub has it: HF_HUB_CACHE, HF_HOME."""

    models_max: int = Field(4, ge=0)
    """Most models loaded at once; 0 is no limit."""

    memory_budget: Annotated[Mapping[str, int], NoDecode] = Field(default_factory=dict[str, int])
    """Bytes that models may take, by device: `RAM=24GiB,CUDA0=20GiB`. A device that is not named has what is
    free of it when the server starts, less `memory_margin`."""

    memory_margin: float = Field(0.1, ge=0, lt=1)
    """Part of the free memory of each device that is left alone."""

    models_autoload: bool = True
    """Whether a request for a model that is not loaded loads it."""

    autoload_downloads: bool = False
    """Whether such a request also downloads a model that is not there. Load and Download always may."""

    ctx_size: int = Field(8192, ge=0, le=16_777_216)
    """Tokens the KV cache of a model holds, shared by its sequences; 0 takes the trained context."""

    parallel: int = Field(4, ge=1, le=256)
    """Sequences a model decodes at once."""

    n_gpu_layers: int = Field(-1, ge=-1)
    """Layers offloaded to the accelerator; -1 offloads all."""

    threads: int = Field(0, ge=0, le=1024)
    """Threads a worker computes with; 0 takes one per physical core."""

    batch_size: int = Field(512, ge=32, le=8192)
    """Most tokens a worker decodes in one step."""

    cache_type_k: CacheType = DEFAULT_CACHE_TYPE
    """Type of the keys in the KV cache."""

    cache_type_v: CacheType = DEFAULT_CACHE_TYPE
    """Type of the values in the KV cache."""

    queue_limit: int = Field(128, ge=0, le=100_000)
    """Requests that may wait for one model."""

    target_step_milliseconds: int = Field(50, ge=1, le=10_000)
    """Length of step to aim at while a prompt is taken in beside streams."""

    idle_timeout_seconds: float = Field(0, ge=0)
    """Idle time after which a model is unloaded; 0 keeps it."""

    sleep_idle_seconds: float = Field(0, ge=0)
    """Idle time after which a model gives its memory back and sleeps; 0 keeps it awake."""

    total_queue_limit: int = Field(4096, ge=0, le=1_000_000)
    """Requests that may wait for models to be loaded, over all models."""

    drain_seconds: float = Field(30, ge=0)
    """How long running requests may go on when the server or a model stops."""

    grpc_host: str = "127.0.0.1"
    """Address the gRPC server listens on."""

    grpc_port: int = Field(50051, ge=0, le=65535)
    """Port the gRPC server listens on; 0 takes a free one."""

    host: str = "127.0.0.1"
    """Address `paddock up` serves HTTP on."""

    port: int = Field(8080, ge=0, le=65535)
    """Port `paddock up` serves HTTP on; 0 takes a free one."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins of web pages that may read answers over HTTP. In the environment, separated by commas."""

    reflection: bool = True
    """Whether gRPC reflection is on, so that grpcurl needs no protos."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto` is `console` on a terminal and `json` otherwise."""

    state_dir: Path | None = Field(default_factory=default_state_dir)
    """Where operators' loads are remembered over a restart; an empty value turns that off."""

    restore: bool = True
    """Whether remembered loads and downloads are taken up at the start. They stay remembered either way."""

    _flags: Mapping[str, object] = PrivateAttr(default_factory=dict[str, object])
    """What was given on the command line."""

    @property
    def model_directories(self) -> tuple[Path, ...]:
        """The directories to serve: those named, else the demo model's and, where it exists, the default."""
        if self.models_dir:
            return self.models_dir
        default = default_models_dir()
        return (DEMO_DIR, default.resolve()) if default.is_dir() else (DEMO_DIR,)

    @property
    def hub_cache(self) -> Path | None:
        """The hub's cache; None when it is not served."""
        return default_hub_cache() if self.hf_cache else None

    @field_validator("models_dir", mode="before")
    @classmethod
    def _split_models_dir(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in value.split(os.pathsep) if part)
        return value

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        return parsed_budget(value) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_cors_origins(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("models_dir")
    @classmethod
    def _models_dir_exists(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in value:
            if not path.is_dir():
                problem = "is not a directory" if path.exists() else "does not exist"
                message = f"{str(path)!r} {problem}; name a directory that holds GGUF files"
                raise ValueError(message)
        return tuple(path.resolve() for path in value)

    @field_validator("models_preset")
    @classmethod
    def _models_preset_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            message = f"{str(value)!r} does not exist; name an INI file as llama-server reads it"
            raise ValueError(message)
        return value

    @field_validator("state_dir", mode="before")
    @classmethod
    def _empty_state_dir_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file; no dotenv, no secrets directory."""
        del dotenv_settings, file_secret_settings
        return (init_settings, env_settings, _TomlSettings(settings_cls))

    @classmethod
    def load(cls, flags: Mapping[str, object], config_file: Path | None = None) -> ServerConfig:
        """Read the configuration.

        `flags` holds only what was given on the command line, by field name. Raises `ConfigError`.
        """
        if config_file is not None and not config_file.is_file():
            message = f"The configuration file {str(config_file)!r} does not exist."
            raise ConfigError(message)

        class Loaded(cls):
            model_config = SettingsConfigDict(toml_file=config_file)
            _flags: Mapping[str, object] = PrivateAttr(default_factory=lambda: dict(flags))

        try:
            return Loaded(**{**flags, "config_file": config_file})  # pyright: ignore[reportArgumentType]
        except ValidationError as error:
            raise ConfigError(_describe(error, flags, config_file)) from error
        except ValueError as error:  # tomllib.TOMLDecodeError is one
            message = f"The configuration file {str(config_file)!r} cannot be read: {error}."
            raise ConfigError(message) from error

    def reread(self) -> ServerConfig:
        """Read the configuration again, under the same flags. Raises `ConfigError`."""
        return ServerConfig.load(self._flags, self.config_file)


class _TomlSettings(TomlConfigSettingsSource):
    """The keys of the file that are settings; its tables of models are the catalog's."""

    def __call__(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {name: value for name, value in super().__call__().items() if name not in MODEL_TABLES}


def parsed_budget(text: str) -> dict[str, int]:
    """Read `DEVICE=SIZE,...`, sizes in bytes or with a unit. Raises ValueError."""
    budget: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        device, _, size = part.partition("=")
        match = _SIZE.fullmatch(size.strip())
        if not device.strip() or match is None:
            message = f"{part!r} is not DEVICE=SIZE, such as RAM=24GiB"
            raise ValueError(message)
        budget[device.strip()] = int(float(match["number"]) * _UNITS[match["unit"].lower()])
    return budget


_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>|[kmgt]i?b?|b)", re.IGNORECASE)
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}{rest}": 1024**power for power, letter in enumerate("kmgt", 1) for rest in ("", "i", "ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
"""As in GiB and GB; a letter alone is the binary unit."""


def setting_lines(file: Path | None) -> dict[str, int]:
    """Return the lines of the settings in a configuration file, from 1; none without a file."""
    if file is None:
        return {}
    lines = key_lines(file.read_text(encoding="utf-8"))
    return {path[0]: line for path, line in lines.items() if len(path) == 1}


def _describe(error: ValidationError, flags: Mapping[str, object], file: Path | None) -> str:
    """Turn pydantic's report into one sentence per setting; what stands in the file, with its line."""
    lines = key_lines(file.read_text(encoding="utf-8")) if file is not None else {}
    sentences: list[str] = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else "?"
        flag = "--" + name.replace("_", "-")
        variable = f"{ENV_PREFIX}{name.upper()}"
        is_in_file = (name,) in lines and name not in flags and variable not in os.environ
        place = f"{file}:{lines[name,]}: " if is_in_file else ""
        if item["type"] == "extra_forbidden":
            sentences.append(f"{place}There is no setting named {name!r}.")
            continue
        reason = item["msg"].removeprefix("Value error, ")
        sentences.append(f"{place}{flag} ({variable}): {reason[:1].lower() + reason[1:]}.")
    return "\n".join(sentences)
