"""`grpc.health.v1`: the server's own services, and every model as `model/<id>`.

Not the servicer of grpcio-health-checking: that one can forget no service, and a watcher who does not read
would hold up whoever publishes a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paddock.errors import PaddockError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock.api import ModelManagerApi

log: FilteringBoundLogger = structlog.get_logger()

MODEL_PREFIX: Final = "model/"
"""A model's service name is this and its id."""

START_OVER_SECONDS: Final = 1.0
"""Between two attempts to follow the models: each begins with all of them."""

_YIELD_EVERY: Final = 256
"""Changes taken in at a stretch; then others get the event loop."""

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

MODEL_STATUSES: Final[Mapping[int, int]] = {
    model_pb2.MODEL_STATE_UNLOADED: NOT_SERVING,
    model_pb2.MODEL_STATE_LOADING: NOT_SERVING,
    model_pb2.MODEL_STATE_LOADED: SERVING,
    # The next request wakes it.
    model_pb2.MODEL_STATE_SLEEPING: SERVING,
    model_pb2.MODEL_STATE_UNLOADING: NOT_SERVING,
    model_pb2.MODEL_STATE_FAILED: NOT_SERVING,
}
"""A model's health by its state."""


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Statuses by service name, and those who watch them. For one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._stopping = False

    @property
    def watched_count(self) -> int:
        """Services that somebody watches."""
        return len(self._watchers)

    def set(self, service: str, status: int) -> None:
        """Publish the status of a service. Costs nothing when it has it already."""
        if self._stopping:
            status = NOT_SERVING
        if self._statuses.get(service) != status:
            self._statuses[service] = status
            self._wake(service)

    def forget(self, service: str) -> None:
        """Publish that a service is gone."""
        if self._statuses.pop(service, None) is not None:
            self._wake(service)

    def keep_models(self, models: set[str]) -> None:
        """Forget the models that are not among these ids."""
        services = {MODEL_PREFIX + model for model in models}
        for service in [name for name in self._statuses if name.startswith(MODEL_PREFIX)]:
            if service not in services:
                self.forget(service)

    def stop(self) -> None:
        """Turn every service to NOT_SERVING, for good."""
        self._stopping = True
        for service in self._statuses:
            self.set(service, NOT_SERVING)

    def _wake(self, service: str) -> None:
        for changed in self._watchers.get(service, ()):
            changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        """Answer with a service's status; NOT_FOUND when there is no such service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no service of this name.")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Send a service's status, and every change of it; SERVICE_UNKNOWN while there is none.

        A reader who is slow is sent the latest status only.
        """
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(request.service, set())
        watchers.add(changed)
        sent: int | None = None
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, SERVICE_UNKNOWN)
                if status != sent:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    sent = status
                else:
                    # Ends with the call: its cancellation, its deadline, or the server's stop.
                    await changed.wait()
        finally:
            watchers.discard(changed)
            if not watchers:
                del self._watchers[request.service]


async def follow_models(api: ModelManagerApi, health: HealthServicer) -> None:
    """Publish every model's health for as long as the task runs."""
    while True:
        try:
            await _follow(api, health)
        except PaddockError as error:
            # WATCH_TOO_SLOW, when more models appeared at once than the watch may be behind.
            log.info("model_health_starts_over", reason=error.reason)
        await asyncio.sleep(START_OVER_SECONDS)


async def _follow(api: ModelManagerApi, health: HealthServicer) -> None:
    """Take in the models there are, then changes, until the watch ends."""
    present: set[str] | None = set()
    count = 0
    async with aclosing(api.watch(pb.WatchRequest())) as responses:
        async for response in responses:
            match response.WhichOneof("event"):
                case "changed":
                    model = response.changed.model
                    health.set(MODEL_PREFIX + model.id, MODEL_STATUSES.get(model.state, NOT_SERVING))
                    if present is not None:
                        present.add(model.id)
                case "deleted":
                    health.forget(MODEL_PREFIX + response.deleted.model)
                case "synced" if present is not None:
                    # What went while nobody followed is known by its absence only.
                    health.keep_models(present)
                    present = None
                case _:
                    pass
            count += 1
            if count % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
