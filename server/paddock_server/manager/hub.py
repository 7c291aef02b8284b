"""Models of the Hugging Face Hub: names to models, downloads as the RPCs see them, deletion."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogError, HubNameError, HubRef, hub_ref, parse_hub_name
from paddock_server.catalog.hub_names import HUB_PREFIX, NoSuchFileError, choose_model
from paddock_server.downloads.process import FetcherLauncher
from paddock_server.downloads.removal import finish_removals
from paddock_server.manager import failure as failures
from paddock_server.manager.deletion import Deletions, is_local
from paddock_server.manager.downloads import STOP_SECONDS, Asking, Downloads, Job, artifact_state
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.progress import Subscription
from paddock_server.manager.replica_set import ReplicaSet

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry

log: FilteringBoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HubTools:
    """What the models of the hub work with."""

    cache_dir: Path | None
    """The hub's cache; None when the server does without."""

    state_file: Path | None
    """Where unfinished downloads are kept over a restart."""

    models: Mapping[str, ReplicaSet]
    id_of: Callable[[str], str]
    """Returns the id that a name stands for, or the name itself."""

    changes: ChangeLog
    rescan: Callable[[], Awaitable[None]]
    """Reads the catalog again at once. Raises `CatalogError`."""

    launcher: FetcherLauncher


