"""The downloads: one for a name however many ask, a bounded number at once, and none lost over a restart.

Everything happens in one event loop; what takes time runs in a fetcher (`paddock_server.downloads`), a
process that may be killed at any moment and loses nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog.hub_names import hub_id
from paddock_server.downloads.messages import Advanced, Done, Failed, Message, Resolved, Retrying
from paddock_server.downloads.process import FetcherCrashedError, FetcherLauncher, FetcherStalledError
from paddock_server.downloads.removal import remove_partial
from paddock_server.downloads.store import DownloadStore, Unfinished
from paddock_server.manager import failure as failures
from paddock_server.manager.progress import LoadView, Subscription
from paddock_server.manager.tasks import Tasks

if TYPE_CHECKING:
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import HubRef

log: FilteringBoundLogger = structlog.get_logger()

RUNNING_MAX: Final = 2
"""Downloads that run at once; more of them share one line and hold up each other."""

QUEUE_MAX: Final = 256
"""Downloads that may wait for their turn."""

FAILED_MAX: Final = 64
"""Downloads that have failed and are listed so. The oldest go first."""

FETCHERS_MAX: Final = 4
"""Fetchers in a row that stall or crash without a byte of progress before the download fails."""

RETRY_SECONDS: Final = 30.0
"""Least time before a request begins a download anew that has failed. Whoever asks for the download need not
wait."""

RATE_SECONDS: Final = 5.0
"""Time over which the rate is measured."""

STOP_SECONDS: Final = 30.0
"""How long a download may take to stop; its fetcher is killed at once."""


class Asking(Enum):
    """Who wants a download."""

    DOWNLOAD = auto()
    """Somebody called Download for it."""

    LOAD = auto()
    """A load that needs it."""

    REQUEST = auto()
    """A request that needs it. It resumes nothing that was paused, nor repeats at once what has failed."""


class JobState(Enum):
    """Where a download is."""

    QUEUED = auto()
    RUNNING = auto()
    PAUSED = auto()
    HELD = auto()
    """Ran when the server last ended, and was not taken up: it runs again when somebody asks for it, or after
    the next start."""

    FAILED = auto()


class Job:
    """One download. Written by `Downloads` alone."""

    def __init__(self, ref: HubRef, state: JobState) -> None:
        self.ref = ref
        self.state = state
        self.asked_for = False
        """Whether somebody called Download for it: then it goes on when a load of it is called off."""

        self.resolved: Resolved | None = None
        self.completed_bytes = 0
        self.view: LoadView = LoadView(asyncio.get_running_loop().time)
        self.failure: failures.Failure | None = None
        self.failed_at = 0.0
        self.task: asyncio.Task[None] | None = None
        self.stopping = asyncio.Lock()
        """Held while it is being paused or cancelled: nobody can join it in between."""

        self._samples: deque[tuple[float, int]] = deque()

    @property
    def id(self) -> str:
        """The id of the model there will be, as far as it is known."""
        if self.resolved is None:
            return self.ref.name
        return hub_id(self.ref.repo_id, self.ref.revision, self.resolved.suffix)

    @property
    def is_active(self) -> bool:
        """Whether it runs or waits for its turn."""
        return self.state in {JobState.QUEUED, JobState.RUNNING}

    def sample(self, now: float, completed_bytes: int) -> None:
        """Take in how far it is."""
        self.completed_bytes = completed_bytes
        if self._samples and completed_bytes < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, completed_bytes))
        while self._samples[0][0] < now - RATE_SECONDS:
            self._samples.popleft()

    def bytes_per_second(self, now: float) -> int:
        """Return the rate of the last seconds; 0 when nothing has arrived in them."""
        recent = [sample for sample in self._samples if sample[0] >= now - RATE_SECONDS]
        if self.state is not JobState.RUNNING or len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return 0
        return round((recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]))

    def reset_rate(self) -> None:
        """Forget the rate: what follows is no download."""
        self._samples.clear()

    def to_proto(self) -> model_pb2.Download:
        """Return the message for `Model.download`."""
        proto = model_pb2.Download(
            completed_bytes=self.completed_bytes,
            total_bytes=self.resolved.total_bytes if self.resolved is not None else 0,
            bytes_per_second=self.bytes_per_second(asyncio.get_running_loop().time()),
            paused=self.state in {JobState.PAUSED, JobState.HELD},
        )
        if self.failure is not None:
            proto.failure.CopyFrom(self.failure.to_proto(self.failed_at))
        return proto

    def to_model(self) -> model_pb2.Model:
        """Return the model as `List` shows it before its files are there."""
        model = model_pb2.Model(
            id=self.id,
            state=model_pb2.MODEL_STATE_UNLOADED,
            artifact_state=artifact_state(self),
            download=self.to_proto(),
        )
        hub = model.source.hugging_face
        hub.repo_id, hub.revision, hub.file_pattern = self.ref.repo_id, self.ref.revision, self.ref.pattern
        return model


def artifact_state(job: Job) -> model_pb2.ArtifactState.ValueType:
    """Return the state of files that only a download is about."""
    return model_pb2.ARTIFACT_STATE_DOWNLOADING if job.is_active else model_pb2.ARTIFACT_STATE_ABSENT


class Downloads:
    """The downloads of this server."""

    def __init__(
        self,
        *,
        cache_dir: Path,
        state_file: Path | None,
        launcher: FetcherLauncher,
        finished: Callable[[Job], Awaitable[None]],
        changed: Callable[[Job], None],
        gone: Callable[[Job, str], None],
    ) -> None:
        """Make it; `start` begins.

        Args:
            cache_dir: The hub's cache.
            state_file: Where unfinished downloads are kept over a restart; None keeps them nowhere.
            launcher: What starts fetchers.
            finished: Makes the model known; awaited before callers are told. Raises `PaddockError`.
            changed: Called when a download shows itself otherwise.
            gone: Called with a download and the id under which it is no longer listed.
        """
        self._cache_dir = cache_dir
        self._store = DownloadStore(state_file)
        self._launcher = launcher
        self._finished = finished
        self._changed = changed
        self._gone = gone
        self._jobs: dict[HubRef, Job] = {}
        self._places = asyncio.Semaphore(RUNNING_MAX)
        self._stops = Tasks()
        self._writer: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self, *, resume: bool = True) -> None:
        """Take up what was unfinished when the server last stopped; without `resume`, only list it."""
        for ref, unfinished in (await self._store.read()).items():
            job = Job(ref, JobState.PAUSED)
            job.resolved, job.completed_bytes = unfinished.resolved, unfinished.completed_bytes
            job.asked_for = unfinished.asked_for
            self._jobs[ref] = job
            if unfinished.paused or not resume:
                job.state = JobState.PAUSED if unfinished.paused else JobState.HELD
                self._changed(job)
            else:
                log.info("download_replayed", model=ref.name)
                self._begin(job)
        self._writer = asyncio.create_task(self._store.run(), name="downloads-store")

    async def stop(self) -> None:
        """Stop every download where it is; the next server goes on with them."""
        self._closing = True
        await asyncio.gather(*(self._halt(job) for job in self._jobs.values()))
        await self._stops.ended(STOP_SECONDS)
        for job in self._jobs.values():
            job.view.fail(failures.shutting_down())
        self._store.close()
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def jobs(self) -> list[Job]:
        """Return all downloads that are listed."""
        return list(self._jobs.values())

    def find(self, ref: HubRef | None, name: str) -> Job | None:
        """Return the download that a reference or the id of a model means."""
        if ref is not None and ref in self._jobs:
            return self._jobs[ref]
        return next((job for job in self._jobs.values() if job.id == name), None)

    def join(self, ref: HubRef, subscription: Subscription, asking: Asking) -> None:
        """Follow the download of a name; begin or resume it when it does not run.

        Raises:
            PaddockError: QUEUE_FULL; SHUTTING_DOWN; why it is not resumed.
        """
        if self._closing:
            raise failures.shutting_down().error()
        job = self._jobs.get(ref)
        if job is not None and job.stopping.locked():
            raise failures.download_stopped(job.id, paused=True).error()
        if job is not None and asking is Asking.REQUEST:
            self._check_resumable(job)
        if job is None:
            active = sum(1 for other in self._jobs.values() if other.is_active)
            if active >= QUEUE_MAX:
                raise failures.too_many_downloads(ref.name, active).error()
            job = self._jobs[ref] = Job(ref, JobState.QUEUED)
        asked_for = job.asked_for or asking is Asking.DOWNLOAD
        changed, job.asked_for = asked_for != job.asked_for, asked_for
        if job.task is None:
            self._begin(job)
        elif changed:
            self._remember()
        job.view.attach(subscription)

    def _check_resumable(self, job: Job) -> None:
        if job.state is JobState.PAUSED:
            raise failures.download_stopped(job.id, paused=True).error()
        if job.state is JobState.FAILED and job.failure is not None:
            wait = job.failure.error().retry_after_seconds
            if wait is None or time.time() < job.failed_at + max(wait, RETRY_SECONDS):
                raise job.failure.error()

    async def halt(self, job: Job, *, keep: bool) -> int:
        """Pause a download, or cancel it and remove what has arrived. Returns bytes freed.

        Cancelling leaves: whoever follows the download is told of its end all the same.
        """
        return await self._stops.finish(self._stopped(job, keep=keep), f"stop-{job.id}")

    async def _stopped(self, job: Job, *, keep: bool) -> int:
        async with job.stopping:
            await self._halt(job)
            if self._jobs.get(job.ref) is not job:
                return 0  # it ended in this very moment
            view, job.view = job.view, LoadView(asyncio.get_running_loop().time)
            view.fail(failures.download_stopped(job.id, paused=keep))
            job.state, job.failure, job.asked_for = JobState.PAUSED, None, False
            freed = 0
            if keep:
                self._remember()
                self._changed(job)
            else:
                arrived = job.resolved.digests if job.resolved is not None else ()
                freed = await self._remove_partial(job, arrived)
                self._forget(job)
            await self._store.caught_up()
            return freed

    async def _remove_partial(self, job: Job, digests: Iterable[str]) -> int:
        """Remove what has arrived of files that no other download is about. Returns bytes freed."""
        shared = {
            digest
            for other in self._jobs.values()
            if other is not job and other.resolved is not None
            for digest in other.resolved.digests
        }
        unshared = set(digests) - shared
        return await asyncio.to_thread(remove_partial, self._cache_dir, job.ref.repo_id, unshared)

    async def _remove_stale(self, job: Job, digests: Iterable[str]) -> None:
        """Remove what has arrived of files that the name does not mean any more. Nobody fetches on."""
        try:
            await self._remove_partial(job, digests)
        except OSError as error:
            log.warning("stale_files_not_removed", model=job.id, error=str(error))

    async def _halt(self, job: Job) -> None:
        task, job.task = job.task, None
        if task is None:
            return
        task.cancel()
        _, late = await asyncio.wait({task}, timeout=STOP_SECONDS)
        if late:
            log.error("download_not_stopped", model=job.id)

    def _begin(self, job: Job) -> None:
        job.state, job.failure = JobState.QUEUED, None
        job.view = LoadView(asyncio.get_running_loop().time)
        job.view.begin(pb.STAGE_RESOLVE, f"Asking the hub for {job.ref.name}.")
        job.task = asyncio.create_task(self._run(job), name=f"download-{job.ref.name}")
        self._remember()
        self._changed(job)

    async def _run(self, job: Job) -> None:
        try:
            async with self._places:
                job.state = JobState.RUNNING
                end = await self._fetched(job)
            if isinstance(end, Failed):
                self._fail(job, failures.failure_of(end.error()))
                return
            job.view.end_stage(cached=end.cached)
            await self._finished(job)
        except PaddockError as error:
            self._fail(job, failures.failure_of(error))
        except asyncio.CancelledError:
            raise
        except BaseException:
            # A bug: nobody may be left waiting for a download that has ended.
            self._fail(job, failures.internal(job.id))
            raise
        else:
            log.info("download_finished", model=job.id, cached=end.cached)
            job.task = None
            self._forget(job)
            job.view.end(pb.LoadResponse())

    async def _fetched(self, job: Job) -> Done | Failed:
        """Run fetchers until one gets to an end."""
        fruitless = 0
        while True:
            before = job.completed_bytes
            try:
                return await self._launcher.run(
                    job.ref, partial(self._receive, job), resumed=job.resolved is not None
                )
            except (FetcherStalledError, FetcherCrashedError, OSError) as error:
                fruitless = 0 if job.completed_bytes > before else fruitless + 1
                text = str(error)
                log.warning("fetcher_failed", model=job.id, error=text, attempt=fruitless)
            if fruitless >= FETCHERS_MAX:
                return Failed(Reason.HUB_UNREACHABLE, f"{text} Whatever arrived is kept.", {"model": job.id})
            self._warn(job, text)

    def _receive(self, job: Job, message: Message) -> None:
        match message:
            case Resolved():
                self._on_resolved(job, message)
            case Advanced():
                self._on_advanced(job, message)
            case Retrying():
                log.info(
                    "download_retrying", model=job.id, error=message.message, seconds=message.wait_seconds
                )
                self._warn(job, f"{message.message} Trying again in {message.wait_seconds:g} s.")
            case Done() | Failed():
                pass  # what `run` returns

    def _on_resolved(self, job: Job, message: Resolved) -> None:
        old_id, old = job.id, job.resolved
        job.resolved = message
        stale = set(old.digests).difference(message.digests) if old is not None else set[str]()
        if stale:
            self._stops.run(self._remove_stale(job, stale), f"remove-stale-{job.id}")
        if job.id != old_id:
            self._gone(job, old_id)
        if job.view.stage == pb.STAGE_RESOLVE:
            job.view.end_stage()
        self._remember()
        self._changed(job)

    def _on_advanced(self, job: Job, message: Advanced) -> None:
        stage = pb.STAGE_VERIFY if message.verifying else pb.STAGE_DOWNLOAD
        if message.verifying:
            job.reset_rate()
        elif job.resolved is not None:
            job.sample(asyncio.get_running_loop().time(), message.completed_bytes)
        if job.resolved is None or not message.total_bytes:
            return  # a sign of life before anything is known
        if job.view.stage != stage:
            job.view.begin(stage, _STAGE_TEXTS[stage].format(file=job.resolved.file))
        job.view.advance(stage, message.completed_bytes / message.total_bytes, message.total_bytes)

    def _warn(self, job: Job, text: str) -> None:
        stage = job.view.stage
        job.view.warn(failures.Failure(Reason.HUB_UNREACHABLE, text, {"model": job.id}))
        if stage == pb.STAGE_RESOLVE:
            job.view.begin(stage, f"Asking the hub for {job.ref.name} again.")

    def _fail(self, job: Job, failure: failures.Failure) -> None:
        log.warning("download_failed", model=job.id, reason=failure.reason, error=failure.message)
        view, job.task = job.view, None
        if job.resolved is None:  # nothing has come of it: a name that means nothing is not listed
            self._forget(job)
        else:
            job.state, job.failure, job.failed_at = JobState.FAILED, failure, time.time()
            self._remember()
            self._changed(job)
            failed = [other for other in self._jobs.values() if other.state is JobState.FAILED]
            for other in sorted(failed, key=lambda other: other.failed_at)[:-FAILED_MAX]:
                self._forget(other)
        view.fail(failure)

    def _forget(self, job: Job) -> None:
        if self._jobs.pop(job.ref, None) is not None:
            self._remember()
            self._gone(job, job.id)

    def _remember(self) -> None:
        """Have the unfinished downloads kept; one that has failed is not taken up again by itself."""
        if self._closing:
            return
        self._store.put(
            {
                ref: Unfinished(
                    job.state is JobState.PAUSED, job.completed_bytes, job.resolved, job.asked_for
                )
                for ref, job in self._jobs.items()
                if job.state is not JobState.FAILED
            }
        )


_STAGE_TEXTS: Final = {pb.STAGE_DOWNLOAD: "{file}", pb.STAGE_VERIFY: "Checking the hash of {file}."}
