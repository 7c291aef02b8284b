"""Failures as values: what a call is refused with, and what a model remembers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from paddock.errors import DEFAULT_RETRY_SECONDS, FieldViolation, PaddockError, Reason, make_error
from paddock.sizes import size_text
from paddock.v1 import model_pb2
from paddock_server.supervisor import WorkerCrashedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddock_server.catalog import CatalogProblem
    from paddock_server.supervisor import WorkerExit

PERMANENT_REASONS: Final = frozenset({Reason.MODEL_CORRUPT, Reason.UNSUPPORTED_MODEL, Reason.INVALID_FIELD})
"""Failures that the file or the options of the load are to blame for: requests do not try those again."""

TRANSIENT_REASONS: Final = frozenset(
    {
        Reason.SHUTTING_DOWN,
        Reason.WORKER_CRASHED,
        Reason.LOAD_STALLED,
        Reason.HUB_UNREACHABLE,
        Reason.INTERNAL,
    }
)
"""Failures that say nothing against the load: nobody has to change anything for it to work another time."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something did not happen. One value makes any number of errors, one for each caller."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    violations: tuple[FieldViolation, ...] = ()
    resource: str = ""
    retry_after_seconds: float | None = None
    exit_code: int | None = None
    signal: str = ""
    log_tail: tuple[str, ...] = ()

    @property
    def is_permanent(self) -> bool:
        """Whether trying again is useless until the file or the options change."""
        return self.reason in PERMANENT_REASONS

    @property
    def is_transient(self) -> bool:
        """Whether the same may work at another time."""
        return self.reason in TRANSIENT_REASONS

    def error(self) -> PaddockError:
        """Make an exception of its own: one raised twice would collect the tracebacks of both."""
        return make_error(
            self.reason,
            self.message,
            metadata=self.metadata,
            violations=self.violations,
            resource=self.resource,
            retry_after_seconds=self.retry_after_seconds,
        )

    def after(self, seconds: float | None) -> Failure:
        """Return the same failure with the time after which the call may be repeated."""
        return replace(self, retry_after_seconds=seconds)

    def to_proto(self, failure_time: float) -> model_pb2.Failure:
        """Return the message for `Model.last_failure`; `failure_time` is in seconds since the epoch."""
        proto = model_pb2.Failure(
            reason=self.reason,
            message=self.message,
            metadata=self.metadata,
            log_tail=self.log_tail,
            signal=self.signal,
        )
        if self.exit_code is not None:
            proto.exit_code = self.exit_code
        proto.failure_time.FromNanoseconds(int(failure_time * 1e9))
        return proto


def failure_of(error: PaddockError, *, log_tail: tuple[str, ...] = ()) -> Failure:
    """Return an error as a value, with what is known of the worker that died of it."""
    failure = Failure(
        reason=error.reason,
        message=error.message,
        metadata=dict(error.metadata),
        violations=error.violations,
        resource=error.resource,
        retry_after_seconds=error.retry_after_seconds,
        log_tail=log_tail,
    )
    return _with_exit(failure, error.exit) if isinstance(error, WorkerCrashedError) else failure


def crash(model: str, worker_exit: WorkerExit) -> Failure:
    """Return the failure of a worker that died while it served."""
    return failure_of(WorkerCrashedError.of(model, worker_exit))


def _with_exit(failure: Failure, worker_exit: WorkerExit) -> Failure:
    return replace(
        failure,
        exit_code=worker_exit.exit_code,
        signal=worker_exit.signal,
        log_tail=worker_exit.log_tail or failure.log_tail,
    )


def problem(found: CatalogProblem) -> Failure:
    """Return the failure of loading a file that the catalog has found something wrong with."""
    return Failure(found.reason, found.message, dict(found.metadata))


def crash_loop(last: Failure, model: str, count: int) -> Failure:
    """Return the failure of a model that is given up after `count` crashes in a row."""
    message = (
        f"{last.message} That is {count} times in a row, so model {model!r} is not started again by itself."
    )
    return replace(
        last,
        reason=Reason.CRASH_LOOP,
        message=message,
        metadata={**last.metadata, "model": model, "crash_count": str(count)},
        retry_after_seconds=None,
    )


def internal(model: str) -> Failure:
    """Return the failure of a bug; the traceback is in the log."""
    return Failure(Reason.INTERNAL, f"Loading model {model!r} failed inside the server.", {"model": model})


