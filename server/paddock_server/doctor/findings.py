"""What facts about a machine mean. Pure: every judgement is a function of values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from paddock.sizes import size_text
from paddock_server.memory import DeviceMemory


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well as it could, or not for long."""
    PROBLEM = "problem"
    """Something will not work until it is changed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    area: str
    level: Level
    message: str
    """What was seen."""
    advice: str = ""
    """What to do about it; empty when nothing has to be done."""


def ok(area: str, message: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(area, Level.OK, message)


def warning(area: str, message: str, advice: str) -> Finding:
    """Return a finding that deserves a look."""
    return Finding(area, Level.WARNING, message, advice)


def problem(area: str, message: str, advice: str) -> Finding:
    """Return a finding that keeps something from working."""
    return Finding(area, Level.PROBLEM, message, advice)


GIB: Final = 2**30

LOW_DISK_BYTES: Final = 5 * GIB
"""Less free space than most quantised models take."""

FULL_DISK_BYTES: Final = 64 * 2**20

LOW_MEMORY_BYTES: Final = GIB

LOW_FILE_LIMIT: Final = 1024
"""Descriptors: a connection and a worker take a few each."""

CPU_FEATURES: Final[Mapping[str, str]] = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx512f": "AVX512",
    "asimd": "NEON",
}
"""Flags of /proc/cpuinfo whose lack in a build costs speed, and llama.cpp's names for them."""

REBUILD: Final = (
    "Compile it for this machine: `make setup` in a clone, elsewhere pip install --force-reinstall --no-deps "
    "--no-cache-dir --no-binary llama-cpp-python, and the version."
)


def counted(count: int, what: str) -> str:
    """Return `1 model`, `2 models`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _free_text(free: int, total: int) -> str:
    return f"{size_text(free)} of {size_text(total)} free"


@dataclass(frozen=True, slots=True)
class Versions:
    """What is installed. None is not."""

    python: str
    paddock: str
    grpcio: str
    llama_cpp: str | None
    llama_cpp_wanted: str | None
    """The version Paddock is made for. Builds of it may have a label, such as `+cu124`."""


def judge_versions(versions: Versions) -> list[Finding]:
    """Judge what is installed."""
    area = "versions"
    found = [ok(area, f"paddock {versions.paddock}, Python {versions.python}, grpcio {versions.grpcio}")]
    if versions.llama_cpp is None:
        found.append(
            problem(
                area,
                "llama-cpp-python is not installed; no model can be loaded",
                "pip install 'paddock[server]'",
            )
        )
    elif versions.llama_cpp_wanted not in {None, versions.llama_cpp.partition("+")[0]}:
        found.append(
            problem(
                area,
                f"llama-cpp-python {versions.llama_cpp} is installed; "
                f"this Paddock is made for {versions.llama_cpp_wanted}",
                f"pip install 'llama-cpp-python=={versions.llama_cpp_wanted}'",
            )
        )
    else:
        found.append(ok(area, f"llama-cpp-python {versions.llama_cpp}"))
    return found


@dataclass(frozen=True, slots=True)
class Build:
    """What llama.cpp says about itself, and what the machine has."""

    system_info: str
    gpu_offload: bool
    gpus: tuple[DeviceMemory, ...]
    cpu_flags: frozenset[str]
    """Of /proc/cpuinfo; empty where there is none."""
    gpu_hardware: tuple[str, ...]
    """Accelerators the operating system shows, for example `NVIDIA`."""


def features_of(system_info: str) -> dict[str, tuple[str, ...]]:
    """Return the features by backend that llama.cpp's line names: `CPU : AVX = 1 | AVX2 = 1 | `."""
    features: dict[str, list[str]] = {}
    backend = ""
    for part in system_info.split("|"):
        match = re.fullmatch(r"\s*(?:(\S+)\s*:\s*)?(\S+)\s*=\s*(\S+)\s*", part)
        if match is None:
            continue
        backend = match[1] or backend
        if match[3] != "0":
            name = match[2] if match[3] == "1" else f"{match[2]}={match[3]}"
            features.setdefault(backend, []).append(name)
    return {backend: tuple(names) for backend, names in features.items()}


