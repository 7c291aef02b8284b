"""Models of the Hugging Face Hub: names to models, downloads as the RPCs see them, deletion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogError, HubNameError, HubRef, hub_ref, parse_hub_name
from paddock_server.catalog.hub_names import HUB_PREFIX, NoSuchFileError, choose_model
from paddock_server.downloads.process import FetcherLauncher
from paddock_server.downloads.removal import finish_removals, remove_model
from paddock_server.manager import failure as failures
from paddock_server.manager.downloads import Downloads, Job, artifact_state
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.progress import Subscription
from paddock_server.manager.replica_set import ReplicaSet

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry

log: FilteringBoundLogger = structlog.get_logger()

VANISH_SECONDS: Final = 10.0
"""How long a deleted model may take to leave the list; it takes a moment."""


@dataclass(frozen=True, slots=True)
class HubTools:
    """What the models of the hub work with."""

    cache_dir: Path | None
    """The hub's cache; None when the server does without."""

    state_file: Path | None
    """Where unfinished downloads are kept over a restart."""

    models: Mapping[str, ReplicaSet]
    changes: ChangeLog
    rescan: Callable[[], Awaitable[None]]
    """Reads the catalog again at once. Raises `CatalogError`."""

    launcher: FetcherLauncher


class HubModels:
    """What the manager knows of the hub. Every method is to be called in the manager's event loop."""

    def __init__(self, tools: HubTools) -> None:
        self._tools = tools
        self._downloads: Downloads | None = None
        if tools.cache_dir is not None:
            self._downloads = Downloads(
                cache_dir=tools.cache_dir,
                state_file=tools.state_file,
                launcher=tools.launcher,
                finished=self._finished,
                changed=self._changed,
                gone=self._gone,
            )

    async def finish_removals(self) -> None:
        """Finish deletions that a server before this one was killed in; before the catalog is read."""
        if self._tools.cache_dir is None:
            return
        try:
            for folder in await asyncio.to_thread(finish_removals, self._tools.cache_dir):
                log.info("removal_finished", folder=folder)
        except OSError as error:
            log.warning("removal_not_finished", error=str(error))

    async def start(self, *, resume: bool) -> None:
        """Take up unfinished downloads, or with `resume` false only list them."""
        if self._downloads is not None:
            await self._downloads.start(resume=resume)

    async def stop(self) -> None:
        """Stop downloads where they are."""
        if self._downloads is not None:
            await self._downloads.stop()

    # Names

    def ref_of(self, model: str, source: model_pb2.ModelSource | None) -> HubRef | None:
        """Return what a request about the hub means; None when it is about another kind of model.

        Raises:
            PaddockError: INVALID_FIELD a name or a source is wrong, or they differ; NOT_IMPLEMENTED the
                server does without the hub.
        """
        if source is not None and source.WhichOneof("source") == "hugging_face":
            self._required()
            ref = _ref_of_source(source.hugging_face)
            if model and not self._is_name_of(model, ref):
                field = "model"
                raise InvalidFieldError.of(
                    field, f"must be what source names, {HUB_PREFIX + ref.name!r}, or empty; not {model!r}"
                )
            return ref
        if model.startswith(HUB_PREFIX):
            self._required()
            return _ref_of_name(model)
        job = self._job(model) if source is None and model not in self._tools.models else None
        return job.ref if job is not None else None

    def _is_name_of(self, model: str, ref: HubRef) -> bool:
        if model == self.find(ref):
            return True
        try:
            return parse_hub_name(model) == ref
        except HubNameError:
            return False

    def find(self, ref: HubRef) -> str | None:
        """Return the id of the model in the cache that a reference means; None when it is not there."""
        files = {
            replicas.entry.hub.file: model
            for model, replicas in self._tools.models.items()
            if replicas.entry.hub is not None
            and not replicas.is_gone
            and replicas.entry.hub.repo_id == ref.repo_id
            and replicas.entry.hub.is_at(ref.revision)
        }
        try:
            return files[choose_model(files, ref.pattern)]
        except NoSuchFileError:
            return None

    def id_of(self, model: str) -> str:
        """Return the id that a name in a request means; an `hf:` name that is not there stays as it is."""
        if not model.startswith(HUB_PREFIX) or model in self._tools.models:
            return model
        return self.find(_ref_of_name(model)) or model

    # Downloads

    async def bring(
        self, ref: HubRef, subscription: Subscription, ready: Callable[[str], Awaitable[None]]
    ) -> None:
        """Download a model, show how it goes, and call `ready` with its id. A failure goes to the caller."""
        follower = Subscription()
        failure: failures.Failure | None = failures.internal(ref.name)
        try:
            self._required().join(ref, follower)
            while (event := await follower.next()) is not None:
                if event.HasField("progress") and not subscription.closed:
                    subscription.push(event)
            await ready(self._found(ref))
            failure = None
        except PaddockError as error:
            failure = failures.failure_of(error)
        except asyncio.CancelledError:
            failure = failures.shutting_down()
            raise
        finally:
            if failure is not None:
                subscription.fail(failure)

    async def ensure(self, ref: HubRef) -> str:
        """Download a model that is not there for a request, and return its id. Cancelling detaches.

        Raises:
            PaddockError: the download failed, or had been paused: a request resumes nothing that an operator
                has stopped, and does not repeat what cannot work.
        """
        follower = Subscription()
        self._required().join(ref, follower, for_request=True)
        try:
            while await follower.next() is not None:
                pass
        finally:
            follower.closed = True
        return self._found(ref)

    async def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """Download a model and show how it goes: `progress* downloaded`. Closing detaches.

        Raises:
            PaddockError: the download failed or was refused.
        """
        ref = self._download_ref(request)
        follower = Subscription()
        try:
            self._required().join(ref, follower)
            while (event := await follower.next()) is not None:
                if event.HasField("progress"):
                    yield pb.DownloadResponse(progress=event.progress)
        except PaddockError as error:
            if "offline" not in error.metadata or self.find(ref) is None:
                raise
        finally:
            follower.closed = True
        replicas = self._tools.models[self._found(ref)]
        yield pb.DownloadResponse(downloaded=self.completed(replicas.snapshot()))

    def _download_ref(self, request: pb.DownloadRequest) -> HubRef:
        if request.HasField("source") and request.source.WhichOneof("source") != "hugging_face":
            field = "source"
            raise InvalidFieldError.of(field, "must hold hugging_face: a local file need not be downloaded")
        replicas = self._tools.models.get(request.model)
        if not request.HasField("source") and replicas is not None and replicas.entry.hub is None:
            field = "model"
            raise InvalidFieldError.of(field, f"{request.model!r} is a file in a model directory already")
        ref = self.ref_of(request.model, request.source if request.HasField("source") else None)
        if ref is None:  # an id, or an `hf:` name without its `hf:`
            self._required()
            ref = _ref_of_name(request.model)
        return ref

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """Pause or cancel a download.

        Raises:
            PaddockError: MODEL_NOT_FOUND there is no such download.
        """
        job = self._job(request.model)
        if job is None:
            raise make_error(
                Reason.MODEL_NOT_FOUND,
                f"There is no download of {request.model!r}. List shows the downloads there are.",
                metadata={"model": request.model},
                resource=request.model,
            )
        await self._required().halt(job, keep=request.mode == pb.STOP_DOWNLOAD_MODE_PAUSE)
        replicas = self._tools.models.get(job.id)
        if replicas is not None:
            return pb.StopDownloadResponse(model=self.completed(replicas.snapshot()))
        return pb.StopDownloadResponse(model=job.to_model())

    def _job(self, name: str) -> Job | None:
        if self._downloads is None:
            return None
        try:
            ref = parse_hub_name(name)
        except HubNameError:
            ref = None
        return self._downloads.find(ref, name)

    def _found(self, ref: HubRef) -> str:
        found = self.find(ref)
        if found is None:  # somebody deleted it in this very moment
            raise ModelNotFoundError.of(ref.name)
        return found

    def _required(self) -> Downloads:
        if self._downloads is None:
            raise make_error(
                Reason.NOT_IMPLEMENTED,
                "This server was started with --no-hf-cache, so that it has no models of the hub.",
            )
        return self._downloads

    async def _finished(self, job: Job) -> None:
        """Make the model of a finished download known."""
        await self._rescan()
        resolved = job.resolved
        if resolved is not None and any(
            replicas.entry.hub is not None
            and (replicas.entry.hub.repo_id, replicas.entry.hub.commit, replicas.entry.hub.file)
            == (job.ref.repo_id, resolved.commit, resolved.file)
            for replicas in self._tools.models.values()
        ):
            return
        file = resolved.file if resolved is not None else job.id
        raise make_error(
            Reason.UNSUPPORTED_MODEL,
            f"{file} was downloaded and is no model that can be loaded by itself.",
            metadata={"model": job.id, "file": file},
        )

    async def _rescan(self) -> None:
        try:
            await self._tools.rescan()
        except CatalogError as error:
            raise make_error(Reason.INTERNAL, f"The models cannot be listed: {error}") from error

    # What is shown

    def _changed(self, job: Job) -> None:
        self._tools.changes.changed(self._shown(job), model_pb2.MODEL_STATE_UNSPECIFIED)

    def _gone(self, model: str) -> None:
        replicas = self._tools.models.get(model)
        if replicas is None:
            self._tools.changes.deleted(model)
        else:
            self._tools.changes.changed(replicas.snapshot(), model_pb2.MODEL_STATE_UNSPECIFIED)

    def _shown(self, job: Job) -> model_pb2.Model:
        replicas = self._tools.models.get(job.id)
        return job.to_model() if replicas is None else _with(replicas.snapshot(), job)

    def completed(self, model: model_pb2.Model) -> model_pb2.Model:
        """Add to a model what is known of a download of it."""
        job = self._downloads.find(None, model.id) if self._downloads is not None else None
        return model if job is None else _with(model, job)

    def all(self, models: Iterable[model_pb2.Model]) -> list[model_pb2.Model]:
        """Add the downloads to the models there are, ordered by id."""
        found = {model.id: model for model in models}
        for job in self._downloads.jobs() if self._downloads is not None else ():
            known = found.get(job.id)
            found[job.id] = job.to_model() if known is None else _with(known, job)
        return [found[model] for model in sorted(found)]

    def unlisted(self) -> dict[str, model_pb2.Model]:
        """Return the models, by id, of which there is a download and nothing else."""
        jobs = self._downloads.jobs() if self._downloads is not None else ()
        return {job.id: job.to_model() for job in jobs if job.id not in self._tools.models}

    def pending(self, name: str) -> model_pb2.Model | None:
        """Return a model of which there is a download and nothing else."""
        job = self._job(name)
        return job.to_model() if job is not None else None

    # Deletion

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Delete a model's files, apart from those that another revision uses, and forget its download.

        Raises:
            PaddockError: MODEL_NOT_FOUND; MODEL_IN_USE; INVALID_FIELD it is in a model directory.
        """
        model = self.id_of(request.model)
        replicas = self._tools.models.get(model)
        job = self._job(request.model)
        if replicas is not None and replicas.entry.hub is None:
            field = "model"
            raise InvalidFieldError.of(
                field,
                f"{model!r} is a file in a model directory, which the server only reads; remove it there",
            )
        if replicas is None and job is None and not request.allow_missing:
            raise ModelNotFoundError.of(request.model)
        if replicas is not None and not replicas.is_at_rest:
            raise failures.not_deleted(model, "it has a worker; unload it first").error()
        if job is not None and job.is_active:
            raise failures.not_deleted(job.id, "a download of it runs; stop that first").error()
        freed = 0
        if job is not None:
            freed += await self._required().halt(job, keep=False)
        if replicas is not None:
            freed += await asyncio.to_thread(self._remove, replicas.entry)
            await self._rescan()
            closed = asyncio.create_task(replicas.closed())
            await asyncio.wait({closed}, timeout=VANISH_SECONDS)
            closed.cancel()
            log.info("model_deleted", model=model, freed_bytes=freed)
        return pb.DeleteResponse(freed_bytes=freed)

    def _remove(self, entry: CatalogEntry) -> int:
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


def _with(model: model_pb2.Model, job: Job) -> model_pb2.Model:
    model.download.CopyFrom(job.to_proto())
    if job.is_active:
        model.artifact_state = artifact_state(job)
    return model


def _ref_of_name(name: str) -> HubRef:
    try:
        return parse_hub_name(name)
    except HubNameError as error:
        field = "model"
        raise InvalidFieldError.of(field, f"{name!r}: its {error.field} {error.message}") from error


def _ref_of_source(source: model_pb2.HuggingFaceSource) -> HubRef:
    try:
        return hub_ref(source.repo_id, source.revision, source.file_pattern)
    except HubNameError as error:
        field = f"source.hugging_face.{error.field}"
        raise InvalidFieldError.of(field, error.message) from error