def load_stalled(model: str, stage: str, seconds: float) -> Failure:
    """Return the failure of a load that took longer than allowed."""
    return Failure(
        Reason.LOAD_STALLED,
        f"Model {model!r} was not loaded within {seconds:g} s; it was at stage {stage!r}.",
        {"model": model, "stage": stage, "timeout_seconds": f"{seconds:g}"},
    )


def load_aborted(model: str) -> Failure:
    """Return what callers of a load are told when somebody unloads the model."""
    return Failure(
        Reason.LOAD_ABORTED, f"The load of model {model!r} was aborted by an Unload.", {"model": model}
    )


def load_in_progress(model: str, fields: Sequence[str]) -> Failure:
    """Return the refusal of a load while one with other options runs."""
    return Failure(
        Reason.LOAD_IN_PROGRESS,
        f"A load of model {model!r} with another {' and '.join(fields)} is running; "
        "wait for it, or unload the model first.",
        {"model": model, "fields": ",".join(fields)},
    )


def options_conflict(model: str, fields: Sequence[str]) -> Failure:
    """Return the refusal of a load of a model that is loaded with other options."""
    return Failure(
        Reason.OPTIONS_CONFLICT,
        f"Model {model!r} is loaded with another {' and '.join(fields)}; "
        "use LOAD_CONFLICT_POLICY_RELOAD to load it again, or LOAD_CONFLICT_POLICY_KEEP to take it as it is.",
        {"model": model, "fields": ",".join(fields)},
    )


def load_id_mismatch(model: str, asked: str, current: str) -> Failure:
    """Return the refusal of an Unload that means an earlier load."""
    return Failure(
        Reason.LOAD_ID_MISMATCH,
        f"Model {model!r} is at load {current!r}, not {asked!r}; it was left as it is.",
        {"model": model, "load_id": current},
    )


def model_not_found(model: str) -> Failure:
    """Return the refusal of a call about a model whose file has gone."""
    return Failure(
        Reason.MODEL_NOT_FOUND,
        f"There is no model named {model!r}. List, or GET /v1/models over HTTP, shows those there are.",
        {"model": model},
        resource=model,
    )


def model_not_loaded(model: str) -> Failure:
    """Return the refusal of a request that may not load the model."""
    return Failure(
        Reason.MODEL_NOT_LOADED,
        f"Model {model!r} is not loaded, and this request does not load it. Load it first.",
        {"model": model},
    )


def not_downloaded(model: str) -> Failure:
    """Return the refusal of a request that may not download the model it asks for."""
    return Failure(
        Reason.MODEL_NOT_LOADED,
        f"Model {model!r} is not on this machine, and requests do not download models on this server. "
        f"Call Load or Download, or run `paddock pull {model}`.",
        {"model": model, "downloaded": "false"},
    )


def no_files(model: str) -> Failure:
    """Return the refusal to delete a model that has not been downloaded."""
    return Failure(
        Reason.MODEL_NOT_LOADED,
        f"Model {model!r} is not on this machine; there are no files of it to delete.",
        {"model": model, "downloaded": "false"},
    )


def model_in_use(model: str, requests: int) -> Failure:
    """Return the refusal of a call that would take the model from requests that use it."""
    return Failure(
        Reason.MODEL_IN_USE,
        f"Model {model!r} serves {requests} requests; wait for them, or unload it.",
        {"model": model, "requests": str(requests)},
    )


def queue_full(model: str, waiting: int) -> Failure:
    """Return the refusal of a request that would be one too many to wait for a model."""
    return Failure(
        Reason.QUEUE_FULL,
        f"{waiting} requests wait for model {model!r} already.",
        {"model": model, "waiting": str(waiting)},
        retry_after_seconds=DEFAULT_RETRY_SECONDS,
    )


def too_many_models_wait(model: str, waiting: int) -> Failure:
    """Return the refusal of a load that would be one too many to wait for room."""
    return Failure(
        Reason.QUEUE_FULL,
        f"{waiting} models wait to be loaded already, so {model!r} is not queued as well.",
        {"model": model, "waiting_models": str(waiting)},
        retry_after_seconds=DEFAULT_RETRY_SECONDS,
    )


def too_many_requests_wait(model: str, waiting: int) -> Failure:
    """Return the refusal of a request that would be one too many to wait for any model."""
    return Failure(
        Reason.QUEUE_FULL,
        f"{waiting} requests wait for models to be loaded already, so one for {model!r} is not queued.",
        {"model": model, "waiting_requests": str(waiting)},
        retry_after_seconds=DEFAULT_RETRY_SECONDS,
    )