def judge_build(build: Build) -> list[Finding]:
    """Judge how llama.cpp was compiled, beside the machine it runs on."""
    area = "llama.cpp"
    features = features_of(build.system_info)
    found = [ok(area, f"{backend}: {' '.join(names)}") for backend, names in features.items()]
    if not found:
        found.append(ok(area, f"loads; says about itself: {build.system_info.strip() or 'nothing'}"))
    wanted = {name for flag, name in CPU_FEATURES.items() if flag in build.cpu_flags}
    missing = sorted(wanted - set(features.get("CPU", ())))
    if missing and "CPU" in features:
        message = f"this processor has {' '.join(missing)}, which llama.cpp was built without"
        found.append(warning(area, message, REBUILD))
    if build.gpus:
        found += [
            ok(
                "gpu",
                f"{gpu.name}: {gpu.description}, {_free_text(gpu.free_bytes, gpu.total_bytes)}",
            )
            for gpu in build.gpus
        ]
    elif build.gpu_hardware and not build.gpu_offload:
        advice = (
            'Build it with a backend, for example CMAKE_ARGS="-DGGML_CUDA=on" (NVIDIA), '
            '"-DGGML_HIP=on" (AMD) or "-DGGML_VULKAN=on".'
        )
        names = ", ".join(build.gpu_hardware)
        found.append(warning("gpu", f"there is a GPU ({names}); llama.cpp cannot use it", advice))
    elif build.gpu_hardware:
        message = (
            f"there is a GPU ({', '.join(build.gpu_hardware)}), and llama.cpp, built for one, finds none"
        )
        advice = (
            "Check that its driver works (nvidia-smi, rocminfo), that nothing hides it "
            "(CUDA_VISIBLE_DEVICES), and that llama.cpp is built for its kind."
        )
        found.append(warning("gpu", message, advice))
    else:
        found.append(ok("gpu", "none; models run on the processor"))
    return found


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processors this process may use."""

    logical: int
    physical: int | None
    allowed: int
    """Of the affinity mask."""
    quota: float | None
    """Processors' worth of time a cgroup allows; None without a limit."""


