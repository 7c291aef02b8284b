"""`ModelManager`: what the RPCs call. Finds the model, has its replicas do it and awaits the answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError, PaddockError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import NO_DEFAULTS, CatalogError, InvalidConfigError
from paddock_server.downloads.process import FetcherLauncher
from paddock_server.manager import failure as failures
from paddock_server.manager.actor import Actor, EntryFound, Rules, Tools
from paddock_server.manager.admission import MemoryAdmission
from paddock_server.manager.desired import DesiredLoads
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.hub import HubModels, HubTools
from paddock_server.manager.loop import Limited, ManagerLoop, ReplicaLoop
from paddock_server.manager.messages import (
    Conflict,
    DefaultsSet,
    FileFound,
    FileGone,
    LoadAsked,
    TermsSet,
)
from paddock_server.manager.options import NO_WISH, default_options, terms_of, wish_of
from paddock_server.manager.pending import PendingLoads
from paddock_server.manager.prediction import NoPrediction
from paddock_server.manager.progress import Subscription
from paddock_server.manager.replica_set import ReplicaSet, SetTools, nobody
from paddock_server.manager.replicas import shown_name
from paddock_server.manager.residency import Residency
from paddock_server.manager.snapshot import Listing, logs_response
from paddock_server.manager.sources import (
    config_problem,
    entry_problem,
    first_that_fit,
    other_file,
    reload_error,
    startup_loads,
)
from paddock_server.manager.state import ActorState, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
    from typing import Any

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry, RequestDefaults
    from paddock_server.manager.admission import Admission
    from paddock_server.manager.config import ManagerConfig, Settings
    from paddock_server.manager.lease import Lease
    from paddock_server.manager.options import Options, Wish
    from paddock_server.manager.prediction import Predictor
    from paddock_server.manager.run import WorkerLauncher
    from paddock_server.manager.sources import ModelCatalog
    from paddock_server.supervisor import LogRing

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
        predictor: Predictor | None = None,
        fetchers: FetcherLauncher | None = None,
        settings: Callable[[], Settings] | None = None,
    ) -> None:
        """`admission` is by default the plain limit of `config.models_max`; without a `predictor` nothing is
        predicted; `fetchers` are real processes. `settings` reads the server's own settings again for a
        reload, blocking; it may raise InvalidConfigError. Without it they stay."""
        self.instance_id = secrets.token_hex(8)
        """New for every server: revisions and load ids of different ones are not comparable."""

        self._catalog = catalog
        self._config = config
        self._settings = settings
        self._sets: dict[str, ReplicaSet] = {}
        self._actors: dict[str, Actor] = {}
        self._actor_count = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._own_tasks: set[asyncio.Task[None]] = set()
        self._changes = ChangeLog(self.instance_id, self._models)
        admission = admission or MemoryAdmission(config.models_max)
        residency = Residency(
            admission,
            patience_seconds=config.patience_seconds,
            waiting_max=config.waiting_models_max,
        )
        self.memory_held = residency.held_bytes
        """Gives the bytes that models hold by the ledger, by device."""
        self._loop = ManagerLoop(residency, self._actors.get)
        self._desired = DesiredLoads(config.state_file)
        self._writer: asyncio.Task[None] | None = None
        self._mentioned: dict[str, str] = {}
        self._names: dict[str, str] = {}
        rules = self._rules = Rules(config, _limits(config), admission)
        predicts = predictor or NoPrediction()
        self.memory_measured = predicts.measured
        """Gives the bytes that an earlier load of the same was measured to take, by device."""

        def tools_of(replica: str) -> Tools:
            return Tools(
                launcher=launcher,
                rules=rules,
                predictor=predicts,
                loop=ReplicaLoop(self._loop, replica),
                held=lambda: residency.held.get(replica),
            )

        self._set_tools = SetTools(
            tools_of=tools_of,
            changes=self._changes,
            new_state=self._new_state,
            started=self._started,
            ended=self._ended,
            completed=lambda model, entry: self.hub.completed(model, entry),
            vanished=self._vanished,
            remember=self._remember,
            task=self._own_task,
        )
        self.hub = HubModels(self._hub_tools(fetchers or FetcherLauncher()))
        """The models of the Hugging Face Hub: downloads and deletion."""

        self._pending = PendingLoads(self.hub, self._desired, self._load_by_id)
        self._scan_lock = asyncio.Lock()
        self._scanned_at = -SCAN_SECONDS
        self._next_scan: asyncio.Task[None] | None = None
        self._waiting = 0
        self._closing = False

    def _hub_tools(self, launcher: FetcherLauncher) -> HubTools:
        return HubTools(
            cache_dir=self._config.hub_cache,
            state_file=self._config.downloads_file,
            models=self._sets,
            id_of=self._id_of,
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
        await self.hub.finish_removals()
        await self.rescan()
        self._own_task(self._loop.run(), "manager-loop")
        self._writer = self._own_task(self._desired.run(), "desired-loads")
        await self.hub.start(resume=self._config.restore)
        if self._config.restore:
            self._replay()
        self._load_on_startup()

    async def stop(self, *, drain_seconds: float) -> None:
        """Refuse new requests, let running ones end within `drain_seconds`, stop every worker."""
        self._closing = True
        await self.hub.stop()
        models = list(self._sets.values())
        for replicas in models:
            replicas.close(drain_seconds)
        if models:
            waits = [asyncio.create_task(replicas.closed()) for replicas in models]
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
        missing = [model for model in self._desired.loads if not self._can_come_back(model)]
        if missing:
            log.warning("remembered_models_missing", models=missing)
        latest_first = dict(reversed(self._remembered().items()))
        room = self._config.models_max or sum(latest_first.values())
        for model in reversed(first_that_fit(latest_first, room)):
            log.info("load_replayed", model=model)
            self._begin_load(model, LoadAsked(nobody(), self._desired.loads[model]))

    def _can_come_back(self, model: str) -> bool:
        return model in self._sets or self.hub.is_unfinished(model)

    def _remembered(self) -> dict[str, int]:
        """Return what the operator had loaded, as far as it is there or arrives: replicas by model."""
        return {
            model: self._replicas_of(model, wish)
            for model, wish in self._desired.loads.items()
            if self._can_come_back(model)
        }

    def _replicas_of(self, model: str, wish: Wish) -> int:
        if model not in self._sets:
            return wish.replica_count or 1
        entry = self._sets[model].entry
        return wish.filled(default_options(self._config, entry.facts, entry.setup)).replica_count

    def _load_on_startup(self) -> None:
        """Load what the configuration wants loaded, as far as there is room."""
        entries = [replicas.entry for replicas in self._sets.values()]
        replayed = self._remembered() if self._config.restore else {}
        kept, left_out = startup_loads(entries, replayed, self._config.models_max)
        if left_out:
            log.warning("load_on_startup_without_room", models=left_out, models_max=self._config.models_max)
        for model in kept:
            self._begin_load(model, LoadAsked(nobody(), NO_WISH, explicit=False))

    def _begin_load(self, model: str, asked: LoadAsked) -> None:
        """Load a model that nobody calls for, downloading it first where it has to be."""
        wanted = self.hub.wanted(model)
        if wanted is not None:
            self._own_task(self._pending.run(wanted, asked), f"load-{model}")
        elif model in self._sets:
            self._sets[model].load(asked)
        else:  # Its download had ended, and it goes by another name.
            log.warning("remembered_models_missing", models=[model])

    @property
    def config(self) -> ManagerConfig:
        """The settings as they are after the latest reload."""
        return self._config

    @property
    def memory_budget(self) -> Mapping[str, int]:
        """Bytes that models may have, by device. A device that is not named has no limit."""
        return self._rules.admission.budget

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
        source = request.source if request.HasField("source") else None
        wanted = self.hub.wanted(request.model, source)
        if wanted is not None:
            # A task of its own: a caller who goes leaves the download, and the load after it, running.
            self._own_task(self._pending.run(wanted, asked), f"load-{wanted.name}")
        elif (ref := self.hub.ref_of(request.model, source)) is not None:
            await self._load_by_id(self.hub.find(ref) or request.model, asked)
        else:
            (await self._load_target(request)).load(asked)
        try:
            while (event := await subscription.next()) is not None:
                if event.HasField("loaded"):
                    await self._desired.caught_up()
                yield event
        finally:
            subscription.closed = True

    async def _load_by_id(self, model: str, asked: LoadAsked) -> None:
        (await self._to_load(model)).load(asked)

    async def would_load(self, request: pb.LoadRequest) -> tuple[CatalogEntry, Options]:
        """Return what a load would read, and the options it would have; nothing is started.

        Raises:
            PaddockError: there is no such model, an option is wrong, or the file cannot be loaded.
        """
        wish = wish_of(request.runtime_options)
        entry = (await self._load_target(request)).entry
        problem = entry_problem(entry)
        if problem is not None:
            raise problem.error()
        return entry, wish.filled(default_options(self._config, entry.facts, entry.setup))

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Unload a model; returns when its worker is gone.

        Raises:
            PaddockError: MODEL_NOT_FOUND, LOAD_ID_MISMATCH.
        """
        aborted = 0
        wanted = self.hub.wanted(request.model)
        if wanted is not None and not request.load_id:  # A load that still downloads has no id.
            aborted = await self.hub.call_off(wanted, failures.load_aborted(wanted.name))
            self._desired.put(wanted.name, None)
        if self._id_of(request.model) not in self._sets and (pending := self.hub.pending(request.model)):
            await self._desired.caught_up()
            return pb.UnloadResponse(model=pending, aborted_request_count=aborted)
        replicas = await self._replicas(request.model)
        timeout = request.drain_timeout
        own = replicas.entry.setup.drain_seconds
        drain_seconds = self._config.drain_seconds if own is None else own
        if request.HasField("drain_timeout"):
            drain_seconds = timeout.ToNanoseconds() / 1e9
        response = await replicas.unload(request, drain_seconds)
        response.aborted_request_count += aborted
        await self._desired.caught_up()
        return response

    async def sleep(self, request: pb.SleepRequest) -> pb.SleepResponse:
        """Have a model give its memory back; returns when it has.

        Raises:
            PaddockError: MODEL_NOT_FOUND, MODEL_NOT_LOADED, MODEL_IN_USE.
        """
        return await (await self._replicas(request.model)).sleep()

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Pin a model or take the pin off, now and after a restart.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        replicas = await self._replicas(request.model)
        pinned = not request.unpin
        self._desired.pin(replicas.model, pinned, _file_of(replicas.entry))
        await replicas.set_terms(replace(replicas.terms, pinned=pinned))
        await self._desired.caught_up()
        return pb.PinResponse(model=replicas.snapshot())

    async def acquire(
        self,
        model: str,
        autoload: pb.AutoloadPolicy.ValueType = pb.AUTOLOAD_POLICY_UNSPECIFIED,
        keep_alive_seconds: float = 0.0,
    ) -> Lease:
        """Make sure that a model is loaded, and take a lease on it, in one step.

        Args:
            model: The model.
            autoload: Whether to load it when it is not loaded.
            keep_alive_seconds: How long it is to be kept after the lease, at least.

        Raises:
            PaddockError: there is no such model, it may not or cannot be loaded, or too many wait for it.
        """
        if autoload == pb.AUTOLOAD_POLICY_UNSPECIFIED:
            allowed = self._config.autoload
        else:
            allowed = autoload == pb.AUTOLOAD_POLICY_LOAD
        wanted = self.hub.wanted(model)
        if wanted is not None:
            if not allowed:
                raise failures.model_not_loaded(model).error()
            with self._one_more_waits(model):
                model = await self.hub.ensure(
                    wanted,
                    may_begin=self._config.autoload_downloads,
                    waiters_max=self._config.queue_limit,
                )
        replicas = await self._to_load(model)
        with self._one_more_waits(model, unless=replicas.serves):
            return await replicas.acquire(keep_alive_seconds, autoload=allowed)

    @contextlib.contextmanager
    def _one_more_waits(self, model: str, *, unless: bool = False) -> Generator[None]:
        """Count a request that waits for a model, or for its download, among those of all models.

        Raises:
            PaddockError: QUEUE_FULL, as many as may do already; not with `unless`.
        """
        if not unless and self._waiting >= self._config.waiting_requests_max:
            raise failures.too_many_requests_wait(model, self._waiting).error()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def snapshot(self, model: str) -> model_pb2.Model:
        """Return a model as it is now.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        if self._id_of(model) not in self._sets and (pending := self.hub.pending(model)) is not None:
            return pending
        return (await self._replicas(model)).snapshot()

    def listing(self) -> Listing:
        """Return what List shows, ordered by id, without making a message of any model yet."""
        shown = {model for model, replicas in self._sets.items() if not replicas.entry.setup.hidden}
        downloads = self.hub.unlisted()

        def state_of(model: str) -> model_pb2.ModelState.ValueType:
            return downloads[model].state if model in downloads else self._sets[model].state

        def model_of(model: str) -> model_pb2.Model:
            if model in downloads:
                return downloads[model]
            return self._sets[model].snapshot()

        return Listing(sorted(shown | downloads.keys()), state_of, model_of, self._changes.revision)

    def default_model(self) -> str:
        """Return the model of requests that name none; empty when there is none."""
        return self._names.get("", "")

    def request_defaults(self, name: str) -> RequestDefaults:
        """Return what requests by this name take for fields they leave unset."""
        replicas = self._sets.get(self._id_of(name))
        return NO_DEFAULTS if replicas is None else replicas.entry.setup.names.get(name, NO_DEFAULTS)

    async def reload(self) -> pb.ReloadResponse:
        """Read the configuration files and the model directories again, and take over what changed.

        Raises:
            PaddockError: INVALID_CONFIG, when a file does not validate; nothing has changed then.
        """
        async with self._scan_lock:
            self._scanned_at = asyncio.get_running_loop().time()
            try:
                settings = await asyncio.to_thread(self._settings) if self._settings else None
                found = await asyncio.to_thread(self._scan, reread=True)
            except (InvalidConfigError, CatalogError) as error:
                raise reload_error(error) from error
            if self._closing:
                raise failures.shutting_down().error()
            own = settings is not None and self._take_over(settings)
            response = self._apply(found, reloading=True)
            if own:
                self._set_defaults(found)
            problems = [*self._catalog.problems, *(settings.problems if settings is not None else ())]
            response.problems.extend(config_problem(one) for one in problems)
            return response

    def _take_over(self, settings: Settings) -> bool:
        """Go by other settings of the server from now on; return whether they are others."""
        if settings.config == self._config:
            return False
        log.info("settings_changed")
        self._config = self._rules.config = settings.config
        self._rules.limits = _limits(settings.config)
        self._rules.admission = settings.admission
        self._loop.tell(Limited(settings.admission))
        return True

    def _set_defaults(self, found: Mapping[str, CatalogEntry]) -> None:
        for model, entry in found.items():
            defaults = default_options(self._config, entry.facts, entry.setup)
            self._sets[model].tell(DefaultsSet(defaults))

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
        return (await self._replicas(model)).log_ring

    async def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream what the model's workers wrote."""
        ring = await self.logs(request.model)
        follower = ring.subscribe(tail_line_count=request.tail_line_count, follow=request.follow)
        async for batch in follower:
            yield logs_response(batch)

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

    async def _replicas(self, model: str) -> ReplicaSet:
        """Return a model, by any of its names; an unknown one is looked for on disk first."""
        if self._id_of(model) not in self._sets:
            await self._scan_soon()
        try:
            return self._sets[self._id_of(model)]
        except KeyError:
            raise ModelNotFoundError.of(model) from None

    def _id_of(self, name: str) -> str:
        known = self._names.get(name, name)
        return known if known in self._sets else self.hub.id_of(known)

    async def _to_load(self, model: str) -> ReplicaSet:
        """Return a model to load; the file of a broken one may be another by now."""
        replicas = self._sets.get(self._id_of(model))
        if replicas is not None and (replicas.entry.problem is not None or replicas.is_given_up):
            await self._scan_soon()
        return await self._replicas(model)

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

    def _scan(self, *, reread: bool = False) -> dict[str, CatalogEntry]:
        """Scan, and add the models that were named by their path. Runs in a thread."""
        found = dict(self._catalog.scan(reread=reread))
        for model, path in list(self._mentioned.items()):
            if model in found:
                continue
            try:
                found[model] = self._catalog.resolve_local(path)
            except CatalogError:  # gone since: the model goes like any other
                continue
        return found

    def _apply(self, found: Mapping[str, CatalogEntry], *, reloading: bool = False) -> pb.ReloadResponse:
        """Take over what a scan found; only a reload touches the loads that are under way."""
        difference = pb.ReloadResponse()
        self._names = {name: model for model, entry in found.items() for name in entry.setup.names}
        self._desired.follow(found, self._names, lambda model: _file_of(found[model]))
        for model, entry in found.items():
            replicas = self._sets.get(model)
            if replicas is None:
                self._sets[model] = ReplicaSet(entry, self._set_tools)
                difference.added.append(model)
            elif replicas.is_gone or (replicas.entry is not entry and replicas.entry != entry):
                defaults = default_options(self._config, entry.facts, entry.setup)
                reread = reloading and entry.absent is None and other_file(replicas.entry, entry)
                event = FileFound(defaults, entry_problem(entry), reloading, reread)
                replicas.tell(EntryFound(entry, event))
                replicas.tell(TermsSet(terms_of(entry.setup, self._desired.pins.get(model))))
                difference.changed.append(model)
            else:
                difference.unchanged_count += 1
        for model in sorted(self._sets.keys() - found.keys()):
            replicas = self._sets[model]
            if reloading or not replicas.is_gone:
                replicas.tell(FileGone(reloading))
                difference.removed.append(model)
        return difference

    def _new_state(self, entry: CatalogEntry) -> ActorState:
        defaults = default_options(self._config, entry.facts, entry.setup)
        self._actor_count += 1
        return ActorState(
            model=entry.id,
            defaults=defaults,
            options=defaults,
            terms=terms_of(entry.setup, self._desired.pins.get(entry.id)),
            load_id_prefix=f"{self.instance_id}-{secrets.token_hex(3)}-",
            remembered=self._desired.loads.get(entry.id),
            problem=entry_problem(entry),
            # A model that went and came back must not take messages meant for the one before it.
            ticket=self._actor_count << 32,
        )

    def _started(self, replica: str, actor: Actor) -> None:
        self._actors[replica] = actor
        self._tasks[replica] = self._task(actor.run(), f"model-{shown_name(replica)}")

    def _ended(self, replica: str) -> None:
        del self._actors[replica]
        self._tasks.pop(replica).cancel()

    async def _load_target(self, request: pb.LoadRequest) -> ReplicaSet:
        """Return the model a `LoadRequest` means, after checking its source."""
        if not request.HasField("source"):
            return await self._to_load(request.model)
        path = request.source.local.path
        if not request.source.HasField("local"):
            msg = "source"
            raise InvalidFieldError.of(msg, "must hold local or hugging_face; or leave it out")
        try:
            entry = await asyncio.to_thread(self._catalog.resolve_local, path)
        except CatalogError as error:
            raise InvalidFieldError.of(error.field, error.message) from error
        if entry.id == request.model and request.model not in self._sets:
            self._mentioned[entry.id] = path
        replicas = await self._to_load(request.model)
        if replicas.entry.path != entry.path:
            msg = "source.local.path"
            raise InvalidFieldError.of(
                msg,
                f"{path!r} is model {entry.id!r}; {request.model!r} is at {replicas.entry.relative_path!r}",
            )
        return replicas

    def _models(self) -> list[model_pb2.Model]:
        models = {model: replicas.snapshot() for model, replicas in self._sets.items()} | self.hub.unlisted()
        return [models[model] for model in sorted(models)]

    def _remember(self, model: str, wish: Wish | None) -> None:
        self._desired.put(model, wish, _file_of(self._sets[model].entry))

    def _vanished(self, model: str) -> None:
        del self._sets[model]
        self._changes.deleted(model)


def _file_of(entry: CatalogEntry) -> str:
    """Return what tells a model's file from others; empty while it has none."""
    return str(entry.path) if entry.absent is None else ""


def _limits(config: ManagerConfig) -> Limits:
    return Limits(
        waiters_max=config.queue_limit,
        drain_seconds=config.drain_seconds,
        admission_timeout_seconds=config.admission_timeout_seconds,
        restart=config.restart,
        load_restart=config.load_restart,
    )


def _log_bug(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, PaddockError):
        log.critical("task_bug", task=task.get_name(), exc_info=error)
