"""Options of a load: ranges, defaults, and whether two loads are the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from paddock.errors import FieldViolation, InvalidFieldError, Reason
from paddock.v1 import model_pb2
from paddock_server.catalog import DEFAULT_SETUP
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
    idle_timeout_seconds: float = 0.0

    def to_proto(self) -> model_pb2.RuntimeOptions:
        """Return the message for `Model.runtime_options`."""
        proto = model_pb2.RuntimeOptions(**{name: getattr(self, name) for name in _RANGES})
        proto.idle_timeout.FromNanoseconds(int(self.idle_timeout_seconds * 1e9))
        return proto

    def rebased(self, old: Options, new: Options) -> Options:
        """Return these options after the defaults they were made from have become others.

        What somebody had set otherwise stays as it was set.
        """
        values = {
            field.name: getattr(new, field.name)
            for field in fields(self)
            if getattr(self, field.name) == getattr(old, field.name)
        }
        return replace(self, **values)

    def as_wish(self) -> Wish:
        """Return a wish for exactly these options."""
        return Wish({name: getattr(self, name) for name in _RANGES}, self.idle_timeout_seconds)


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
"""The options a worker is started with, and what they may be. The idle time-out is the server's affair."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The options a caller has set; the others are left to the server."""

    values: Mapping[str, int]
    """By name of the field; only those a worker is started with."""

    idle_timeout_seconds: float | None = None
    """None when left to the server."""

    def filled(self, defaults: Options) -> Options:
        """Return all options: what was set, and the defaults."""
        options = replace(defaults, **self.values)
        if self.idle_timeout_seconds is None:
            return options
        return replace(options, idle_timeout_seconds=self.idle_timeout_seconds)

    def conflicts(self, asked: Options, effective: Options | None) -> tuple[str, ...]:
        """Return the names of the options that were set and that a load does not have.

        `asked` is what the load was started with and `effective` what the worker made of it (a context size
        of 0 becomes the trained one). Agreeing with either is agreeing. The idle time-out needs no other
        load.
        """
        return tuple(
            name
            for name, value in self.values.items()
            if value != getattr(asked, name) and (effective is None or value != getattr(effective, name))
        )


def wish_of(options: model_pb2.RuntimeOptions) -> Wish:
    """Read the options a caller has set.

    Raises:
        InvalidFieldError: some are out of range; it names each of them.
    """
    values: dict[str, int] = {}
    violations: list[FieldViolation] = []
    for name, (low, high) in _RANGES.items():
        if not options.HasField(name):  # pyright: ignore[reportArgumentType]  # the stub wants a literal
            continue
        values[name] = getattr(options, name)
        if not low <= values[name] <= high:
            description = f"must be from {low} to {high}, not {values[name]}"
            violations.append(FieldViolation(f"{FIELD}.{name}", description))
    idle: float | None = None
    if options.HasField("idle_timeout"):
        idle = options.idle_timeout.seconds + options.idle_timeout.nanos / 1e9
        if not 0 <= idle <= MAX_IDLE_SECONDS:
            description = f"must be from 0 to {MAX_IDLE_SECONDS} seconds; 0 turns idle unloading off"
            violations.append(FieldViolation(f"{FIELD}.idle_timeout", description))
    if violations:
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        metadata = {"field": violations[0].field}
        raise InvalidFieldError(Reason.INVALID_FIELD, message, metadata=metadata, violations=violations)
    return Wish(values, idle)


def default_options(
    config: ManagerConfig, facts: ModelFacts | None, setup: ModelSetup = DEFAULT_SETUP
) -> Options:
    """Return the options of a load nobody set any for: those of the model's own setup, else the server's.

    The server's context is capped to what the slots can use: each at most the context the model was trained
    with. One that the setup names is taken as it is.
    """
    context = config.context_size_tokens
    if facts is not None and facts.trained_context_tokens:
        slot_count = setup.options.get("slot_count", config.slot_count)
        context = min(context, facts.trained_context_tokens * slot_count)
    options = Options(
        context_size_tokens=context,
        gpu_layer_count=config.gpu_layer_count,
        slot_count=config.slot_count,
        thread_count=config.thread_count,
        batch_size_tokens=config.batch_size_tokens,
        idle_timeout_seconds=config.idle_timeout_seconds,
    )
    return Wish(setup.options, setup.idle_timeout_seconds).filled(options)


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
        queue_limit=config.queue_limit,
        target_step_milliseconds=config.target_step_milliseconds,
    )


def stored_wish(stored: Mapping[str, object]) -> Wish:
    """Read options kept in a file; unknown ones are left out, so that another version's file can be read.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """
    values: dict[str, int] = {}
    for name, (low, high) in _RANGES.items():
        value = stored.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            message = f"{name} is {value!r}; it must be from {low} to {high}"
            raise ValueError(message)
        values[name] = value
    idle = stored.get("idle_timeout_seconds")
    if idle is None:
        return Wish(values)
    if not isinstance(idle, int | float) or isinstance(idle, bool) or not 0 <= idle <= MAX_IDLE_SECONDS:
        message = f"idle_timeout_seconds is {idle!r}; it must be from 0 to {MAX_IDLE_SECONDS}"
        raise ValueError(message)
    return Wish(values, float(idle))
