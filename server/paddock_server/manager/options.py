"""Options of a load: ranges, defaults, and whether two loads are the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paddock.errors import FieldViolation, InvalidFieldError, Reason
from paddock.v1 import model_pb2
from paddock_server.catalog import DEFAULT_SETUP
from paddock_server.memory import CACHE_TYPES, DEFAULT_CACHE_TYPE
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from paddock_server.catalog import ModelFacts, ModelSetup
    from paddock_server.manager.config import ManagerConfig

FIELD: Final = "runtime_options"
"""Where the options stand in a `LoadRequest`."""

MAX_IDLE_SECONDS: Final = 10 * 365 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Options:
    """Every option of a load, defaults filled in. Units as in `RuntimeOptions`, seconds for the time-out."""

    context_size_tokens: int
    gpu_layer_count: int
    slot_count: int
    thread_count: int
    batch_size_tokens: int
    cache_type_k: str = DEFAULT_CACHE_TYPE
    cache_type_v: str = DEFAULT_CACHE_TYPE
    idle_timeout_seconds: float = 0.0
    sleep_timeout_seconds: float = 0.0
    replica_count: int = 1

    def to_proto(self) -> model_pb2.RuntimeOptions:
        """Return the message for `Model.runtime_options`."""
        counts = {name: getattr(self, name) for name in (*_STARTED_WITH, *_COUNTS)}
        proto = model_pb2.RuntimeOptions(**counts)
        for name, field_name in _TIMES.items():
            getattr(proto, field_name).FromNanoseconds(int(getattr(self, name) * 1e9))
        return proto

    @property
    def in_place(self) -> dict[str, float]:
        """Those that need no other load: idle times, in seconds, and the number of replicas."""
        return {name: getattr(self, name) for name in (*_TIMES, *_COUNTS)}


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a model stays in memory. They change while it is loaded, without another load."""

    pinned: bool = False
    """Whether it is neither evicted nor unloaded for idleness."""

    priority: int = 0
    """Each step up doubles what it costs to evict it."""

    group: str = ""
    """Exclusive group: of its models only one is in memory at a time. Empty: none."""


class _Range(NamedTuple):
    low: int
    high: int


_RANGES: Final[Mapping[str, _Range]] = MappingProxyType(
    {
        "context_size_tokens": _Range(0, 1 << 24),
        "gpu_layer_count": _Range(-1, 1 << 16),
        "slot_count": _Range(1, 256),
        "thread_count": _Range(0, 1024),
        "batch_size_tokens": _Range(32, 8192),
    }
)
"""The numbers a worker is started with, and what they may be."""

_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"cache_type_k": tuple(CACHE_TYPES), "cache_type_v": tuple(CACHE_TYPES)}
)
"""The names a worker is started with, and which there are."""

_STARTED_WITH: Final = (*_RANGES, *_CHOICES)

_TIMES: Final[Mapping[str, str]] = MappingProxyType(
    {"idle_timeout_seconds": "idle_timeout", "sleep_timeout_seconds": "sleep_timeout"}
)
"""The options that are the server's affair, and their fields: how long a model may be idle before it is
unloaded, or put to sleep. They need no other load."""

_COUNTS: Final[Mapping[str, _Range]] = MappingProxyType({"replica_count": _Range(1, 16)})
"""The numbers that are the server's affair, and what they may be. They need no other load either."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The options a caller has set; the others are left to the server."""

    values: Mapping[str, int | str]
    """By name of the field; only those a worker is started with."""

    in_place: Mapping[str, float] = field(default_factory=dict[str, float])
    """By name of the option, times in seconds; only those a worker does not know of."""

    @property
    def replica_count(self) -> int | None:
        """The number of replicas that was set."""
        count = self.in_place.get("replica_count")
        return None if count is None else int(count)

    def filled(self, defaults: Options) -> Options:
        """Return all options: what was set, and the defaults."""
        return replace(defaults, **dict[str, Any](self.values), **dict[str, Any](self.in_place))

    def and_then(self, later: Wish) -> Wish:
        """Return what is set when two wishes come one after the other."""
        return Wish({**self.values, **later.values}, {**self.in_place, **later.in_place})

    def conflicts(self, asked: Options, effective: Options | None) -> tuple[str, ...]:
        """Return the names of the options that were set and that a load does not have.

        `asked` is what the load was started with and `effective` what the worker made of it (a context size
        of 0 becomes the trained one). Agreeing with either is agreeing. What needs no other load is left out.
        """
        return tuple(
            name
            for name, value in self.values.items()
            if value != getattr(asked, name) and (effective is None or value != getattr(effective, name))
        )


NO_WISH: Final = Wish({})
"""Everything is left to the server."""


