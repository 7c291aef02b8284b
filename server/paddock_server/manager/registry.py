"""The models there are: found by scans of the catalog, known by their names, each with its replicas.

The one writer of which models there are. A scan takes place in a thread, one at a time; what it found is
taken over in one step of the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from paddock.errors import InvalidFieldError, ModelNotFoundError
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import NO_DEFAULTS, CatalogEntry, CatalogError, InvalidConfigError
from paddock_server.manager import failure as failures
from paddock_server.manager.actor import EntryFound
from paddock_server.manager.failure import Failure
from paddock_server.manager.messages import DefaultsSet, FileFound, FileGone, NextLoad, TermsSet
from paddock_server.manager.options import Terms, default_options, terms_of
from paddock_server.manager.replica_set import ReplicaSet
from paddock_server.manager.sources import (
    config_problem,
    entry_problem,
    other_file,
    reload_error,
    unfit_problem,
)
from paddock_server.manager.state import ActorState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import RequestDefaults
    from paddock_server.manager.config import Settings
    from paddock_server.manager.desired import DesiredLoads
    from paddock_server.manager.sources import ModelCatalog
    from paddock_server.manager.tools import Rules

log: FilteringBoundLogger = structlog.get_logger()

SCAN_SECONDS: Final = 1.0
"""Least time between two scans of the model directories that requests cause."""


@dataclass(frozen=True, slots=True)
class RegistryTools:
    """What the registry works with."""

    instance_id: str
    """Of the server; load ids begin with it."""

    new_set: Callable[[CatalogEntry], ReplicaSet]
    """Begins to serve a model."""

    never_fits: Callable[[CatalogEntry, NextLoad, Terms], Awaitable[Failure | None]]
    """Returns why a load does not fit even when nothing else is loaded."""

    hub_id_of: Callable[[str], str]
    """Returns the id that an `hf:` name means, or the name itself."""

    task: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    """Runs something to its end beside the caller."""


class Registry:
    """Every method is to be called in the manager's event loop."""

    def __init__(
        self, catalog: ModelCatalog, desired: DesiredLoads, rules: Rules, tools: RegistryTools
    ) -> None:
        self._catalog = catalog
        self._desired = desired
        self._rules = rules
        self._tools = tools
        self._sets: dict[str, ReplicaSet] = {}
        self._names: dict[str, str] = {}
        self._mentioned: dict[str, str] = {}
        """Paths of models that no scan finds by itself."""

        self._actor_count = 0
        self._scan_lock = asyncio.Lock()
        self._scanned_at = -SCAN_SECONDS
        self._next_scan: asyncio.Task[None] | None = None
        self._closing = False

    # What there is

    @property
    def sets(self) -> Mapping[str, ReplicaSet]:
        """The models, by id."""
        return self._sets

    @property
    def default_model(self) -> str:
        """The model of requests that name none; empty when there is none."""
        return self._names.get("", "")

    def id_of(self, name: str) -> str:
        """Return the id that a name stands for, or the name itself."""
        known = self._names.get(name, name)
        return known if known in self._sets else self._tools.hub_id_of(known)

    def request_defaults(self, name: str) -> RequestDefaults:
        """Return what requests by this name take for fields they leave unset."""
        replicas = self._sets.get(self.id_of(name))
        return NO_DEFAULTS if replicas is None else replicas.entry.setup.names.get(name, NO_DEFAULTS)

    async def find(self, name: str) -> ReplicaSet:
        """Return a model, by any of its names; an unknown one is looked for on disk first.

        Raises:
            PaddockError: MODEL_NOT_FOUND, SHUTTING_DOWN.
        """
        if self.id_of(name) not in self._sets:
            await self.scan_soon()
        try:
            return self._sets[self.id_of(name)]
        except KeyError:
            raise ModelNotFoundError.of(name) from None

    async def find_to_load(self, name: str) -> ReplicaSet:
        """Return a model to load; the file of a broken one may be another by now.

        Raises:
            PaddockError: MODEL_NOT_FOUND, SHUTTING_DOWN.
        """
        replicas = self._sets.get(self.id_of(name))
        if replicas is not None and (replicas.entry.problem is not None or replicas.is_given_up):
            await self.scan_soon()
        return await self.find(name)

    async def load_target(self, request: pb.LoadRequest) -> ReplicaSet:
        """Return the model a `LoadRequest` means, after checking its source.

        Raises:
            PaddockError: MODEL_NOT_FOUND; SHUTTING_DOWN; INVALID_FIELD the source is wrong, or another's.
        """
        if not request.HasField("source"):
            return await self.find_to_load(request.model)
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
        replicas = await self.find_to_load(request.model)
        if replicas.entry.path != entry.path:
            msg = "source.local.path"
            raise InvalidFieldError.of(
                msg,
                f"{path!r} is model {entry.id!r}; {request.model!r} is at {replicas.entry.relative_path!r}",
            )
        return replicas

    def new_state(self, entry: CatalogEntry) -> ActorState:
        """Return the state in which a replica of a model begins."""
        defaults = default_options(self._rules.config, entry.facts, entry.setup)
        self._actor_count += 1
        return ActorState(
            model=entry.id,
            defaults=defaults,
            options=defaults,
            terms=terms_of(entry.setup, self._desired.pins.get(entry.id)),
            load_id_prefix=f"{self._tools.instance_id}-{secrets.token_hex(3)}-",
            remembered=self._desired.loads.get(entry.id),
            problem=entry_problem(entry),
            # A model that went and came back must not take messages meant for the one before it.
            ticket=self._actor_count << 32,
        )

    def forget(self, model: str) -> None:
        """Take a model out that is gone for good."""
        del self._sets[model]

    def close(self) -> None:
        """Look for nothing any more: the server stops."""
        self._closing = True

    # Scans

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

    async def reload(
        self, read: Callable[[], Settings] | None, take_over: Callable[[Settings], bool]
    ) -> pb.ReloadResponse:
        """Read the configuration files and the model directories again, and take over what changed.

        Args:
            read: Reads the server's own settings, blocking; may raise InvalidConfigError. None leaves them.
            take_over: Has the server go by them, and returns whether they are others.

        Raises:
            PaddockError: INVALID_CONFIG, when a file does not validate; nothing has changed then.
        """
        async with self._scan_lock:
            self._scanned_at = asyncio.get_running_loop().time()
            try:
                settings = await asyncio.to_thread(read) if read is not None else None
                found = await asyncio.to_thread(self._scan, reread=True)
            except (InvalidConfigError, CatalogError) as error:
                raise reload_error(error) from error
            if self._closing:
                raise failures.shutting_down().error()
            own = settings is not None and take_over(settings)
            unfit = await self._unfit(found)
            if self._closing:
                raise failures.shutting_down().error()
            response = self._apply(found, reloading=True, left=unfit.keys())
            if own:
                self._set_defaults(found)
            problems = [*self._catalog.problems, *(settings.problems if settings is not None else ())]
            response.problems.extend(config_problem(one) for one in problems)
            response.problems.extend(unfit_problem(found[model], unfit[model]) for model in unfit)
            return response

    async def _unfit(self, found: Mapping[str, CatalogEntry]) -> dict[str, Failure]:
        """Return the loaded models that a reload is not to load anew: that load could never fit."""
        unfit: dict[str, Failure] = {}
        for model, entry in found.items():
            replicas = self._sets.get(model)
            if replicas is None or entry.absent is not None or replicas.entry == entry:
                continue
            options = replicas.wish.filled(default_options(self._rules.config, entry.facts, entry.setup))
            if replicas.would_load_anew(entry, options):
                load = NextLoad(options, explicit=False, wish=replicas.wish)
                failure = await self._tools.never_fits(entry, load, replicas.terms)
                if failure is not None:
                    unfit[model] = failure
        return unfit

    async def scan_soon(self) -> None:
        """Wait for a scan that begins after this call. Any number of callers share one a second."""
        if self._closing:
            raise failures.shutting_down().error()
        if self._next_scan is None:
            self._next_scan = self._tools.task(self._scan_when_due(), "catalog-scan")
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

    def _apply(
        self, found: Mapping[str, CatalogEntry], *, reloading: bool = False, left: Collection[str] = ()
    ) -> pb.ReloadResponse:
        """Take over what a scan found; only a reload touches the loads that are under way, but those of the
        models that are `left` as they are."""
        difference = pb.ReloadResponse()
        self._names = {name: model for model, entry in found.items() for name in entry.setup.names}
        self._desired.follow(found, self._names, lambda model: file_of(found[model]))
        for model, entry in found.items():
            replicas = self._sets.get(model)
            if replicas is None:
                self._sets[model] = self._tools.new_set(entry)
                difference.added.append(model)
            elif replicas.is_gone or (replicas.entry is not entry and replicas.entry != entry):
                self._follow(replicas, entry, reloading=reloading and model not in left)
                difference.changed.append(model)
            else:
                difference.unchanged_count += 1
        for model in sorted(self._sets.keys() - found.keys()):
            replicas = self._sets[model]
            if reloading or not replicas.is_gone:
                replicas.tell(FileGone(reloading))
                difference.removed.append(model)
        return difference

    def _follow(self, replicas: ReplicaSet, entry: CatalogEntry, *, reloading: bool) -> None:
        """Have a model take over what is new about it."""
        defaults = default_options(self._rules.config, entry.facts, entry.setup)
        reread = reloading and entry.absent is None and other_file(replicas.entry, entry)
        event = FileFound(defaults, entry_problem(entry), reloading, reread)
        replicas.tell(EntryFound(entry, event))
        replicas.tell(TermsSet(terms_of(entry.setup, self._desired.pins.get(entry.id))))

    def _set_defaults(self, found: Mapping[str, CatalogEntry]) -> None:
        for model, entry in found.items():
            defaults = default_options(self._rules.config, entry.facts, entry.setup)
            self._sets[model].tell(DefaultsSet(defaults))


def file_of(entry: CatalogEntry) -> str:
    """Return what tells a model's file from others; empty while it has none."""
    return str(entry.path) if entry.absent is None else ""
