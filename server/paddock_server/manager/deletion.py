"""Deleting models of the hub's cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.downloads.removal import remove_model
from paddock_server.manager import failure as failures
from paddock_server.manager.tasks import Tasks

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.downloads import Downloads, Job
    from paddock_server.manager.replica_set import ReplicaSet

log: FilteringBoundLogger = structlog.get_logger()


class Tools(Protocol):
    """What deletions need of `hub.HubTools`."""

    @property
    def cache_dir(self) -> Path | None:
        """The hub's cache; None when the server does without."""
        ...

    @property
    def models(self) -> Mapping[str, ReplicaSet]:
        """All models, by id."""
        ...

    @property
    def id_of(self) -> Callable[[str], str]:
        """Returns the id that a name stands for, or the name itself."""
        ...


class Deletions:
    """The deletions that are under way. Every method is to be called in the manager's event loop."""

    def __init__(
        self, tools: Tools, downloads: Downloads | None, rescan: Callable[[], Awaitable[None]]
    ) -> None:
        """`rescan` reads the catalog again at once. It may raise `PaddockError`."""
        self._tools = tools
        self._downloads = downloads
        self._rescan = rescan
        self._running = Tasks()
        self.going: set[str] = set()
        """Models whose files are being removed."""

    async def ended(self, seconds: float) -> None:
        """Wait until no deletion runs any more, at most that long."""
        await self._running.ended(seconds)

    async def delete(self, request: pb.DeleteRequest, job: Job | None) -> pb.DeleteResponse:
        """Delete a model's files, but for those that another revision uses, and forget its download, `job`.

        Cancelling leaves: a model whose files are going is not listed with them.

        Raises:
            PaddockError: MODEL_NOT_FOUND; MODEL_IN_USE; MODEL_NOT_LOADED it has no files; INVALID_FIELD it is
                in a model directory.
        """
        return await self._running.finish(self._delete(request, job), f"delete-{request.model}")

    async def _delete(self, request: pb.DeleteRequest, job: Job | None) -> pb.DeleteResponse:
        model = self._tools.id_of(request.model)
        replicas = self._tools.models.get(model)
        if replicas is not None and is_local(replicas.entry):
            field = "model"
            raise InvalidFieldError.of(
                field,
                f"{model!r} is a file in a model directory, which the server only reads; remove it there",
            )
        if replicas is None and job is None and not request.allow_missing:
            raise ModelNotFoundError.of(request.model)
        if replicas is not None and replicas.entry.absent is not None and job is None:
            if request.allow_missing:
                return pb.DeleteResponse()
            raise failures.no_files(model).error()
        sharing = self._sharing(replicas)
        for one in sharing:
            if not one.is_at_rest:
                why = f"{one.model!r} has a worker; unload it first"
                raise failures.not_deleted(model, why).error()
        if job is not None and job.is_active:
            raise failures.not_deleted(job.id, "a download of it runs; stop that first").error()
        names = {one.model for one in sharing}
        self.going |= names
        try:
            freed = await self._remove(replicas, job)
        finally:
            self.going -= names
        if replicas is not None:
            log.info("model_deleted", model=model, freed_bytes=freed)
        return pb.DeleteResponse(freed_bytes=freed)

    def _sharing(self, replicas: ReplicaSet | None) -> list[ReplicaSet]:
        """Return the models whose workers have the files of one open, itself among them."""
        if replicas is None:
            return []
        return [one for one in self._tools.models.values() if one.entry.path == replicas.entry.path]

    async def _remove(self, replicas: ReplicaSet | None, job: Job | None) -> int:
        freed = 0
        if job is not None and self._downloads is not None:
            freed += await self._downloads.halt(job, keep=False)
        if replicas is not None:
            freed += await asyncio.to_thread(self._remove_files, replicas.entry)
            await self._rescan()
            # It goes, or stays as a model that is to be downloaded when a configuration file names it.
            await replicas.caught_up()
        return freed

    def _remove_files(self, entry: CatalogEntry) -> int:
        """Remove the files of a model. Runs in a thread."""
        if entry.hub is None or self._tools.cache_dir is None:
            return 0
        others = [
            replicas.entry
            for replicas in list(self._tools.models.values())
            if replicas.entry.hub is not None
            and replicas.entry.hub.commit == entry.hub.commit
            and replicas.entry.id != entry.id
        ]
        links = list(entry.shard_paths)
        if entry.mmproj_path is not None and all(other.mmproj_path != entry.mmproj_path for other in others):
            links.append(entry.mmproj_path)
        return remove_model(self._tools.cache_dir, entry.hub.repo_id, links)


def is_local(entry: CatalogEntry) -> bool:
    """Return whether a model is in a model directory, and not of the hub."""
    return entry.hub is None and entry.absent is None
