"""The composition root: builds the server out of its parts, runs it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from paddock.api import ModelManagerApi
from paddock.daemons import is_exposed, loop_factory, settle_heap, told_to_stop
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import Catalog, CatalogError, InvalidConfigError, Place, Problem
from paddock_server.config import CHANGES_IN_PLACE, ConfigError, setting_lines
from paddock_server.logs import configure_logging
from paddock_server.manager import (
    ManagerConfig,
    Measurements,
    MemoryAdmission,
    MemoryPredictor,
    ModelManager,
    Settings,
)
from paddock_server.memory import MachineWatch
from paddock_server.reloading import Sources, follow_hangups, reloading
from paddock_server.rpc.server import AddressInUseError, RpcServer
from paddock_server.rpc.service import ModelManagerService
from paddock_server.state_files import check_directory
from paddock_server.supervisor import Launcher, LocalLauncher

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from paddock_server.config import ServerConfig
    from paddock_server.memory import Machine

    Attach = Callable[[ModelManagerApi, asyncio.Event], AbstractAsyncContextManager[object]]

log = structlog.get_logger()

AT_ONCE_SECONDS: Final = 15.0
"""The longest a stop at once may take: SIGTERM, SIGKILL and the time-outs between them. It takes
milliseconds, but for a process that hangs in a driver."""

SETTLE_SECONDS: Final = 5.0
"""How long whoever started the server waits, for the loads of the start, to be told that it serves."""

LOOK_SECONDS: Final = 0.1
"""How often it is looked whether they are over."""

STREAM_CLOSE_SECONDS: Final = 1.0
"""What is left after the drain (health watches, slow readers) gets this long before it is cancelled."""


class StartError(Exception):
    """The server cannot start; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that accepts calls."""

    service: ModelManagerApi
    """The service, for callers in this process."""

    grpc_address: str
    """Host and port gRPC is served on; the real port when 0 was asked for."""


class Onlooker(Protocol):
    """Who is told how the server is, as it happens."""

    def ready(self, grpc_address: str) -> None:
        """Learn that calls are accepted."""
        ...

    def draining(self, seconds: float) -> None:
        """Learn that the server stops, and how long what runs may go on."""
        ...

    def stopping_at_once(self) -> None:
        """Learn that what runs is ended now."""
        ...


class _Nobody:
    """An onlooker that does not care."""

    def ready(self, grpc_address: str) -> None:
        """See `Onlooker.ready`."""

    def draining(self, seconds: float) -> None:
        """See `Onlooker.draining`."""

    def stopping_at_once(self) -> None:
        """See `Onlooker.stopping_at_once`."""


@contextlib.asynccontextmanager
async def serving(
    config: ServerConfig,
    *,
    launcher: Launcher | None = None,
    attach: Attach | None = None,
    onlooker: Onlooker | None = None,
    at_once: asyncio.Event | None = None,
) -> AsyncGenerator[RunningServer]:
    """Run a server for as long as the block runs, then stop it gracefully.

    Args:
        config: The settings.
        launcher: What starts workers; local processes by default.
        attach: Runs something beside the server that calls the service directly, for example the gateway. It
            is left when the server stops, while the models still serve what runs. It is given `at_once` too.
        onlooker: Who is told how it goes.
        at_once: Ends the drain when it is set.

    Raises:
        StartError: an address is taken, a model directory cannot be read, a state directory that was named
            cannot be written, or a configuration file does not validate.
    """
    await _check_state_dir(config)
    watch = MachineWatch()
    looking = asyncio.create_task(watch.look(), name="look-at-machine")
    try:
        catalog = await asyncio.to_thread(
            Catalog,
            config.model_directories,
            preset=config.models_preset,
            config_file=config.config_file,
            hub_cache=config.hub_cache,
        )
    except (CatalogError, InvalidConfigError) as error:
        looking.cancel()
        raise StartError(str(error)) from error
    machine = await looking
    budget = memory_budget(machine, config)
    measured = Measurements(_state_file(config, "measured"))
    release = version("paddock")
    launcher = launcher or LocalLauncher()
    manager = ModelManager(
        catalog=catalog,
        launcher=launcher,
        config=manager_config(config),
        admission=MemoryAdmission(config.models_max, budget),
        predictor=MemoryPredictor(
            machine.placement, lambda: manager.memory_budget, measured, version=release
        ),
        settings=lambda: _settings(config, machine),
    )
    service = ModelManagerService(manager, version=release, machine=watch)
    parts = _Parts(catalog, launcher, manager, service, onlooker or _Nobody(), at_once or asyncio.Event())
    async with measured.kept(), _running(config, parts, attach) as server:
        yield server


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a server is made of."""

    catalog: Catalog
    launcher: Launcher
    manager: ModelManager
    service: ModelManagerService
    onlooker: Onlooker
    at_once: asyncio.Event


