"""Facts about this machine and this installation. Everything here may block; `examine` bounds it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from paddock_server.addresses import without_credentials
from paddock_server.catalog import Catalog
from paddock_server.config import default_hub_cache
from paddock_server.doctor.findings import (
    UNLIMITED,
    Build,
    Cpu,
    Disk,
    Hub,
    Memory,
    Models,
    StateDirectory,
    Versions,
)
from paddock_server.memory import cgroups, own_memory
from paddock_server.memory.machine import PROBE_COMMAND, parsed_answer
from paddock_server.supervisor import worker_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from paddock_server.config import ServerConfig

PROBE_SECONDS: Final = 20.0
"""For a child that loads llama.cpp: less than a probe of the examination may take."""

_GPU_TRACES: Final[Mapping[str, str]] = {
    "/proc/driver/nvidia/gpus": "NVIDIA",
    "/dev/nvidia0": "NVIDIA",
    "/dev/kfd": "AMD",
}
"""Files the drivers of accelerators make."""


class LlamaError(Exception):
    """llama.cpp cannot be loaded; the message says how that ended."""


def versions() -> Versions:
    """Return what is installed."""
    return Versions(
        python=".".join(str(part) for part in sys.version_info[:3]),
        paddock=metadata.version("paddock"),
        grpcio=metadata.version("grpcio"),
        llama_cpp=_version_of("llama-cpp-python"),
        llama_cpp_wanted=_pinned(metadata.requires("paddock") or (), "llama-cpp-python"),
    )


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pinned(requirements: Iterable[str], name: str) -> str | None:
    """Return the one version a requirement allows; None without such a pin."""
    for requirement in requirements:
        match = re.match(rf"{re.escape(name)}\s*==\s*([^\s;,]+)", requirement)
        if match is not None:
            return match[1]
    return None


def build(command: Sequence[str] = PROBE_COMMAND) -> Build:
    """Ask a child process what llama.cpp is, and what it can compute on: the one the server asks.

    Raises:
        LlamaError: it does not load, or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
            env=worker_environment(os.environ, {}),
        )
    except subprocess.TimeoutExpired as error:
        message = f"loading it took longer than {PROBE_SECONDS:g} s"
        raise LlamaError(message) from error
    try:
        gpus, _ = parsed_answer(done.stdout)
        said: dict[str, Any] = json.loads(done.stdout)
        system_info, gpu_offload = str(said["system_info"]), bool(said["gpu_offload"])
    except (ValueError, KeyError) as error:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        message = f"loading it ended with {ended}: {lines[-1][:400]}"
        raise LlamaError(message) from error
    return Build(
        system_info=system_info,
        gpu_offload=gpu_offload,
        gpus=gpus,
        cpu_flags=_cpu_flags(),
        gpu_hardware=tuple(sorted({name for path, name in _GPU_TRACES.items() if Path(path).exists()})),
    )


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def cpu() -> Cpu:
    """Return the processors this process may use."""
    logical = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    return Cpu(
        logical=logical,
        physical=psutil.cpu_count(logical=False),
        allowed=len(affinity(0)) if affinity is not None else logical,
        quota=cgroups.cpu_quota(),
    )


def memory() -> Memory:
    """Return the RAM this process may use."""
    machine, own = psutil.virtual_memory().total, own_memory()
    return Memory(machine, own.free_bytes, own.total_bytes if own.total_bytes < machine else None)


def limits() -> tuple[int, int]:
    """Return the soft limits of open files and of locked bytes, `UNLIMITED` for none."""
    values = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    files, locked = (UNLIMITED if value == resource.RLIM_INFINITY else value for value in values)
    return files, locked


def models(config: ServerConfig) -> Models:
    """Return what the directories hold, under what the configuration files say of it.

    Raises:
        CatalogError: a directory cannot be listed.
        InvalidConfigError: a configuration file does not validate.
    """
    directories, cache = config.model_directories, config.hub_cache
    catalog = Catalog(
        directories, preset=config.models_preset, config_file=config.config_file, hub_cache=cache
    )
    entries = catalog.scan(reread=True).values()  # a reload names every problem, a start only the first kind
    places = (*directories, cache) if cache is not None and cache.is_dir() else directories
    return Models(
        directories=tuple(str(place) for place in places),
        count=len(entries),
        absent=sum(entry.absent is not None for entry in entries),
        broken={entry.id: entry.problem.message for entry in entries if entry.problem is not None},
        largest_bytes=max((entry.size_bytes for entry in entries if entry.problem is None), default=0),
        files=tuple(str(path) for path in (config.config_file, config.models_preset) if path is not None),
        left_out=tuple(str(problem) for problem in catalog.problems),
    )


def state_directory(path: Path | None) -> StateDirectory | None:
    """Return whether the state directory can be written; None when it is turned off."""
    return None if path is None else StateDirectory(str(path), write_fault(path))


def write_fault(directory: Path) -> str:
    """Return why files cannot be made in a directory, or empty. Where there is none yet, in the nearest one
    above, which it would be made in. Leaves nothing behind."""
    existing = nearest(directory)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        where = "" if existing == directory else f"{existing}: "
        return f"{where}{error.strerror or error}"


def nearest(path: Path) -> Path:
    """Return the path, or the nearest one above that exists."""
    path = path.absolute()
    return next((level for level in (path, *path.parents) if _exists(level)), path)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:  # also when somebody else's directory is in between
        return False
    return True


def disks(places: Iterable[tuple[str, Path]]) -> list[Disk]:
    """Return the file systems that places, with what they hold, lie on; each once."""
    found: dict[int, Disk] = {}
    for holds, path in places:
        existing = nearest(path)
        device = existing.stat().st_dev
        known = found.get(device)
        if known is None:
            usage = shutil.disk_usage(existing)
            found[device] = Disk((holds,), str(existing), usage.free, usage.total)
        elif holds not in known.holds:
            found[device] = Disk((*known.holds, holds), known.path, known.free_bytes, known.total_bytes)
    return list(found.values())


def hub() -> Hub:
    """Return the settings of huggingface_hub. The token itself is not looked at."""
    from huggingface_hub import constants

    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    file = Path(constants.HF_TOKEN_PATH)
    return Hub(
        endpoint=without_credentials(constants.ENDPOINT),
        offline=constants.HF_HUB_OFFLINE,
        cache=str(default_hub_cache()),
        cache_fault=write_fault(default_hub_cache()),
        token_from=variable or (str(file) if file.is_file() else ""),
    )
