"""The composition root: builds the server out of its parts, runs it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import structlog

from paddock.api import ModelManagerApi
from paddock.daemons import is_exposed, loop_factory, settle_heap, told_to_stop
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
from paddock_server.supervisor import LocalLauncher

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from paddock_server.config import ServerConfig
    from paddock_server.memory import Machine
    from paddock_server.supervisor import Launcher

    Attach = Callable[[ModelManagerApi], AbstractAsyncContextManager[object]]

log = structlog.get_logger()

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


@contextlib.asynccontextmanager
async def serving(
    config: ServerConfig, *, launcher: Launcher | None = None, attach: Attach | None = None
) -> AsyncGenerator[RunningServer]:
    """Run a server for as long as the block runs, then stop it gracefully.

    Args:
        config: The settings.
        launcher: What starts workers; local processes by default.
        attach: Runs something beside the server that calls the service directly, for example the gateway. It
            is left when the server stops, while the models still serve what runs.

    Raises:
        StartError: an address is taken, a model directory cannot be read, or a configuration file does not
            validate.
    """
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
    manager = ModelManager(
        catalog=catalog,
        launcher=launcher or LocalLauncher(),
        config=manager_config(config),
        admission=MemoryAdmission(config.models_max, budget),
        predictor=MemoryPredictor(
            machine.placement, lambda: manager.memory_budget, measured, version=release
        ),
        settings=lambda: _settings(config, machine),
    )
    service = ModelManagerService(manager, version=release, machine=watch)
    async with measured.kept(), _running(config, catalog, manager, service, attach) as server:
        yield server


@contextlib.asynccontextmanager
async def _running(
    config: ServerConfig,
    catalog: Catalog,
    manager: ModelManager,
    service: ModelManagerService,
    attach: Attach | None,
) -> AsyncGenerator[RunningServer]:
    """Do what `serving` says, with its parts."""
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
            await attached.enter_async_context(attach(service))
        await rpc.start()
        _warn_when_exposed(config.grpc_host)
        for problem in catalog.problems:
            log.warning("config_problem", problem=str(problem))
        log.info("server_ready", grpc=rpc.address)
        files = [path for path in (config.models_preset, config.config_file) if path is not None]
        async with reloading(service, Sources(files, catalog.stamps, manager.rescan)):
            yield RunningServer(service, rpc.address)
    finally:
        log.info("server_draining", seconds=manager.config.drain_seconds)
        rpc.announce_stop()
        try:
            await asyncio.gather(attached.aclose(), manager.stop(drain_seconds=manager.config.drain_seconds))
        finally:
            await rpc.stop(STREAM_CLOSE_SECONDS)
            log.info("server_stopped")


async def run_server(
    config: ServerConfig,
    *,
    attach: Attach | None = None,
    ready: Callable[[RunningServer], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT. A second signal cuts the drain short.

    `ready` is called once, when calls are accepted.
    """
    async with told_to_stop() as stop:
        try:
            async with serving(config, attach=attach) as server:
                hangups = asyncio.create_task(follow_hangups(server.service), name="hangups")
                if ready is not None:
                    ready(server)
                try:
                    await stop.wait()
                finally:
                    hangups.cancel()
        except asyncio.CancelledError:
            # What the drain was waiting for has been cut; workers end with us.
            log.warning("server_stop_cut_short")
            raise


def run(
    config: ServerConfig,
    *,
    attach: Attach | None = None,
    ready: Callable[[RunningServer], None] | None = None,
) -> None:
    """Configure logging and run a server until it is told to stop. Raises `StartError`."""
    configure_logging(config.log_level, config.log_format)

    def started(server: RunningServer) -> None:
        settle_heap()
        if ready is not None:
            ready(server)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run_server(config, attach=attach, ready=started))


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


def _state_file(config: ServerConfig, what: str) -> Path | None:
    """Return where something is remembered: one file per gRPC port, so that two servers do not share one."""
    if config.state_dir is None:
        return None
    return config.state_dir / f"{what}-{config.grpc_port}.json"


def _warn_when_exposed(host: str) -> None:
    """Warn when the server can be reached from other machines: it asks nobody for a key yet."""
    if is_exposed(host):
        log.warning("server_exposed", host=host, advice="Anyone who reaches this address can use the server.")