@contextlib.asynccontextmanager
async def _running(
    config: ServerConfig, parts: _Parts, attach: Attach | None
) -> AsyncGenerator[RunningServer]:
    """Do what `serving` says, with its parts."""
    catalog, manager, service = parts.catalog, parts.manager, parts.service
    try:
        rpc = RpcServer(
            service, host=config.grpc_host, port=config.grpc_port, with_reflection=config.reflection
        )
    except AddressInUseError as error:
        raise StartError(str(error)) from error
    attached = contextlib.AsyncExitStack()
    try:
        await manager.start()
    except CatalogError as error:
        raise StartError(str(error)) from error
    try:
        if attach is not None:
            await attached.enter_async_context(attach(service, parts.at_once))
        await rpc.start()
        _warn_when_exposed(config.grpc_host)
        for problem in catalog.problems:
            log.warning("config_problem", problem=str(problem))
        if catalog.unusable_count:
            advice = "`paddock doctor` with the same settings tells which, and why."
            log.warning("model_files_unusable", count=catalog.unusable_count, advice=advice)
        log.info("server_ready", grpc=rpc.address)
        files = [path for path in (config.models_preset, config.config_file) if path is not None]
        async with reloading(service, Sources(files, catalog.stamps, manager.rescan)):
            yield RunningServer(service, rpc.address)
    finally:
        rpc.announce_stop()
        try:
            await _drain(parts, attached)
        finally:
            await rpc.stop(STREAM_CLOSE_SECONDS)
            log.info("server_stopped")