class Wanted(NamedTuple):
    """A model that is to be downloaded."""

    name: str
    """The id of the model that a configuration file names, else what the hub calls it."""

    ref: HubRef


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A load or a request that waits for a download."""

    wanted: Wanted
    follower: Subscription
    asking: Asking


class HubModels:
    """What the manager knows of the hub. Every method is to be called in the manager's event loop."""

    def __init__(self, tools: HubTools) -> None:
        self._tools = tools
        self._waiting: set[_Waiting] = set()
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
        self._deletions = Deletions(tools, self._downloads, self._rescan)

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
        """Stop downloads where they are; deletions end by themselves."""
        if self._downloads is not None:
            await self._downloads.stop()
        await self._deletions.ended(STOP_SECONDS)

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
        if source is not None:
            return None
        replicas = self._tools.models.get(self._tools.id_of(model))
        if replicas is not None:
            return replicas.entry.absent
        job = self._job(model)
        return job.ref if job is not None else None

    def wanted(self, model: str, source: model_pb2.ModelSource | None = None) -> Wanted | None:
        """Return what a request has to download before its model can be loaded; None when nothing.

        Raises:
            PaddockError: as `ref_of`; MODEL_NOT_FOUND it is being deleted.
        """
        replicas = self._tools.models.get(self._tools.id_of(model)) if model else None
        if replicas is not None and replicas.model in self._deletions.going:
            raise ModelNotFoundError.of(model)
        if replicas is not None and (replicas.entry.absent is None or not replicas.is_at_rest):
            return None
        ref = self.ref_of(model, source)
        if ref is None or (replicas is None and self.find(ref) is not None):
            return None
        return Wanted(ref.name if replicas is None else replicas.model, ref)

    def _is_name_of(self, model: str, ref: HubRef) -> bool:
        if model == self.find(ref):
            return True
        try:
            return parse_hub_name(model) == ref
        except HubNameError:
            return False

    def find(self, ref: HubRef) -> str | None:
        """Return the id of the model in the cache that a reference means; None when it is not there."""
        files: dict[str, str] = {}
        for model, replicas in self._tools.models.items():
            hub = replicas.entry.hub
            if hub is None or replicas.is_gone or hub.repo_id != ref.repo_id or not hub.is_at(ref.revision):
                continue
            # Of several models with one file, the one that the hub's name is a name of.
            own = any(name.startswith(hub.repo_id) for name in replicas.entry.setup.names)
            if own or hub.file not in files:
                files[hub.file] = model
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

    async def bring(self, wanted: Wanted, subscription: Subscription) -> str:
        """Download a model for a load, show how it goes, and return the model's id.

        Raises:
            PaddockError: the download failed or was stopped, or the load was called off.
        """
        with self._waiting_for(wanted, Asking.LOAD) as follower:
            while (event := await follower.next()) is not None:
                if event.HasField("progress") and not subscription.closed:
                    subscription.push(event)
        return self._arrived(wanted)

    async def ensure(self, wanted: Wanted, *, may_begin: bool, waiters_max: int) -> str:
        """Download a model that is not there for a request, and return its id. Cancelling detaches.

        With `may_begin` False it only waits for a download that runs.

        Raises:
            PaddockError: QUEUE_FULL so many requests wait for it already; MODEL_NOT_LOADED it may not begin a
                download, and none runs; the download failed, or had been paused: a request resumes nothing
                that an operator has stopped, and does not repeat what cannot work.
        """
        job = self._required().find(wanted.ref, wanted.ref.name)
        if not may_begin and (job is None or not job.is_active):
            raise failures.not_downloaded(wanted.name).error()
        waiting = sum(one.asking is Asking.REQUEST and one.wanted.ref == wanted.ref for one in self._waiting)
        if waiting >= waiters_max:
            raise failures.queue_full(wanted.name, waiting).error()
        with self._waiting_for(wanted, Asking.REQUEST) as follower:
            while await follower.next() is not None:
                pass
        return self._arrived(wanted)

    @contextlib.contextmanager
    def _waiting_for(self, wanted: Wanted, asking: Asking) -> Generator[Subscription]:
        follower = Subscription()
        self._required().join(wanted.ref, follower, asking)
        waiting = _Waiting(wanted, follower, asking)
        self._waiting.add(waiting)
        try:
            yield follower
        finally:
            follower.closed = True
            self._waiting.discard(waiting)

    async def call_off(self, wanted: Wanted, failure: failures.Failure) -> int:
        """Turn away the loads and requests that wait for a download of a model; return how many requests.

        The download is paused, unless somebody has called Download for it or something else waits for it.
        """
        called_off = [one for one in self._waiting if one.wanted == wanted]
        for one in called_off:
            one.follower.fail(failure)
        others = any(one.wanted.ref == wanted.ref for one in self._waiting.difference(called_off))
        job = self._required().find(wanted.ref, wanted.ref.name)
        if job is not None and job.is_active and not job.asked_for and not others:
            await self._required().halt(job, keep=True)
        return sum(one.asking is Asking.REQUEST for one in called_off)

    def is_unfinished(self, name: str) -> bool:
        """Return whether there is a download of what the hub calls so, and it is to go on."""
        job = self._job(name)
        return job is not None and job.is_active

    async def download(self, request: pb.DownloadRequest) -> AsyncGenerator[pb.DownloadResponse]:
        """Download a model and show how it goes: `progress* downloaded`. Closing detaches.

        Raises:
            PaddockError: the download failed or was refused.
        """
        ref = self._download_ref(request)
        follower = Subscription()
        try:
            self._required().join(ref, follower, Asking.DOWNLOAD)
            while (event := await follower.next()) is not None:
                if event.HasField("progress"):
                    yield pb.DownloadResponse(progress=event.progress)
        except PaddockError as error:
            if "offline" not in error.metadata or self.find(ref) is None:
                raise
        finally:
            follower.closed = True
        named = self._tools.id_of(request.model) if request.model else ""
        replicas = self._tools.models[named if named in self._tools.models else self._found(ref)]
        yield pb.DownloadResponse(downloaded=replicas.snapshot())

    def _download_ref(self, request: pb.DownloadRequest) -> HubRef:
        if request.HasField("source") and request.source.WhichOneof("source") != "hugging_face":
            field = "source"
            raise InvalidFieldError.of(field, "must hold hugging_face: a local file need not be downloaded")
        replicas = self._tools.models.get(self._tools.id_of(request.model)) if request.model else None
        if not request.HasField("source") and replicas is not None and is_local(replicas.entry):
            field = "model"
            raise InvalidFieldError.of(field, f"{request.model!r} is a file in a model directory already")
        ref = self.ref_of(request.model, request.source if request.HasField("source") else None)
        if ref is not None:
            return ref
        self._required()
        if replicas is not None and replicas.entry.hub is not None and replicas.model == request.model:
            hub = replicas.entry.hub
            return _ref_if_name(request.model) or HubRef(hub.repo_id, hub.revision, hub.file)
        return _ref_of_name(request.model)  # an id, or an `hf:` name without its `hf:`

    async def stop_download(self, request: pb.StopDownloadRequest) -> pb.StopDownloadResponse:
        """Pause or cancel a download.

        Raises:
            PaddockError: MODEL_NOT_FOUND there is no such download.
        """
        job = self._job_named(request.model)
        if job is None:
            raise make_error(
                Reason.MODEL_NOT_FOUND,
                f"There is no download of {request.model!r}. List shows the downloads there are.",
                metadata={"model": request.model},
                resource=request.model,
            )
        await self._required().halt(job, keep=request.mode == pb.STOP_DOWNLOAD_MODE_PAUSE)
        sets = self._sets_of(job)
        return pb.StopDownloadResponse(model=sets[0].snapshot() if sets else job.to_model())

    def _job_named(self, name: str) -> Job | None:
        """Return the download of a model, by any of its names."""
        replicas = self._tools.models.get(self._tools.id_of(name))
        return self._job(name) if replicas is None else self._job_of(replicas.entry)

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

    def _arrived(self, wanted: Wanted) -> str:
        return wanted.name if wanted.name in self._tools.models else self._found(wanted.ref)

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
        # Models that a configuration file has made are told of their files by message.
        await asyncio.gather(*(replicas.caught_up() for replicas in self._sets_of(job)))
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
        shown = [replicas.snapshot() for replicas in self._sets_of(job)] or [job.to_model()]
        for model in shown:
            self._tools.changes.changed(model, model_pb2.MODEL_STATE_UNSPECIFIED)

    def _gone(self, job: Job, model: str) -> None:
        sets = self._sets_of(job)
        for replicas in sets:
            self._tools.changes.changed(replicas.snapshot(), model_pb2.MODEL_STATE_UNSPECIFIED)
        if not sets:
            self._tools.changes.deleted(model)

    def _sets_of(self, job: Job) -> list[ReplicaSet]:
        return [replicas for replicas in self._tools.models.values() if _is_of(replicas.entry, job)]

    def _job_of(self, entry: CatalogEntry) -> Job | None:
        if self._downloads is None or is_local(entry):
            return None
        return next((job for job in self._downloads.jobs() if _is_of(entry, job)), None)

    def completed(self, model: model_pb2.Model, entry: CatalogEntry) -> model_pb2.Model:
        """Add to a model what is known of a download of it."""
        job = self._job_of(entry)
        if job is not None:
            model.download.CopyFrom(job.to_proto())
            if job.is_active:
                model.artifact_state = artifact_state(job)
        return model

    def unlisted(self) -> dict[str, model_pb2.Model]:
        """Return the models, by id, of which there is a download and nothing else."""
        jobs = self._downloads.jobs() if self._downloads is not None else ()
        entries = [replicas.entry for replicas in self._tools.models.values()] if jobs else []
        of_hub = [entry for entry in entries if not is_local(entry)]
        return {job.id: job.to_model() for job in jobs if not any(_is_of(entry, job) for entry in of_hub)}

    def pending(self, name: str) -> model_pb2.Model | None:
        """Return a model of which there is a download and nothing else."""
        job = self._job(name)
        return job.to_model() if job is not None else None

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """See `Deletions.delete`."""
        return await self._deletions.delete(request, self._job_named(request.model))


def _is_of(entry: CatalogEntry, job: Job) -> bool:
    """Return whether a download is that of a model."""
    if entry.absent is not None:
        return entry.absent == job.ref
    hub, resolved = entry.hub, job.resolved
    if hub is None:
        return False
    if resolved is None or job.id == entry.id:
        return job.id == entry.id or job.id in entry.setup.names
    return (hub.repo_id, hub.file) == (job.ref.repo_id, resolved.file) and hub.is_at(job.ref.revision)


def _ref_if_name(name: str) -> HubRef | None:
    try:
        return parse_hub_name(name)
    except HubNameError:
        return None


def _ref_of_name(name: str) -> HubRef:
    try:
        return parse_hub_name(name)
    except HubNameError as error:
        field = "model"
        raise InvalidFieldError.of(field, f"{name!r}: its {error.part} {error.message}") from error


def _ref_of_source(source: model_pb2.HuggingFaceSource) -> HubRef:
    try:
        return hub_ref(source.repo_id, source.revision, source.file_pattern)
    except HubNameError as error:
        field = f"source.hugging_face.{error.field}"
        raise InvalidFieldError.of(field, error.message) from error