def judge_cpu(cpu: Cpu, threads: int) -> list[Finding]:
    """Judge the processors, beside `--threads`."""
    area = "cpu"
    usable = min(float(cpu.allowed), cpu.quota or float(cpu.allowed))
    physical = f", {cpu.physical} physical" if cpu.physical else ""
    limits = f", {usable:g} of them usable" if usable < cpu.logical else ""
    found = [ok(area, f"{cpu.logical} logical cores{physical}{limits}")]
    wanted = threads or min(cpu.physical or cpu.logical, cpu.allowed)  # as a worker chooses
    fitting = max(1, int(usable))
    if wanted > fitting:
        setting = f"--threads is {threads}" if threads else f"a worker starts {wanted} threads by default"
        found.append(
            warning(
                area,
                f"{setting}, and {usable:g} cores are usable: each step waits for threads that are held back",
                f"Set --threads {fitting}.",
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM."""

    total: int
    available: int
    limit: int | None
    """Of a cgroup; None without one."""

    @property
    def allowed(self) -> int:
        """Bytes that may be used of it."""
        return self.total if self.limit is None else min(self.total, self.limit)


def judge_memory(memory: Memory) -> list[Finding]:
    """Judge the RAM."""
    area = "memory"
    total = memory.total if memory.limit is None else min(memory.total, memory.limit)
    limited = (
        f" (the limit of a cgroup; the machine has {size_text(memory.total)})" if total < memory.total else ""
    )
    found = [ok(area, f"{size_text(total)}{limited}, {size_text(memory.available)} available")]
    if memory.available < LOW_MEMORY_BYTES:
        advice = "Stop other programs, or unload models: a model that does not fit is killed while it loads."
        found.append(warning(area, f"only {size_text(memory.available)} are available", advice))
    return found


UNLIMITED: Final = -1


def judge_limits(files: int, locked_bytes: int) -> list[Finding]:
    """Judge the limits of a process: open files and locked bytes, `UNLIMITED` for none."""
    area = "limits"
    found: list[Finding] = []
    files_text = "any number of" if files == UNLIMITED else str(files)
    if files != UNLIMITED and files < LOW_FILE_LIMIT:
        message = f"a process may open {files} files; a busy server needs more"
        found.append(warning(area, message, f"ulimit -n {4 * LOW_FILE_LIMIT}, or LimitNOFILE= in systemd"))
    else:
        found.append(ok(area, f"{files_text} open files"))
    # Paddock locks nothing: a small limit keeps nothing from working.
    locked = "unlimited" if locked_bytes == UNLIMITED else size_text(locked_bytes)
    found.append(ok(area, f"locked memory: {locked}"))
    return found


MODELS: Final = "models"
STATE: Final = "state"
HUB_CACHE: Final = "hub cache"


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that something of ours lies on."""

    holds: tuple[str, ...]
    """What lies there: MODELS, STATE, HUB_CACHE."""
    path: str
    free_bytes: int
    total_bytes: int


def judge_disks(disks: Sequence[Disk]) -> list[Finding]:
    """Judge free space, where something is written: the hub's cache, and a little state. What only holds
    models may be full, or read-only."""
    found: list[Finding] = []
    for disk in disks:
        what = f"{_free_text(disk.free_bytes, disk.total_bytes)} at {disk.path}"
        what += f" ({', '.join(disk.holds)})"
        if disk.free_bytes < FULL_DISK_BYTES and {STATE, HUB_CACHE} & set(disk.holds):
            found.append(problem("disk", what, "Make room: nothing can be remembered or downloaded."))
        elif disk.free_bytes < LOW_DISK_BYTES and HUB_CACHE in disk.holds:
            found.append(warning("disk", what, "Make room before you download a model."))
        else:
            found.append(ok("disk", what))
    return found


CONFIG_AREA: Final = "config"

NAMED_MODELS: Final = 20
"""Broken models that are named one by one."""


@dataclass(frozen=True, slots=True)
class Models:
    """What the model directories hold, and what the configuration files say of it."""

    directories: tuple[str, ...]
    count: int
    broken: Mapping[str, str]
    """Why a model cannot be loaded, by id."""
    largest_bytes: int
    absent: int = 0
    """Models among them that are still to be downloaded."""
    files: tuple[str, ...] = ()
    """The configuration files."""
    left_out: tuple[str, ...] = ()
    """What is wrong in them, with file and line, so that it was left out."""


def judge_config(models: Models) -> list[Finding]:
    """Judge the configuration files; nothing where there are none."""
    if not models.left_out:
        return [ok(CONFIG_AREA, f"{file} is sound") for file in models.files]
    advice = "Correct it: what is wrong is left out, and the rest holds."
    return [warning(CONFIG_AREA, sentence, advice) for sentence in models.left_out]


def judge_invalid_config(sentences: Sequence[str]) -> list[Finding]:
    """Judge what keeps a server with these settings from starting."""
    return [problem(CONFIG_AREA, sentence, "Correct it: no server starts with it.") for sentence in sentences]


def judge_models(models: Models, memory_bytes: int) -> list[Finding]:
    """Judge what there is to load, beside the memory that may be used."""
    area = "models"
    where = ", ".join(models.directories)
    usable = models.count - len(models.broken) - models.absent
    found: list[Finding] = []
    if usable:
        found.append(ok(area, f"{usable} usable in {where}"))
    else:
        advice = "Put a GGUF file there, or name another directory with --models-dir."
        found.append(warning(area, f"none usable in {where}", advice))
    if models.absent:
        absent = counted(models.absent, "model")
        found.append(ok(area, f"{absent} of the configuration still to be downloaded"))
    if models.largest_bytes > memory_bytes:
        message = f"the largest has {size_text(models.largest_bytes)}, more than the memory there is"
        found.append(warning(area, message, "Take a smaller quantisation, or offload layers to a GPU."))
    advice = "Replace or remove the file; the others are served without it."
    found += [
        warning(area, f"{id_!r} cannot be loaded: {why}", advice)
        for id_, why in sorted(models.broken.items())[:NAMED_MODELS]
    ]
    rest = len(models.broken) - NAMED_MODELS
    if rest > 0:
        found.append(warning(area, f"{rest} more cannot be loaded", "`paddock ls` shows them all."))
    return found


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Where the server remembers what is loaded."""

    path: str
    fault: str = ""
    """Why it cannot be written; empty when it can."""


def judge_state(state: StateDirectory | None) -> Finding:
    """Judge the state directory; None is turned off."""
    if state is None:
        return ok("state", "off: loads are not remembered over a restart")
    if state.fault:
        advice = "Make it writable, name another with --state-dir, or turn it off with --state-dir ''."
        return problem("state", f"{state.path} cannot be written: {state.fault}", advice)
    return ok("state", f"{state.path} is writable")


@dataclass(frozen=True, slots=True)
class Hub:
    """Settings of huggingface_hub. Never holds the token."""

    endpoint: str
    offline: bool
    cache: str
    cache_fault: str
    """Why the cache cannot be written; empty when it can."""
    token_from: str
    """Where a token comes from; empty without one."""


def judge_hub(hub: Hub | None) -> list[Finding]:
    """Judge the settings downloads go by; None: its models are not served."""
    area = "hub"
    if hub is None:
        return [ok(area, "off: its models are neither served nor downloaded")]
    token = f"a token from {hub.token_from}" if hub.token_from else "no token"
    mode = "offline mode" if hub.offline else "not asked whether it answers"
    found: list[Finding] = []
    if re.match(r"https?://[^/]", hub.endpoint):
        found.append(ok(area, f"{hub.endpoint}, {mode}, {token}"))
    else:
        message = f"HF_ENDPOINT is {hub.endpoint!r}, which is no address"
        found.append(problem(area, message, "Set it to https://..., or unset it."))
    if hub.cache_fault:
        advice = "Make it writable, or name another with HF_HUB_CACHE."
        found.append(warning(area, f"the cache {hub.cache} cannot be written: {hub.cache_fault}", advice))
    else:
        found.append(ok(area, f"cache {hub.cache}"))
    return found
