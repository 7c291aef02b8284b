"""What this machine has for models: its memory as far as the control group lets us, and its accelerators.

Accelerators are asked for in a short-lived process: the libraries that know them start drivers and keep them,
and are not for the server.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psutil
import structlog

from paddock_server.memory import cgroups
from paddock_server.memory.estimate import RAM, Placement
from paddock_server.supervisor import worker_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()

PROBE_COMMAND: Final = (sys.executable, "-P", "-m", "paddock_server.worker.devices")
PROBE_SECONDS: Final = 30.0
"""How long the process that looks for accelerators may take; a cold driver takes several seconds."""

FRESH_SECONDS: Final = 5.0
"""How long what accelerators said of their free memory is taken for true."""

MOST_RETRY_SECONDS: Final = 60.0
"""Longest time until another attempt at accelerators that could not be asked."""

_MAX_ANSWER_BYTES: Final = 64 * 1024

_X86: Final = {
    "AVX2": {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"},
    "AVX512": {"Q2_K"},
}
_ARM: Final = {
    "DOTPROD": {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"},
    "MATMUL_INT8": {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q1_0"},
}
REPACKED_BY: Final = {**_X86, **_ARM}
"""The tensor types that ggml's CPU code reorders, by the ability of the processor it does so for."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device. `name` is how parts of an estimate call it."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices of a machine, its own memory first, and how models are placed on them."""

    devices: tuple[DeviceMemory, ...]
    repacked_types: frozenset[str] = frozenset()

    @property
    def placement(self) -> Placement:
        """How llama.cpp places a model here."""
        gpus = self.devices[1:]
        names, free = tuple(gpu.name for gpu in gpus), tuple(gpu.free_bytes for gpu in gpus)
        return Placement(names, free, self.repacked_types)


class MachineWatch:
    """Says what the machine has now. Any number of callers share one look at the accelerators."""

    def __init__(
        self,
        command: Sequence[str] = PROBE_COMMAND,
        *,
        cgroup_root: Path = cgroups.ROOT,
        own_cgroups: Path = cgroups.OWN,
        timeout_seconds: float = PROBE_SECONDS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._command = tuple(command)
        self._cgroup_root = cgroup_root
        self._own_cgroups = own_cgroups
        self._timeout = timeout_seconds
        self._clock = clock
        self._lock = asyncio.Lock()
        self._gpus: tuple[DeviceMemory, ...] = ()
        self._repacked: frozenset[str] = frozenset()
        self._due = -math.inf
        """When accelerators are to be asked next, by the clock."""
        self._retry_seconds = FRESH_SECONDS

    async def look(self) -> Machine:
        """Return the machine as it is now.

        When accelerators cannot be asked, those known from before are taken, at first none, and that is
        logged; they are asked again by a later look, after FRESH_SECONDS at first and less and less often.
        """
        async with self._lock:
            if self._clock() >= self._due:
                await self._probe()
        ram = await asyncio.to_thread(own_memory, self._cgroup_root, self._own_cgroups)
        return Machine((ram, *self._gpus), self._repacked)

    async def _probe(self) -> None:
        try:
            self._gpus, self._repacked = parsed_answer(await self._asked())
        except (OSError, TimeoutError, ValueError) as error:
            wait = self._retry_seconds
            log.warning("devices_unknown", error=f"{type(error).__name__}: {error}", retry_seconds=wait)
            self._due = self._clock() + wait
            self._retry_seconds = min(2 * wait, MOST_RETRY_SECONDS)
        else:
            # A build without accelerators grows none; the free memory of others changes all the time.
            self._due = self._clock() + FRESH_SECONDS if self._gpus else math.inf
            self._retry_seconds = FRESH_SECONDS

    async def _asked(self) -> bytes:
        """Run the probe and return what it printed.

        Raises:
            OSError: it cannot be started.
            TimeoutError: it took too long.
            ValueError: it failed, or said too much.
        """
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=worker_environment(os.environ, {}),
        )
        try:
            async with asyncio.timeout(self._timeout):
                assert process.stdout is not None  # noqa: S101  asked for above
                answer = await process.stdout.read(_MAX_ANSWER_BYTES)
                code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code:
            message = f"the process that looks for devices ended with code {code}"
            raise ValueError(message)
        return answer


def parsed_answer(answer: bytes) -> tuple[tuple[DeviceMemory, ...], frozenset[str]]:
    """Return the accelerators, and the tensor types the processor reorders, from what the probe printed.

    Raises:
        ValueError: it is not what the probe prints.
    """
    try:
        said: Any = json.loads(answer)
        gpus = tuple(
            DeviceMemory(
                str(gpu["name"]), str(gpu["description"]), int(gpu["total_bytes"]), int(gpu["free_bytes"])
            )
            for gpu in said["gpus"]
        )
        features = {str(feature) for feature in said["features"]}
    except (TypeError, KeyError, RecursionError) as error:
        message = f"it did not describe devices: {answer[:200]!r}"
        raise ValueError(message) from error
    types: set[str] = set()
    if "REPACK" in features:
        types.update(*(names for feature, names in REPACKED_BY.items() if feature in features))
    return gpus, frozenset(types)


def own_memory(cgroup_root: Path = cgroups.ROOT, own_cgroups: Path = cgroups.OWN) -> DeviceMemory:
    """Return the machine's memory, or what control groups leave of it. Reads files; call it from a thread."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for directory, version in cgroups.levels("memory", cgroup_root, own_cgroups):
        limit, used, inactive = _MEMORY_FILES[version]
        allowed = cgroups.read_number(directory / limit)
        if allowed is None or allowed >= memory.total:
            continue
        # Pages of files that nobody touches are given back as soon as somebody needs the memory.
        unused = _statistic(directory / "memory.stat", inactive)
        taken = (cgroups.read_number(directory / used) or 0) - unused
        total, free = min(total, allowed), min(free, max(allowed - taken, 0))
    return DeviceMemory(RAM, RAM, total, free)


_MEMORY_FILES: Final = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: the files of the limit and of what is used, and the name in `memory.stat` of
pages of files that nobody uses."""


def _statistic(path: Path, name: str) -> int:
    for line in cgroups.read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isascii() and value.isdigit():
            return int(value)
    return 0