def never_fits(model: str, figures: Mapping[str, str]) -> Failure:
    """Return the refusal of a load that would not fit beside nothing at all."""
    return Failure(
        Reason.INSUFFICIENT_MEMORY,
        f"Model {model!r} does not fit even when nothing else is loaded: {_told(figures)}.",
        {"model": model, **figures},
    )


def too_many_replicas(model: str, count: int, models_max: int) -> Failure:
    """Return the refusal of more replicas than there may be workers."""
    return Failure(
        Reason.INSUFFICIENT_MEMORY,
        f"Model {model!r} cannot have {count} replicas: models_max is {models_max}, and each replica counts. "
        "Ask for fewer replicas, or start the server with a higher --models-max.",
        {"model": model, "replica_count": str(count), "models_max": str(models_max)},
    )


def replicas_never_fit(model: str, count: int, figures: Mapping[str, str]) -> Failure:
    """Return the refusal of replicas that would not fit together beside nothing at all."""
    return Failure(
        Reason.INSUFFICIENT_MEMORY,
        f"{count} replicas of model {model!r} do not fit even when nothing else is loaded: {_told(figures)}. "
        "Ask for fewer replicas.",
        {"model": model, "replica_count": str(count), **figures},
    )


def _told(figures: Mapping[str, str]) -> str:
    """Return figures of an admission for a person; programs take the bytes from the metadata."""
    return ", ".join(_figure(*name.partition("."), value) for name, value in figures.items())


def _figure(what: str, dot: str, of: str, value: str) -> str:
    if what.endswith("_bytes"):
        return f"{what.removesuffix('_bytes')} {size_text(int(value))} of {of}"
    if what == "held_by":
        sizes = [item.partition("=") for item in value.split(",")]
        held = [f"{size_text(int(size))} of {device}" if size else device for device, _, size in sizes]
        return f"{of} holds {' and '.join(held)}"
    return f"{what}{dot}{of} {value}"


def no_room_beside_pinned(model: str, pinned: Sequence[str], figures: Mapping[str, str]) -> Failure:
    """Return the refusal of a load that pinned models leave no room for."""
    return Failure(
        Reason.INSUFFICIENT_MEMORY,
        f"Model {model!r} does not fit beside {_pinned(pinned)}: {_told(figures)}. Unpin or unload one.",
        {"model": model, "pinned": ",".join(pinned), **figures},
    )


def no_room_beside_replicas(
    model: str, count: int, pinned: Sequence[str], figures: Mapping[str, str]
) -> Failure:
    """Return the refusal of a replica that others of its model, `count` of them, leave no room for, alone or
    together with pinned models."""
    beside = f"{count} and {_pinned(pinned)}" if pinned else f"{count}"
    advice = "Ask for fewer replicas, or unpin or unload one." if pinned else "Ask for fewer replicas."
    return Failure(
        Reason.INSUFFICIENT_MEMORY,
        f"Another replica of model {model!r} does not fit beside {beside}: {_told(figures)}. {advice}",
        {"model": model, "replica_count": str(count), "pinned": ",".join(pinned), **figures},
    )


def _pinned(names: Sequence[str]) -> str:
    return f"{' and '.join(repr(name) for name in names)}, which {'is' if len(names) == 1 else 'are'} pinned"


def too_many_downloads(model: str, count: int) -> Failure:
    """Return the refusal of a download that would be one too many."""
    return Failure(
        Reason.QUEUE_FULL,
        f"{count} downloads run or wait already, so {model!r} is not queued as well.",
        {"model": model, "downloads": str(count)},
        retry_after_seconds=DEFAULT_RETRY_SECONDS,
    )


def download_stopped(model: str, *, paused: bool) -> Failure:
    """Return what callers are told who wait for a download that somebody stops."""
    what = "paused; Download or Load resumes it" if paused else "cancelled, and what had arrived removed"
    return Failure(
        Reason.LOAD_ABORTED,
        f"The download of {model!r} was {what}.",
        {"model": model, "paused": str(paused).lower()},
    )


def not_deleted(model: str, why: str) -> Failure:
    """Return the refusal to delete a model; `why` says what it is in use for and what ends that."""
    return Failure(Reason.MODEL_IN_USE, f"Model {model!r} is not deleted: {why}.", {"model": model})


def shutting_down() -> Failure:
    """Return what calls are told while the server stops."""
    return Failure(
        Reason.SHUTTING_DOWN, "The server is shutting down.", retry_after_seconds=DEFAULT_RETRY_SECONDS
    )
