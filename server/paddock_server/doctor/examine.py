"""The examination: every probe at the same time, each with a bound, in the order of the report."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from paddock.daemons import is_exposed
from paddock_server.catalog import CatalogError, InvalidConfigError
from paddock_server.config import default_hub_cache
from paddock_server.doctor import findings, machine, network
from paddock_server.doctor.findings import Finding, problem

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from paddock_server.config import ServerConfig

PROBE_SECONDS: Final = 30.0
"""Most time for one probe. A directory on a file server that is gone answers never."""

Probe = Callable[[], list[Finding]]


async def examine(
    config: ServerConfig, server: str, *, probe_seconds: float = PROBE_SECONDS
) -> list[Finding]:
    """Look at everything a server with this configuration needs, and at the server at an address.

    Returns the findings in the order of the report. Raises nothing for what it finds; takes about
    `probe_seconds` at most.
    """
    probes: list[tuple[str, Coroutine[None, None, list[Finding]]]] = [
        ("versions", _in_thread(_versions)),
        ("llama.cpp", _in_thread(_build)),
        ("cpu", _in_thread(lambda: findings.judge_cpu(machine.cpu(), config.threads))),
        ("models", _in_thread(lambda: _models_and_memory(config))),
        ("limits", _in_thread(lambda: findings.judge_limits(*machine.limits()))),
        ("state", _in_thread(lambda: [findings.judge_state(machine.state_directory(config.state_dir))])),
        ("disk", _in_thread(lambda: _disks(config))),
        ("hub", _in_thread(lambda: findings.judge_hub(machine.hub()))),
        ("ports", _ports(config)),
        ("server", _server(server)),
    ]
    answers = await asyncio.gather(*(_bounded(area, probe, probe_seconds) for area, probe in probes))
    return [finding for answer in answers for finding in answer]


async def _bounded(area: str, probe: Coroutine[None, None, list[Finding]], seconds: float) -> list[Finding]:
    try:
        async with asyncio.timeout(seconds):
            return await probe
    except TimeoutError:
        advice = "Something it reads does not answer: a file server, a driver, a name service."
        return [problem(area, f"could not be examined within {seconds:g} s", advice)]
    except OSError as error:
        return [problem(area, f"could not be examined: {error}", "Make readable what it names.")]
    except ImportError as error:
        return [problem(area, f"could not be examined: {error}", "pip install 'paddock[server]'")]


async def _in_thread(probe: Probe) -> list[Finding]:
    """Run a probe in a thread that nobody waits for at the exit: one that hangs must not hang the report."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Finding]] = loop.create_future()

    def settle(outcome: list[Finding] | BaseException) -> None:
        if answer.done():  # timed out
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def run() -> None:
        try:
            outcome: list[Finding] | BaseException = probe()
        except BaseException as error:  # noqa: BLE001  # handed to whoever awaits the probe
            outcome = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="probe", daemon=True).start()
    return await answer


def _versions() -> list[Finding]:
    return findings.judge_versions(machine.versions())


def _build() -> list[Finding]:
    try:
        return findings.judge_build(machine.build())
    except machine.LlamaError as error:
        return [problem("llama.cpp", str(error), findings.REBUILD)]


def _models_and_memory(config: ServerConfig) -> list[Finding]:
    memory = machine.memory()
    try:
        models = machine.models(config)
    except InvalidConfigError as error:
        wrong = findings.judge_invalid_config([str(one) for one in error.problems])
        return [*wrong, *findings.judge_memory(memory)]
    except CatalogError as error:
        advice = "Name directories that can be read with --models-dir."
        return [problem("models", str(error), advice), *findings.judge_memory(memory)]
    found = [*findings.judge_config(models), *findings.judge_models(models)]
    return [*found, *findings.judge_memory(memory, models.largest_bytes)]


def _disks(config: ServerConfig) -> list[Finding]:
    places = [("models", path) for path in config.model_directories]
    places += [("state", config.state_dir)] if config.state_dir is not None else []
    places.append(("hub cache", default_hub_cache()))
    return findings.judge_disks(machine.disks(places))


async def _ports(config: ServerConfig) -> list[Finding]:
    ports = await asyncio.gather(
        network.grpc_port(config.grpc_host, config.grpc_port), network.http_port(config.host, config.port)
    )
    hosts = {"gRPC": config.grpc_host, "HTTP": config.host}
    exposed = {purpose: host for purpose, host in hosts.items() if is_exposed(host)}
    return [*(findings.judge_port(port) for port in ports), *findings.judge_exposure(exposed)]


async def _server(address: str) -> list[Finding]:
    running = await network.running_server(address)
    return findings.judge_running(running, address, version("paddock"))