def wish_of(options: model_pb2.RuntimeOptions) -> Wish:
    """Read the options a caller has set.

    Raises:
        InvalidFieldError: some are out of range; it names each of them.
    """
    values: dict[str, int | str] = {}
    violations: list[FieldViolation] = []
    for name in _STARTED_WITH:
        if not options.HasField(name):  # pyright: ignore[reportArgumentType]  # the stub wants a literal
            continue
        values[name] = getattr(options, name)
        fault = _fault(name, values[name])
        if fault is not None:
            violations.append(FieldViolation(f"{FIELD}.{name}", f"{fault}, not {values[name]}"))
    in_place: dict[str, float] = {}
    for name in _COUNTS:
        if not options.HasField(name):  # pyright: ignore[reportArgumentType]  # the stub wants a literal
            continue
        in_place[name] = getattr(options, name)
        fault = _fault(name, in_place[name])
        if fault is not None:
            violations.append(FieldViolation(f"{FIELD}.{name}", f"{fault}, not {in_place[name]}"))
    for name, field_name in _TIMES.items():
        if not options.HasField(field_name):  # pyright: ignore[reportArgumentType]  # the stub wants a literal
            continue
        duration = getattr(options, field_name)
        in_place[name] = duration.seconds + duration.nanos / 1e9
        if not 0 <= in_place[name] <= MAX_IDLE_SECONDS:
            description = f"must be from 0 to {MAX_IDLE_SECONDS} seconds; 0 turns it off"
            violations.append(FieldViolation(f"{FIELD}.{field_name}", description))
    if violations:
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        metadata = {"field": violations[0].field}
        raise InvalidFieldError(Reason.INVALID_FIELD, message, metadata=metadata, violations=violations)
    return Wish(values, in_place)


def _fault(name: str, value: object) -> str | None:
    """Return what an option must be, when it is not."""
    if name in _CHOICES:
        choices = _CHOICES[name]
        return None if value in choices else f"must be one of {', '.join(choices)}"
    low, high = _RANGES[name] if name in _RANGES else _COUNTS[name]
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"must be from {low} to {high}"


def default_options(
    config: ManagerConfig, facts: ModelFacts | None, setup: ModelSetup = DEFAULT_SETUP
) -> Options:
    """Return the options of a load nobody set any for: those of the model's own setup, else the server's.

    The server's context is capped to what the slots can use: each at most the context the model was trained
    with. One that the setup names is taken as it is.
    """
    context = config.context_size_tokens
    if facts is not None and facts.trained_context_tokens:
        slot_count = int(setup.options.get("slot_count", config.slot_count))
        context = min(context, facts.trained_context_tokens * slot_count)
    options = Options(
        context_size_tokens=context,
        gpu_layer_count=config.gpu_layer_count,
        slot_count=config.slot_count,
        thread_count=config.thread_count,
        batch_size_tokens=config.batch_size_tokens,
        cache_type_k=config.cache_type_k,
        cache_type_v=config.cache_type_v,
        idle_timeout_seconds=config.idle_timeout_seconds,
        sleep_timeout_seconds=config.sleep_timeout_seconds,
    )
    times = {name: getattr(setup, name) for name in _TIMES}
    said = {name: seconds for name, seconds in times.items() if seconds is not None}
    return Wish(setup.options, said).filled(options)


def terms_of(setup: ModelSetup, pinned: bool | None = None) -> Terms:
    """Return the terms a model's setup gives it; `pinned` is the operator's word, where there is one."""
    return Terms(
        pinned=setup.pinned if pinned is None else pinned,
        priority=setup.priority,
        group=setup.group if setup.exclusive else "",
    )


def effective_options(asked: Options, ready: worker_pb2.Ready) -> Options:
    """Return the options as the worker took them."""
    return replace(
        asked,
        context_size_tokens=ready.context_size_tokens or asked.context_size_tokens,
        gpu_layer_count=ready.gpu_layer_count,
        slot_count=ready.slot_count or asked.slot_count,
        thread_count=ready.thread_count or asked.thread_count,
        batch_size_tokens=ready.batch_size_tokens or asked.batch_size_tokens,
    )


def load_frame(model_path: str, options: Options, config: ManagerConfig) -> worker_pb2.Load:
    """Return what a worker is told to load."""
    return worker_pb2.Load(
        model_path=model_path,
        context_size_tokens=options.context_size_tokens,
        gpu_layer_count=options.gpu_layer_count,
        slot_count=options.slot_count,
        thread_count=options.thread_count,
        batch_size_tokens=options.batch_size_tokens,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        queue_limit=config.queue_limit,
        target_step_milliseconds=config.target_step_milliseconds,
    )


def stored_wish(stored: Mapping[str, object]) -> Wish:
    """Read options kept in a file; unknown ones are left out, so that another version's file can be read.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """
    values: dict[str, int | str] = {}
    for name in _STARTED_WITH:
        value = stored.get(name)
        if value is None:
            continue
        fault = _fault(name, value)
        if fault is not None or not isinstance(value, int | str):
            message = f"{name} is {value!r}; it {fault}"
            raise ValueError(message)
        values[name] = value
    in_place: dict[str, float] = {}
    for name in _COUNTS:
        value = stored.get(name)
        if value is None:
            continue
        fault = _fault(name, value)
        if fault is not None or not isinstance(value, int):
            message = f"{name} is {value!r}; it {fault}"
            raise ValueError(message)
        in_place[name] = value
    for name in _TIMES:
        value = stored.get(name)
        if value is None:
            continue
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value <= MAX_IDLE_SECONDS
        ):
            message = f"{name} is {value!r}; it must be from 0 to {MAX_IDLE_SECONDS}"
            raise ValueError(message)
        in_place[name] = float(value)
    return Wish(values, in_place)
