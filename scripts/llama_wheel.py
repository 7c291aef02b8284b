"""Compiles llama-cpp-python from its source distribution for this machine, and keeps the wheel.

The wheel goes to a cache outside the clone, so that a second clone or a rebuilt `.venv` takes seconds. A
compile that was interrupted goes on where it stopped: sources and objects stay under .cache/llama until the
wheel is made. Standard library only.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from steps import CACHE, ROOT, StepError, fingerprint, say
from venvs import Environment, split_lock

PACKAGE = "llama-cpp-python"
LOCK = ROOT / "constraints.txt"
CMAKE_HOOK = ROOT / "scripts" / "llama_cpp.cmake"
WORK = CACHE / "llama"

CMAKE_OLDEST = (3, 21)
BYTES_PER_COMPILER = 800_000_000
"""The largest file takes 430 MiB in g++ 12; nvcc takes more, and something must be left for the rest."""

# The bindings load without the multimodal library. What the user passes comes after and wins:
# CMAKE_ARGS=-DLLAVA_BUILD=ON brings it back.
OWN_FLAGS = ("-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF")
COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "LDFLAGS")


def build_key(cmake_args: str) -> str:
    """Fingerprint of all that decides what is compiled: version, flags, and the processor it is for."""
    locked, _ = split_lock(LOCK.read_text(encoding="utf-8"), PACKAGE)
    variables = [f"{name}={os.environ.get(name, '')}" for name in COMPILER_VARIABLES]
    return fingerprint(
        locked, *OWN_FLAGS, cmake_args, *variables, CMAKE_HOOK, _processor(), *platform.libc_ver()
    )


def cached_wheel(key: str) -> Path | None:
    """The wheel compiled earlier on this machine, if it is still there."""
    return next(iter(sorted(_wheel_folder(key).glob("*.whl"))), None)


def forget(wheel: Path) -> None:
    """Drops a wheel that does not work here (any more: a system library may have gone since)."""
    shutil.rmtree(wheel.parent, ignore_errors=True)


def compile_wheel(environment: Environment, key: str, cmake_args: str) -> Path:
    """Downloads, unpacks and compiles; gives the wheel.

    Raises:
        StepError: The download or the build failed.
    """
    source = _unpacked_source(environment)
    jobs = _jobs()
    say(f"compiling llama.cpp for this processor, {jobs} files at once; this takes minutes, once per machine")
    if cmake_args:
        say(f"  with CMAKE_ARGS={cmake_args}")
    say(f"  what the compilers say goes to {environment.logs.relative_to(ROOT)}/llama-compile.log")
    flags = [*OWN_FLAGS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={CMAKE_HOOK}"]
    made, objects = WORK / "wheel", WORK / f"objects-{key}"
    shutil.rmtree(made, ignore_errors=True)
    environment.pip(
        "compiling llama.cpp",
        # pip would keep the wheel by the path of the source, and give it back for other flags.
        [
            *("wheel", "--verbose", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
            *("--wheel-dir", made, source),
        ],
        log="llama-compile.log",
        env={
            "CMAKE_ARGS": f"{shlex.join(flags)} {cmake_args}".strip(),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
            # llama.cpp asks git for its commit; without a ceiling it would find this repository's.
            "GIT_CEILING_DIRECTORIES": str(WORK),
            "SKBUILD_BUILD_DIR": str(objects),
            # The package holds the libraries; a second copy and C headers in site-packages serve nobody.
            "SKBUILD_WHEEL_EXCLUDE": "lib/**;include/**",
        },
        progress=_ninja_progress,
    )
    wheel = _keep(next(made.glob("*.whl")), key)
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(objects, ignore_errors=True)
    return wheel


def check_toolchain() -> None:
    """Says in one sentence which tool a compile would miss, before minutes are spent.

    Raises:
        StepError: No C or C++ compiler, no cmake, or one too old.
    """
    for variable, names, what in (
        ("CC", ("cc", "gcc", "clang"), "C"),
        ("CXX", ("c++", "g++", "clang++"), "C++"),
    ):
        wanted = shlex.split(os.environ.get(variable, ""))[:1] or names
        if not any(map(shutil.which, wanted)):
            msg = (
                f"there is no {what} compiler ({', '.join(wanted)}), and llama.cpp is compiled from source. "
                "On Debian and Ubuntu: sudo apt install build-essential. On Fedora: dnf install gcc-c++. "
                "On macOS: xcode-select --install."
            )
            raise StepError(msg)
    version = _cmake_version()
    if version < CMAKE_OLDEST:
        found = f"cmake is {'.'.join(map(str, version))}" if version else "there is no cmake"
        msg = (
            f"{found}, and llama.cpp needs {'.'.join(map(str, CMAKE_OLDEST))} or newer. On Debian, Ubuntu: "
            "sudo apt install cmake. On macOS: brew install cmake. Anywhere: pip install cmake."
        )
        raise StepError(msg)


def _cmake_version() -> tuple[int, ...]:
    """Major and minor version of the cmake on PATH; empty when there is none."""
    try:
        said = subprocess.run(["cmake", "--version"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return ()
    match = re.search(r"(\d+)\.(\d+)", said.stdout)
    return (int(match[1]), int(match[2])) if match else ()


def _unpacked_source(environment: Environment) -> Path:
    locked, _ = split_lock(LOCK.read_text(encoding="utf-8"), PACKAGE)
    source = WORK / f"source-{fingerprint(locked)}"
    if source.exists():
        return source
    download = WORK / "download"
    download.mkdir(parents=True, exist_ok=True)
    requirement = download / "requirement.txt"
    requirement.write_text(locked, encoding="utf-8")
    say("downloading the source of llama.cpp and its Python bindings (73 MiB)")
    environment.pip(
        "downloading llama-cpp-python",
        [
            *("download", "--require-hashes", "--no-deps", "--no-binary", PACKAGE, "--no-build-isolation"),
            *("--dest", download, "--requirement", requirement),
        ],
        log="llama-download.log",
    )
    partial = WORK / "unpacking"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(next(download.glob("*.tar.gz"))) as archive:
        # `filter` came with 3.11.4; the archive's hash has been checked either way.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(partial, filter="data")
        else:
            archive.extractall(partial)  # noqa: S202
    next(partial.iterdir()).rename(source)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(download, ignore_errors=True)
    return source


def _keep(wheel: Path, key: str) -> Path:
    """Moves a wheel to the machine's cache, or leaves it in the clone where that cannot be written."""
    folder = _wheel_folder(key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{wheel.name}.{os.getpid()}.partial"
        shutil.copyfile(wheel, partial)
        partial.replace(folder / wheel.name)
    except OSError as err:
        say(f"the compiled wheel cannot be kept for other clones: {err}")
        return wheel
    shutil.rmtree(wheel.parent)
    return folder / wheel.name


def _wheel_folder(key: str) -> Path:
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "paddock" / "wheels" / key


def _processor() -> str:
    """What native code depends on: the architecture and the instruction sets of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {name.strip(): value.strip() for name, value in told.items()}
    features = named.get("flags") or named.get("Features") or platform.processor()
    return " ".join([sys.platform, platform.machine(), *sorted(features.split())])


def _jobs() -> int:
    """Compilers at once: one per usable core, and no more than memory holds."""
    told = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // BYTES_PER_COMPILER))


def _ninja_progress(line: str) -> str | None:
    match = re.match(r"\s*\[(\d+)/(\d+)\]", line)
    return f"{match[1]} of {match[2]} files" if match else None
