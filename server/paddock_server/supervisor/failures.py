"""Workers' misfortunes as `PaddockError`: what a worker reported, and the end of a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paddock.errors import FieldViolation, ModelUnavailableError, PaddockError, Reason, make_error

if TYPE_CHECKING:
    from paddock_server.supervisor.exit import WorkerExit
    from paddock_server.worker.v1 import worker_pb2


class WorkerCrashedError(ModelUnavailableError):
    """A worker ended though nobody wanted it to. Reason WORKER_CRASHED."""

    def __init__(self, message: str, *, exit: WorkerExit, metadata: dict[str, str]) -> None:  # noqa: A002
        super().__init__(Reason.WORKER_CRASHED, message, metadata=metadata)
        self.exit = exit
        """What became of the worker."""

    @classmethod
    def of(cls, model_id: str, exit: WorkerExit, *, doing: str = "") -> WorkerCrashedError:  # noqa: A002
        """Make the error. `doing` says what was under way, to go after the rest: `while it loaded
        weights`."""
        sentence = f"The worker of model {model_id!r} {exit.describe()}"
        if doing:
            sentence += f" {doing}"
        return cls(f"{sentence}.", exit=exit, metadata={"model": model_id, **exit.metadata()})


def error_of_failure(failure: worker_pb2.Failure, *, model_id: str) -> PaddockError:
    """Return the error a worker reported; its reason is taken as it is."""
    violations: tuple[FieldViolation, ...] = ()
    if failure.field:
        violations = (FieldViolation(failure.field, failure.message.removeprefix(f"{failure.field}: ")),)
    return make_error(
        failure.reason or Reason.INTERNAL,
        failure.message or f"The worker of model {model_id!r} reported a failure without saying which.",
        metadata={"model": model_id, **failure.metadata},
        violations=violations,
    )
