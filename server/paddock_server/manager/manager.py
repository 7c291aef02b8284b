"""`ModelManager`: what the RPCs call. Has the model do it and awaits the answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from paddock.errors import ModelNotFoundError, PaddockError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.downloads.process import FetcherLauncher
from paddock_server.manager import failure as failures
from paddock_server.manager.admission import MemoryAdmission
from paddock_server.manager.desired import DesiredLoads
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.fitting import Fitting
from paddock_server.manager.hub import HubModels, HubTools
from paddock_server.manager.loop import Limited, ManagerLoop, ReplicaLoop
from paddock_server.manager.messages import Conflict, LoadAsked
from paddock_server.manager.options import default_options, wish_of
from paddock_server.manager.pending import PendingLoads
from paddock_server.manager.prediction import NoPrediction, are_slots_set
from paddock_server.manager.progress import Subscription
from paddock_server.manager.registry import Registry, RegistryTools, file_of
from paddock_server.manager.replica_set import ReplicaSet
from paddock_server.manager.replicas import shown_name
from paddock_server.manager.residency import Residency
from paddock_server.manager.snapshot import Listing, forgotten, logs_response
from paddock_server.manager.sources import entry_problem
from paddock_server.manager.startup import Startup
from paddock_server.manager.tasks import Tasks
from paddock_server.manager.tools import Rules, SetTools, Tools, limits_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry, RequestDefaults
    from paddock_server.manager.actor import Actor
    from paddock_server.manager.admission import Admission
    from paddock_server.manager.config import ManagerConfig, Settings
    from paddock_server.manager.lease import Lease
    from paddock_server.manager.options import Options, Wish
    from paddock_server.manager.prediction import Predictor
    from paddock_server.manager.run import WorkerLauncher
    from paddock_server.manager.sources import ModelCatalog
    from paddock_server.supervisor import LogRing

log: FilteringBoundLogger = structlog.get_logger()

STOP_MARGIN_SECONDS: Final = 60.0
"""On top of the drain: an aborted load and the stop ladder, at their longest."""

_CONFLICTS: Final = {
    pb.LOAD_CONFLICT_POLICY_UNSPECIFIED: Conflict.FAIL,
    pb.LOAD_CONFLICT_POLICY_FAIL: Conflict.FAIL,
    pb.LOAD_CONFLICT_POLICY_KEEP: Conflict.KEEP,
    pb.LOAD_CONFLICT_POLICY_RELOAD: Conflict.RELOAD,
}


class WouldLoad(NamedTuple):
    """What a load would come to."""

    entry: CatalogEntry
    options: Options
    keeps_slots: bool
    """Whether its sequences have been set, so that none is given up for a longer context."""


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

        admission = admission or MemoryAdmission(config.models_max)
        self._rules = Rules(config, limits_of(config), admission)
        self._settings = settings
        self._changes = ChangeLog(self.instance_id, self._models)
        self._residency = Residency(
            admission,
            patience_seconds=config.patience_seconds,
            waiting_max=config.waiting_models_max,
        )
        self.memory_held = self._residency.held_bytes
        """Gives the bytes that models hold by the ledger, by device."""

        self._tasks = Tasks()
        self._actors: dict[str, Actor] = {}
        self._actor_tasks: dict[str, asyncio.Task[None]] = {}
        self._loop = ManagerLoop(self._residency, self._actors.get)
        self._desired = DesiredLoads(config.state_file)
        self._writer: asyncio.Task[None] | None = None
        predicts = predictor or NoPrediction()
        self.memory_measured = predicts.measured
        """Gives the bytes that an earlier load of the same was measured to take, by device."""

        fitting = Fitting(predicts, self._rules)
        set_tools = self._set_tools(launcher, predicts, fitting)
        registry_tools = RegistryTools(
            never_fits=fitting.refusal,
            instance_id=self.instance_id,
            new_set=lambda entry: ReplicaSet(entry, set_tools),
            hub_id_of=lambda name: self.hub.id_of(name),
            task=self._tasks.run,
        )
        self._registry = Registry(catalog, self._desired, self._rules, registry_tools)
        self.hub = HubModels(self._hub_tools(fetchers or FetcherLauncher()))
        """The models of the Hugging Face Hub: downloads and deletion."""

        self._pending = PendingLoads(self.hub, self._desired, self._load_by_id)
        self._waiting = 0

    def _set_tools(self, launcher: WorkerLauncher, predictor: Predictor, fitting: Fitting) -> SetTools:
        def tools_of(replica: str) -> Tools:
            return Tools(
                launcher=launcher,
                rules=self._rules,
                predictor=predictor,
                loop=ReplicaLoop(self._loop, replica),
                held=lambda: self._residency.held.get(replica),
            )

        return SetTools(
            tools_of=tools_of,
            changes=self._changes,
            new_state=lambda entry: self._registry.new_state(entry),
            started=self._started,
            ended=self._ended,
            never_fits=fitting.refusal,
            completed=lambda model, entry: self.hub.completed(model, entry),
            vanished=self._vanished,
            expect=self._expect,
            remember=self._remember,
            task=self._tasks.run,
        )

    def _hub_tools(self, launcher: FetcherLauncher) -> HubTools:
        config = self.config
        return HubTools(
            cache_dir=config.hub_cache,
            state_file=config.downloads_file,
            models=self._registry.sets,
            id_of=self._registry.id_of,
            changes=self._changes,
            rescan=self._registry.rescan,
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
        await self._registry.rescan()
        self._tasks.run(self._loop.run(), "manager-loop")
        self._writer = self._tasks.run(self._desired.run(), "desired-loads")
        await self.hub.start(resume=self.config.restore)
        Startup(self._registry, self.hub, self._desired, self._pending, self._tasks).begin(self.config)

    async def stop(self, *, drain_seconds: float) -> None:
        """Refuse new requests, let running ones end within `drain_seconds`, stop every worker."""
        self._registry.close()
        await self.hub.stop()
        models = list(self._registry.sets.values())
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
        await self._tasks.cancel()

    def hurry(self) -> None:
        """Give what `stop` lets run on no more time: it ends now, with SHUTTING_DOWN."""
        for replicas in self._registry.sets.values():
            replicas.close(0)

    @property
    def config(self) -> ManagerConfig:
        """The settings as they are after the latest reload."""
        return self._rules.config

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
            self._tasks.run(self._pending.run(wanted, asked), f"load-{wanted.name}")
        elif (ref := self.hub.ref_of(request.model, source)) is not None:
            await self._load_by_id(self.hub.find(ref) or request.model, asked)
        else:
            (await self._registry.load_target(request)).load(asked)
        try:
            while (event := await subscription.next()) is not None:
                if event.HasField("loaded"):
                    await self._desired.caught_up()
                yield event
        except PaddockError as error:
            self._told_of(failures.failure_of(error), request.model, source)
            await self._desired.caught_up()
            raise
        finally:
            subscription.closed = True

    def _told_of(self, failure: failures.Failure, model: str, source: model_pb2.ModelSource | None) -> None:
        """Forget a load that has failed, now that one who asked for it knows. What may work at another time
        stays: it is tried again after a restart."""
        if failure.is_transient:
            return
        ref = self.hub.ref_of(model, source)
        found = self.hub.find(ref) if ref is not None else None
        replicas = self._registry.sets.get(found or self._registry.id_of(model))
        if replicas is not None and replicas.is_unused:  # Else another load decides, or has decided.
            self._desired.failed(replicas.model, replicas.wish, for_good=failure.is_permanent)

    async def _load_by_id(self, model: str, asked: LoadAsked) -> None:
        (await self._registry.find_to_load(model)).load(asked)

    async def would_load(self, request: pb.LoadRequest) -> WouldLoad:
        """Return what a load would read, and how; nothing is started.

        Raises:
            PaddockError: there is no such model, an option is wrong, or the file cannot be loaded.
        """
        wish = wish_of(request.runtime_options)
        entry = (await self._registry.load_target(request)).entry
        problem = entry_problem(entry)
        if problem is not None:
            raise problem.error()
        options = wish.filled(default_options(self.config, entry.facts, entry.setup))
        return WouldLoad(entry, options, are_slots_set(entry, wish))

    async def unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        """Unload a model; returns when its worker is gone. One that is remembered alone is forgotten.

        Raises:
            PaddockError: MODEL_NOT_FOUND, LOAD_ID_MISMATCH.
        """
        aborted = 0
        wanted = self.hub.wanted(request.model)
        name = request.model if wanted is None else wanted.name
        is_remembered = self._desired.knows(name) and not request.load_id
        if wanted is not None and not request.load_id:  # A load that still downloads has no id.
            aborted = await self.hub.call_off(wanted, failures.load_aborted(wanted.name))
            self._desired.put(wanted.name, None)
        pending = self._only_pending(request.model)
        if pending is not None:
            await self._desired.caught_up()
            return pb.UnloadResponse(model=pending, aborted_request_count=aborted)
        try:
            replicas = await self._registry.find(request.model)
        except ModelNotFoundError:
            if not is_remembered:
                raise
            self._desired.forget(name)
            await self._desired.caught_up()
            return pb.UnloadResponse(model=forgotten(name), aborted_request_count=aborted)
        timeout = request.drain_timeout
        own = replicas.entry.setup.drain_seconds
        drain_seconds = self.config.drain_seconds if own is None else own
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
        return await (await self._registry.find(request.model)).sleep()

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Pin a model or take the pin off, now and after a restart.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        replicas = await self._registry.find(request.model)
        pinned = not request.unpin
        self._desired.pin(replicas.model, pinned, file_of(replicas.entry))
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
            allowed = self.config.autoload
        else:
            allowed = autoload == pb.AUTOLOAD_POLICY_LOAD
        wanted = self.hub.wanted(model)
        if wanted is not None:
            if not allowed:
                raise failures.model_not_loaded(model).error()
            with self._one_more_waits(model):
                model = await self.hub.ensure(
                    wanted,
                    may_begin=self.config.autoload_downloads,
                    waiters_max=self.config.queue_limit,
                )
        replicas = await self._registry.find_to_load(model)
        with self._one_more_waits(model, unless=replicas.serves):
            return await replicas.acquire(keep_alive_seconds, autoload=allowed)

    @contextlib.contextmanager
    def _one_more_waits(self, model: str, *, unless: bool = False) -> Generator[None]:
        """Count a request that waits for a model, or for its download, among those of all models.

        Raises:
            PaddockError: QUEUE_FULL, as many as may do already; not with `unless`.
        """
        if not unless and self._waiting >= self.config.waiting_requests_max:
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
        pending = self._only_pending(model)
        return pending if pending is not None else (await self._registry.find(model)).snapshot()

    def _only_pending(self, name: str) -> model_pb2.Model | None:
        """Return a model of which there is a download and nothing else."""
        return None if self._registry.id_of(name) in self._registry.sets else self.hub.pending(name)

    def listing(self) -> Listing:
        """Return what List shows, ordered by id, without making a message of any model yet."""
        shown = {model for model, replicas in self._registry.sets.items() if not replicas.entry.setup.hidden}
        downloads = self.hub.unlisted()

        def state_of(model: str) -> model_pb2.ModelState.ValueType:
            return downloads[model].state if model in downloads else self._registry.sets[model].state

        def model_of(model: str) -> model_pb2.Model:
            if model in downloads:
                return downloads[model]
            return self._registry.sets[model].snapshot()

        return Listing(sorted(shown | downloads.keys()), state_of, model_of, self._changes.revision)

    def default_model(self) -> str:
        """Return the model of requests that name none; empty when there is none."""
        return self._registry.default_model

    def request_defaults(self, name: str) -> RequestDefaults:
        """Return what requests by this name take for fields they leave unset."""
        return self._registry.request_defaults(name)

    async def reload(self) -> pb.ReloadResponse:
        """Read the configuration files and the model directories again, and take over what changed.

        Raises:
            PaddockError: INVALID_CONFIG, when a file does not validate; nothing has changed then.
        """
        response = await self._registry.reload(self._settings, self._take_over)
        # After the models: who goes depends on pins, priorities and groups that the reload may have changed.
        self._loop.tell(Limited(self._rules.admission))
        return response

    async def rescan(self) -> None:
        """Read the model directories again, as somebody has seen that they have changed.

        Raises:
            PaddockError: SHUTTING_DOWN.
        """
        await self._registry.scan_soon()

    def _take_over(self, settings: Settings) -> bool:
        """Go by other settings of the server from now on; return whether they are others."""
        if settings.config == self._rules.config and settings.admission == self._rules.admission:
            return False
        log.info("settings_changed")
        self._rules.config = settings.config
        self._rules.limits = limits_of(settings.config)
        self._rules.admission = settings.admission
        return True

    def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse]:
        """Stream changes until closed: `changed* synced (changed | deleted | synced)*`."""
        return self._changes.watch(request)

    async def logs(self, model: str) -> LogRing:
        """Return what the model's workers wrote.

        Raises:
            PaddockError: MODEL_NOT_FOUND.
        """
        return (await self._registry.find(model)).log_ring

    async def stream_logs(self, request: pb.StreamLogsRequest) -> AsyncGenerator[pb.StreamLogsResponse]:
        """Stream what the model's workers wrote."""
        ring = await self.logs(request.model)
        follower = ring.subscribe(tail_line_count=request.tail_line_count, follow=request.follow)
        async for batch in follower:
            yield logs_response(batch)

    # What models and their replicas tell

    def _started(self, replica: str, actor: Actor) -> None:
        self._actors[replica] = actor
        self._actor_tasks[replica] = self._tasks.run(actor.run(), f"model-{shown_name(replica)}")

    def _ended(self, replica: str) -> None:
        del self._actors[replica]
        self._actor_tasks.pop(replica).cancel()

    def _models(self) -> list[model_pb2.Model]:
        sets = self._registry.sets
        models = {model: replicas.snapshot() for model, replicas in sets.items()} | self.hub.unlisted()
        return [models[model] for model in sorted(models)]

    def _expect(self, model: str, wish: Wish) -> None:
        self._desired.expect(model, wish, file_of(self._registry.sets[model].entry))

    def _remember(self, model: str, wish: Wish | None) -> None:
        self._desired.put(model, wish, file_of(self._registry.sets[model].entry))

    def _vanished(self, model: str) -> None:
        self._registry.forget(model)
        self._changes.deleted(model)
