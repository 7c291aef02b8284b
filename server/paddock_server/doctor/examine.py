"""The examination: every probe at the same time, each with a bound, in the order of the report."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import psutil

from paddock.daemons import is_exposed
from paddock.listening import GRPC, HTTP, host_port
from paddock_server.catalog import CatalogError, InvalidConfigError
from paddock_server.doctor import findings, machine, network, serving
from paddock_server.doctor.findings import Finding, problem
from paddock_server.doctor.probes import in_thread
from paddock_server.doctor.serving import Unanswered

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from paddock_server.config import ServerConfig

PROBE_SECONDS: Final = 30.0
"""Most time for one probe. A directory on a file server that is gone answers never."""


async def examine(config: ServerConfig, *, probe_seconds: float = PROBE_SECONDS) -> list[Finding]:
    """Look at everything on this machine that a server with this configuration needs.

    Returns the findings in the order of the report. Raises nothing for what it finds; takes about
    `probe_seconds` at most.
    """
    probes: list[tuple[str, Coroutine[None, None, list[Finding]]]] = [
        ("versions", in_thread(_versions)),
        ("llama.cpp", in_thread(_build)),
        ("cpu", in_thread(lambda: findings.judge_cpu(machine.cpu(), config.threads))),
        ("models", in_thread(lambda: _models(config))),
        ("memory", in_thread(lambda: findings.judge_memory(machine.memory()))),
        ("limits", in_thread(lambda: findings.judge_limits(*machine.limits()))),
        ("state", in_thread(lambda: [findings.judge_state(machine.state_directory(config.state_dir))])),
        ("disk", in_thread(lambda: _disks(config))),
        ("hub", in_thread(lambda: findings.judge_hub(machine.hub() if config.hf_cache else None))),
        ("ports", _ports(config)),
    ]
    answers = await asyncio.gather(*(_bounded(area, probe, probe_seconds) for area, probe in probes))
    return [finding for answer in answers for finding in answer]


async def examine_server(
    address: str, *, asked_for: bool, probe_seconds: float = PROBE_SECONDS
) -> list[Finding]:
    """Ask the server at an address how it is, and raise nothing for what it finds. `asked_for`: somebody has
    named it, so that it is a problem when it does not answer."""
    return await _bounded("server", _server(address, asked_for=asked_for), probe_seconds)


def own_address(config: ServerConfig) -> str:
    """Return where a server with this configuration is reached over gRPC; empty when it takes a free port."""
    if config.grpc_port == 0:
        return ""
    host = config.grpc_host
    return host_port(network.REACHED_AT.get(host, host), config.grpc_port)


def is_own(address: str, config: ServerConfig) -> bool:
    """Return whether a server with this configuration would be the one at an address."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if port != str(config.grpc_port):
        return False
    return host == config.grpc_host or (host in _HERE and config.grpc_host in _HERE)


_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"})  # noqa: S104
"""Hosts that reach, or listen on, the loopback address."""


async def _bounded(area: str, probe: Coroutine[None, None, list[Finding]], seconds: float) -> list[Finding]:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await probe
    except OSError as error:
        if limit.expired():
            advice = "Something it reads does not answer: a file server, a driver, a name service."
            return [problem(area, f"could not be examined within {seconds:g} s", advice)]
        return [problem(area, f"could not be examined: {error}", "Make readable what it names.")]
    except ImportError as error:
        return [problem(area, f"could not be examined: {error}", "pip install 'paddock[server]'")]
    except (ValueError, RuntimeError, psutil.Error) as error:
        # A variable that is no number, a file that is no text, a machine without a home.
        message = f"could not be examined: {type(error).__name__}: {error}"
        return [problem(area, message, "A server here fails over the same: look for what it names.")]


def _versions() -> list[Finding]:
    return findings.judge_versions(machine.versions())


def _build() -> list[Finding]:
    try:
        return findings.judge_build(machine.build())
    except machine.LlamaError as error:
        return [problem("llama.cpp", str(error), findings.REBUILD)]


def _models(config: ServerConfig) -> list[Finding]:
    try:
        models = machine.models(config)
    except InvalidConfigError as error:
        return findings.judge_invalid_config([str(one) for one in error.problems])
    except CatalogError as error:
        return [problem("models", str(error), "Name directories that can be read with --models-dir.")]
    return [*findings.judge_config(models), *findings.judge_models(models, machine.memory().allowed)]


def _disks(config: ServerConfig) -> list[Finding]:
    places = [(findings.MODELS, path) for path in config.model_directories]
    places += [(findings.STATE, config.state_dir)] if config.state_dir is not None else []
    places += [(findings.HUB_CACHE, config.hub_cache)] if config.hub_cache is not None else []
    return findings.judge_disks(machine.disks(places))


async def _ports(config: ServerConfig) -> list[Finding]:
    ports = await asyncio.gather(
        network.examine_port(GRPC, config.grpc_host, config.grpc_port),
        network.examine_port(HTTP, config.host, config.port),
    )
    hosts = {GRPC.name: config.grpc_host, HTTP.name: config.host}
    exposed = {purpose: host for purpose, host in hosts.items() if is_exposed(host)}
    return [
        *(serving.judge_port(port) for port in ports),
        *serving.judge_same_port(config.grpc_port, config.port),
        *serving.judge_exposure(exposed),
    ]


async def _server(address: str, *, asked_for: bool) -> list[Finding]:
    found = await network.ask_server(address)
    if isinstance(found, Unanswered):
        return serving.judge_unanswered(found, asked_for=asked_for)
    return serving.judge_running(found, version("paddock"))