async def _drain(parts: _Parts, attached: contextlib.AsyncExitStack) -> None:
    """Let what runs end within the time there is for it; once `at_once` is set, end it."""
    manager = parts.manager
    seconds = manager.config.drain_seconds
    log.info("server_draining", seconds=seconds)
    parts.onlooker.draining(seconds)
    drain = asyncio.gather(attached.aclose(), manager.stop(drain_seconds=seconds))
    hurried = asyncio.create_task(parts.at_once.wait(), name="stop-at-once")
    try:
        # Both parts bound themselves by the drain and a margin.
        await asyncio.wait({drain, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            log.warning("server_stopping_at_once")
            parts.onlooker.stopping_at_once()
            manager.hurry()
            parts.launcher.hurry()
            await asyncio.wait({drain}, timeout=AT_ONCE_SECONDS)
            if not drain.done():  # What is left ends with this process.
                log.error("server_not_stopped", waited_seconds=AT_ONCE_SECONDS)
    finally:
        hurried.cancel()
        drain.cancel()
        await asyncio.wait({drain, hurried}, timeout=STREAM_CLOSE_SECONDS)
    if drain.done() and not drain.cancelled():
        drain.result()


async def run_server(
    config: ServerConfig, *, attach: Attach | None = None, onlooker: Onlooker | None = None
) -> None:
    """Run a server until SIGTERM or SIGINT, then let what runs end; a second signal ends it at once. The
    process is to end after that."""
    onlooker = onlooker or _Nobody()
    async with (
        told_to_stop(ends_process=True) as stop,
        serving(config, attach=_settling(attach), onlooker=onlooker, at_once=stop.at_once) as server,
    ):
        beside = [
            asyncio.create_task(follow_hangups(server.service), name="hangups"),
            asyncio.create_task(_tell_when_settled(server, onlooker), name="tell-when-settled"),
        ]
        try:
            await stop.asked.wait()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside, timeout=STREAM_CLOSE_SECONDS)


def _settling(attach: Attach | None) -> Attach:
    """Have the collector go over the heap before anything listens: with 10,000 models it takes half a second.
    What the start makes after that is little."""

    def settled(service: ModelManagerApi, at_once: asyncio.Event) -> AbstractAsyncContextManager[object]:
        settle_heap()
        return contextlib.nullcontext() if attach is None else attach(service, at_once)

    return settled


async def _tell_when_settled(server: RunningServer, onlooker: Onlooker) -> None:
    """Tell an onlooker that calls are accepted, once the loads of the start are over: what they log would
    push it out of sight. Who waits for a large one is told before."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_SECONDS):
            await _settled(server.service)
    onlooker.ready(server.grpc_address)


async def _settled(service: ModelManagerApi) -> None:
    """Wait until no model is loading."""
    loading = pb.ListRequest(states=[model_pb2.MODEL_STATE_LOADING], page_size=1)
    while True:
        if not (await service.list(loading)).models:
            return
        await asyncio.sleep(LOOK_SECONDS)


def run(config: ServerConfig, *, attach: Attach | None = None, onlooker: Onlooker | None = None) -> None:
    """Configure logging and run a server until it is told to stop. Raises `StartError`."""
    configure_logging(config.log_level, config.log_format)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run_server(config, attach=attach, onlooker=onlooker))


def memory_budget(machine: Machine, config: ServerConfig) -> dict[str, int]:
    """Return the bytes models may take, by device: as configured, else what is free now, less the margin."""
    budget = {device.name: int(device.free_bytes * (1 - config.memory_margin)) for device in machine.devices}
    unknown = sorted(config.memory_budget.keys() - budget.keys())
    if unknown:
        log.warning("memory_budget_of_unknown_devices", devices=unknown, known=sorted(budget))
    budget |= config.memory_budget
    log.info("memory_budget", **budget)
    return budget


def _settings(config: ServerConfig, machine: Machine) -> Settings:
    """Read the settings again: those that can change while the server runs, and which others have changed.

    `machine` is as it was at the start, before models took memory.

    Raises:
        InvalidConfigError: the configuration does not validate.
    """
    name = str(config.config_file or "")
    try:
        latest = config.reread()
    except ConfigError as error:
        raise InvalidConfigError([Problem(Place(name, 0), "", str(error))]) from error
    lines = setting_lines(config.config_file)
    values = {key: getattr(latest, key) for key in type(config).model_fields}
    problems = [
        Problem(Place(name, lines.get(key, 0)), key, "has changed; it needs a restart", is_error=False)
        for key, value in values.items()
        if key not in CHANGES_IN_PLACE and value != getattr(config, key)
    ]
    merged = config.model_copy(update={key: values[key] for key in CHANGES_IN_PLACE})
    admission = MemoryAdmission(merged.models_max, memory_budget(machine, merged))
    return Settings(manager_config(merged), admission, tuple(problems))


def manager_config(config: ServerConfig) -> ManagerConfig:
    """Return what the manager goes by."""
    return ManagerConfig(
        models_max=config.models_max,
        autoload=config.models_autoload,
        autoload_downloads=config.autoload_downloads,
        context_size_tokens=config.ctx_size,
        slot_count=config.parallel,
        gpu_layer_count=config.n_gpu_layers,
        thread_count=config.threads,
        batch_size_tokens=config.batch_size,
        cache_type_k=config.cache_type_k,
        cache_type_v=config.cache_type_v,
        queue_limit=config.queue_limit,
        target_step_milliseconds=config.target_step_milliseconds,
        idle_timeout_seconds=config.idle_timeout_seconds,
        sleep_timeout_seconds=config.sleep_idle_seconds,
        waiting_requests_max=config.total_queue_limit,
        drain_seconds=config.drain_seconds,
        state_file=_state_file(config, "loads"),
        hub_cache=config.hub_cache,
        downloads_file=_state_file(config, "downloads"),
        restore=config.restore,
    )


async def _check_state_dir(config: ServerConfig) -> None:
    """See that what is answered can be kept. Whoever named a directory relies on it; of the default one, in a
    container without a home perhaps, a warning is enough.

    Raises:
        StartError: the directory that was named cannot be made or written.
    """
    path = config.state_dir
    if path is None:
        return
    try:
        await asyncio.to_thread(check_directory, path)
    except OSError as error:
        why = error.strerror or str(error)
        if "state_dir" in config.model_fields_set:
            message = (
                f"Cannot write to the state directory {path}: {why}. "
                "Name another with --state-dir, or --state-dir '' to remember nothing."
            )
            raise StartError(message) from error
        log.warning(
            "state_dir_not_writable",
            path=str(path),
            error=why,
            advice="Loads, pins and downloads are lost when this server ends; --state-dir names another.",
        )


def _state_file(config: ServerConfig, what: str) -> Path | None:
    """Return where something is remembered: one file per gRPC port, so that two servers do not share one."""
    if config.state_dir is None:
        return None
    return config.state_dir / f"{what}-{config.grpc_port}.json"


def _warn_when_exposed(host: str) -> None:
    """Warn when the server can be reached from other machines: it asks nobody for a key yet."""
    if is_exposed(host):
        log.warning("server_exposed", host=host, advice="Anyone who reaches this address can use the server.")
