"""`ModelManager`: what the RPCs call. Finds the actor of a model, sends it a message and awaits the
answer."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError, PaddockError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogError
from paddock_server.downloads.process import FetcherLauncher
from paddock_server.manager import failure as failures
from paddock_server.manager.actor import Acquiring, Actor, EntryFound, Tools
from paddock_server.manager.admission import CountAdmission
from paddock_server.manager.desired import DesiredLoads
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.hub import HubModels, HubTools
from paddock_server.manager.loop import ManagerLoop
from paddock_server.manager.messages import (
    AcquireAsked,
    CallerLeft,
    CloseAsked,
    Conflict,
    FileFound,
    FileGone,
    LoadAsked,
    UnloadAsked,
)
from paddock_server.manager.options import default_options, wish_of
from paddock_server.manager.progress import Subscription
from paddock_server.manager.residency import Residency
from paddock_server.manager.state import NEVER, ActorState, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Mapping
    from typing import Any

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.admission import Admission
    from paddock_server.manager.config import ManagerConfig
    from paddock_server.manager.lease import Lease
    from paddock_server.manager.run import WorkerLauncher
    from paddock_server.supervisor import LogBatch, LogRing

log: FilteringBoundLogger = structlog.get_logger()

SCAN_SECONDS: Final = 1.0
"""Least time between two scans of the model directories that requests cause."""

STOP_MARGIN_SECONDS: Final = 60.0
"""On top of the drain: an aborted load and the stop ladder, at their longest."""

_CONFLICTS: Final = {
    pb.LOAD_CONFLICT_POLICY_UNSPECIFIED: Conflict.FAIL,
    pb.LOAD_CONFLICT_POLICY_FAIL: Conflict.FAIL,
    pb.LOAD_CONFLICT_POLICY_KEEP: Conflict.KEEP,
    pb.LOAD_CONFLICT_POLICY_RELOAD: Conflict.RELOAD,
}


class ModelCatalog(Protocol):
    """What the manager needs of `catalog.Catalog`. Blocking; called in threads."""

    def scan(self) -> Mapping[str, CatalogEntry]:
        """Return all models by id. Raises `CatalogError`."""
        ...

    def resolve_local(self, path: str) -> CatalogEntry:
        """Return the model at a path relative to a model directory. Raises `CatalogError`."""
        ...


class ModelManager:
    """The models of this server. Every public method is to be called in the event loop that `start` ran
    in."""

    def __init__(
        self,
        *,
        catalog: ModelCatalog,
        launcher: WorkerLauncher,
        config: ManagerConfig,
        admission: Admission | None = None,
        fetchers: FetcherLauncher | None = None,
    ) -> None:
        """`admission` is by default the plain limit of `config.models_max`, `fetchers` real processes."""
        self.instance_id = secrets.token_hex(8)
        """New for every server: revisions and load ids of different ones are not comparable."""

        self._catalog = catalog
        self._config = config
        self._actors: dict[str, Actor] = {}
        self._actor_count = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._own_tasks: set[asyncio.Task[None]] = set()
        self._changes = ChangeLog(self.instance_id, self._models)
        admission = admission or CountAdmission(config.models_max)
        residency = Residency(
            admission,
            patience_seconds=config.patience_seconds,
            waiting_max=config.waiting_models_max,
        )
        self._loop = ManagerLoop(residency, self._actors.get)
        self._desired = DesiredLoads(config.state_file)
        self._writer: asyncio.Task[None] | None = None
        self._mentioned: dict[str, str] = {}
        limits = Limits(
            waiters_max=config.queue_limit,
            drain_seconds=config.drain_seconds,
            admission_timeout_seconds=config.admission_timeout_seconds,
            restart=config.restart,
            load_restart=config.load_restart,
        )
        self._tools = Tools(
            launcher=launcher,
            config=config,
            limits=limits,
            changes=self._changes,
            admission=admission,
            loop=self._loop,
            remember=self._desired.put,
            vanished=self._vanished,
        )
        self.hub = HubModels(self._hub_tools(fetchers or FetcherLauncher()))
        """The models of the Hugging Face Hub: downloads and deletion."""
        self._scan_lock = asyncio.Lock()
        self._scanned_at = -SCAN_SECONDS
        self._next_scan: asyncio.Task[None] | None = None
        self._closing = False

    def _hub_tools(self, launcher: FetcherLauncher) -> HubTools:
        return HubTools(
            cache_dir=self._config.hub_cache,
            state_file=self._config.downloads_file,
            actors=self._actors,
            changes=self._changes,
            rescan=self.rescan,
            launcher=launcher,
        )

    # Life

    async def start(self) -> None:
        """Read the model directories, begin to serve, and bring back what the operator had loaded.

        Raises:
            CatalogError: a model directory cannot be listed.
        """
        await self._desired.read()
        await self.rescan()
        self._own_task(self._loop.run(), "manager-loop")
        self._writer = self._own_task(self._desired.run(), "desired-loads")
        self._replay()
        await self.hub.start()

    async def stop(self, *, drain_seconds: float) -> None:
        """Refuse new requests, let running ones end within `drain_seconds`, stop every worker."""
        self._closing = True
        await self.hub.stop()
        actors = list(self._actors.values())
        for actor in actors:
            actor.tell(CloseAsked(drain_seconds))
        if actors:
            waits = [asyncio.create_task(actor.closed.wait()) for actor in actors]
            _, late = await asyncio.wait(waits, timeout=drain_seconds + STOP_MARGIN_SECONDS)
            for task in late:
                task.cancel()
            if late:
                log.error("models_not_stopped", count=len(late))
        self._desired.close()
        if self._writer is not None:
            await asyncio.wait({self._writer})
        tasks = {*self._own_tasks, *self._tasks.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_bug)
        return task

    def _own_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._task(work, name)
        self._own_tasks.add(task)
        task.add_done_callback(self._own_tasks.discard)
        return task

    def _replay(self) -> None:
        """Load again what the operator had loaded, as far as there is room; the latest loads first of all."""
        present = [model for model in self._desired.loads if model in self._actors]
        missing = [model for model in self._desired.loads if model not in self._actors]
        kept = present[-self._config.models_max :] if self._config.models_max else present
        if missing:
            log.warning("remembered_models_missing", models=missing)
        for model in kept:
            log.info("load_replayed", model=model)
            subscription = Subscription()
            subscription.closed = True
            self._actors[model].tell(LoadAsked(subscription, self._desired.loads[model]))

    # What the RPCs ask for

    async def subscribe_load(self, request: pb.LoadRequest) -> AsyncGenerator[pb.LoadResponse]:
        """Load a model and show how it goes: `progress* loaded`. Closing detaches; the load goes on.

        Raises:
            PaddockError: the load failed or was refused.
        """
        wish = wish_of(request.runtime_options)
        timeout = request.load_timeout
        subscription = Subscription()
        asked = LoadAsked(
            subscription,
            wish,
            conflict=_CONFLICTS[request.conflict_policy],
            timeout_seconds=timeout.ToNanoseconds() / 1e9 if request.HasField("load_timeout") else None,
        )
        ref = self.hub.ref_of(request.model, request.source if request.HasField("source") else None)
        if ref is None:
            (await self._load_target(request)).tell(asked)
        else:

            async def load(model: str) -> None:
                (await self._actor_to_load(model)).tell(asked)

            found = self.hub.find(ref)
            if found is not None:
                await load(found)
            else:
                # A task of its own: a caller who goes leaves the download, and the load after it, running.
                self._own_task(self.hub.bring(ref, subscription, load), f"load-{ref.name}")
        try:
            while (event := await subscription.next()) is not None:
                yield event
        finally:
            subscription.closed = True

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Unload a model; returns when its worker is gone.

        Raises:
            PaddockError: MODEL_NOT_FOUND, LOAD_ID_MISMATCH.
        """
        actor = await self._actor(request.model)
        reply: asyncio.Future[pb.UnloadResponse] = asyncio.get_running_loop().create_future()
        timeout = request.drain_timeout
        actor.tell(
            UnloadAsked(
                reply,
                force=request.mode == pb.UNLOAD_MODE_FORCE,
                drain_seconds=(
                    timeout.ToNanoseconds() / 1e9
                    if request.HasField("drain_timeout")
                    else self._config.drain_seconds
                ),
                only_load_id=request.load_id,
            )
        )
        return await reply

    async def acquire(
        self, model: str, autoload: pb.AutoloadPolicy.ValueType = pb.AUTOLOAD_POLICY_UNSPECIFIED
    ) -> Lease:
        """Make sure that a model is loaded, and take a lease on it, in one step.

        Raises:
            PaddockError: there is no such model, it may not or cannot be loaded, or too many wait for it.
        """
        if autoload == pb.AUTOLOAD_POLICY_UNSPECIFIED:
            allowed = self._config.autoload
        else:
            allowed = autoload == pb.AUTOLOAD_POLICY_LOAD
        ref = self.hub.ref_of(model, None) if model not in self._actors else None
        if ref is not None:
            found = self.hub.find(ref)
            if found is None and not allowed:
                raise failures.model_not_loaded(model).error()
            model = found or await self.hub.ensure(ref)
        actor = await self._actor_to_load(model)
        loop = asyncio.get_running_loop()
        caller = Acquiring(loop.create_future(), loop.time())
        actor.tell(AcquireAsked(caller, allowed))
        try:
            return await caller.reply
        except asyncio.CancelledError:
            reply = caller.reply
            if reply.done() and not reply.cancelled() and reply.exception() is None:
                reply.result().release()
            else:
                actor.tell(CallerLeft(caller))
            raise

    async def snapshot(self, model: str) -> model_pb2.Model:
        """Return a model as it is now.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        if self.hub.id_of(model) not in self._actors and (pending := self.hub.pending(model)) is not None:
            return pending
        return self.hub.completed((await self._actor(model)).snapshot())

    def snapshots(self) -> tuple[list[model_pb2.Model], int]:
        """Return every model, ordered by id, and the revision they reflect."""
        return self._models(), self._changes.revision

    def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Stream changes until closed: `changed* synced (changed | deleted | synced)*`."""
        return self._changes.watch(request)

    async def logs(self, model: str) -> LogRing:
        """Return what the model's workers wrote.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        return (await self._actor(model)).log_ring

    async def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream what the model's workers wrote."""
        ring = await self.logs(request.model)
        follower = ring.subscribe(tail_line_count=request.tail_line_count, follow=request.follow)
        async for batch in follower:
            yield _logs_response(batch)

    async def rescan(self) -> None:
        """Read the model directories again: new models appear, changed ones are noted, removed ones go.

        Raises:
            CatalogError: a directory cannot be listed; nothing has changed then.
        """
        async with self._scan_lock:
            self._scanned_at = asyncio.get_running_loop().time()
            found = await asyncio.to_thread(self._scan)
            if not self._closing:
                self._apply(found)

    # Finding models

    async def _actor(self, model: str) -> Actor:
        """Return the actor of a model; an unknown one is looked for on disk first."""
        if self.hub.id_of(model) not in self._actors:
            await self._scan_soon()
        try:
            return self._actors[self.hub.id_of(model)]
        except KeyError:
            raise ModelNotFoundError.of(model) from None

    async def _actor_to_load(self, model: str) -> Actor:
        """Return the actor of a model to load; the file of a broken one may be another by now."""
        actor = self._actors.get(self.hub.id_of(model))
        if actor is not None and (actor.entry.problem is not None or actor.state.held_until == NEVER):
            await self._scan_soon()
        return await self._actor(model)

    async def _scan_soon(self) -> None:
        """Wait for a scan that begins after this call. Any number of callers share one a second."""
        if self._closing:
            raise failures.shutting_down().error()
        if self._next_scan is None:
            self._next_scan = self._own_task(self._scan_when_due(), "catalog-scan")
        await asyncio.wait({self._next_scan})
        if self._closing:
            raise failures.shutting_down().error()

    async def _scan_when_due(self) -> None:
        due_in = self._scanned_at + SCAN_SECONDS - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, due_in))
        self._next_scan = None
        try:
            await self.rescan()
        except CatalogError as error:
            log.warning("catalog_scan_failed", error=str(error))

    def _scan(self) -> dict[str, CatalogEntry]:
        """Scan, and add the models that were named by their path. Runs in a thread."""
        found = dict(self._catalog.scan())
        for model, path in list(self._mentioned.items()):
            if model in found:
                continue
            try:
                found[model] = self._catalog.resolve_local(path)
            except CatalogError:  # gone since: the model goes like any other
                continue
        return found

    def _apply(self, found: Mapping[str, CatalogEntry]) -> None:
        for model, entry in found.items():
            actor = self._actors.get(model)
            if actor is None:
                self._add(entry)
            elif actor.entry != entry or actor.state.gone:
                defaults = default_options(self._config, entry.facts)
                actor.tell(EntryFound(entry, FileFound(defaults, _problem(entry))))
        for model, actor in self._actors.items():
            if model not in found and not actor.state.gone:
                actor.tell(FileGone())

    def _add(self, entry: CatalogEntry) -> None:
        defaults = default_options(self._config, entry.facts)
        wish = self._desired.loads.get(entry.id)
        state = ActorState(
            model=entry.id,
            defaults=defaults,
            options=defaults,
            load_id_prefix=f"{self.instance_id}-{secrets.token_hex(3)}-",
            remembered=wish.filled(defaults) if wish is not None else None,
            problem=_problem(entry),
            # A model that went and came back must not take messages meant for the one before it.
            ticket=self._actor_count << 32,
        )
        self._actor_count += 1
        actor = Actor(entry, state, self._tools)
        self._actors[entry.id] = actor
        self._tasks[entry.id] = self._task(actor.run(), f"model-{entry.id}")
        self._changes.changed(actor.snapshot(), model_pb2.MODEL_STATE_UNSPECIFIED)

    async def _load_target(self, request: pb.LoadRequest) -> Actor:
        """Return the actor a `LoadRequest` means, after checking its source."""
        if not request.HasField("source"):
            return await self._actor_to_load(request.model)
        path = request.source.local.path
        if not request.source.HasField("local"):
            msg = "source"
            raise InvalidFieldError.of(msg, "must hold local or hugging_face; or leave it out")
        try:
            entry = await asyncio.to_thread(self._catalog.resolve_local, path)
        except CatalogError as error:
            raise InvalidFieldError.of(error.field, error.message) from error
        if entry.id == request.model and request.model not in self._actors:
            self._mentioned[entry.id] = path
        actor = await self._actor_to_load(request.model)
        if actor.entry.path != entry.path:
            msg = "source.local.path"
            raise InvalidFieldError.of(
                msg,
                f"{path!r} is model {entry.id!r}; {request.model!r} is at {actor.entry.relative_path!r}",
            )
        return actor

    def _models(self) -> list[model_pb2.Model]:
        return self.hub.all(actor.snapshot() for actor in self._actors.values())

    def _vanished(self, model: str) -> None:
        del self._actors[model]
        self._tasks.pop(model).cancel()
        self._changes.deleted(model)


def _problem(entry: CatalogEntry) -> failures.Failure | None:
    return failures.problem(entry.problem) if entry.problem is not None else None


def _logs_response(batch: LogBatch) -> pb.StreamLogsResponse:
    response = pb.StreamLogsResponse(dropped_line_count=batch.dropped_line_count)
    for line in batch.lines:
        added = response.lines.add(load_id=line.load_id, pid=line.pid, text=line.text)
        added.read_time.FromNanoseconds(int(line.read_time * 1e9))
    return response


def _log_bug(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, PaddockError):
        log.critical("task_bug", task=task.get_name(), exc_info=error)
