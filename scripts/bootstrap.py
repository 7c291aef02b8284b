"""Sets the repository up in .venv: the locked packages, llama.cpp compiled for this machine, paddock itself.

`make setup` runs it, and so does every target that needs the environment. Each step leaves a stamp with the
fingerprint of what it was made from, so a second run does nothing, a changed input repeats its own step only,
and an interrupted run goes on where it stopped. Standard library only.
"""

from __future__ import annotations

import interrupts

# isort: split
import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator

import llama_wheel
from steps import CACHE, DISK_FULL, ROOT, VENV, StepError, elapsed, fail, fingerprint, say
from venvs import Environment, split_lock

FREE_BYTES_NEEDED = 2 * 2**30
"""The environment takes 670 MiB, sources 220, objects 30 (with CUDA 480), pip's cache the rest."""
LOCK_WAIT_S = 1800.0
"""Longer than a cold set-up on a slow machine; another set-up that takes longer is stuck."""
IMPORT_CHECK = "import llama_cpp; llama_cpp.llama_print_system_info()"


def main() -> None:
    environment = Environment(VENV, CACHE / "logs")
    cmake_args = wanted_cmake_args(environment)
    try:
        interrupts.raise_from_now_on()
        if is_ready(environment, cmake_args):
            return
        with alone():
            started = time.monotonic()
            set_up(environment, cmake_args)
            say(f"ready after {elapsed(time.monotonic() - started)}")
    except StepError as err:
        fail(err)
    except OSError as err:
        if err.errno != errno.ENOSPC:
            raise
        fail(StepError(DISK_FULL))
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped.")
        interrupts.leave()


def wanted_cmake_args(environment: Environment) -> str:
    """CMAKE_ARGS as given; where it is not set at all, those of the last set-up: `make run` keeps them."""
    given = os.environ.get("CMAKE_ARGS")
    return environment.stamps().get("cmake_args", "") if given is None else given.strip()


def keys(cmake_args: str) -> dict[str, str]:
    """The fingerprint each step has when it is up to date."""
    return {
        "packages": fingerprint(llama_wheel.LOCK, sys.version),
        "llama": llama_wheel.build_key(cmake_args),
        "project": fingerprint(ROOT / "pyproject.toml", str(ROOT), sys.version),
    }


def is_ready(environment: Environment, cmake_args: str) -> bool:
    """Whether nothing is left to do."""
    return (
        all(environment.is_done(step, key) for step, key in keys(cmake_args).items()) and environment.works()
    )


def set_up(environment: Environment, cmake_args: str) -> None:
    """Does the steps that are not done yet, each after those it stands on."""
    wanted = keys(cmake_args)
    check_prerequisites(environment, wanted)
    if not environment.works():
        say(f"making a virtual environment in {environment.path.relative_to(ROOT)}")
        environment.create()
    if not environment.is_done("packages", wanted["packages"]):
        install_packages(environment)
        environment.mark_done(packages=wanted["packages"])
    if not environment.is_done("llama", wanted["llama"]):
        install_llama(environment, wanted["llama"], cmake_args)
        environment.mark_done(llama=wanted["llama"], cmake_args=cmake_args)
    if not environment.is_done("project", wanted["project"]):
        install_project(environment)
        environment.mark_done(project=wanted["project"])


def check_prerequisites(environment: Environment, wanted: dict[str, str]) -> None:
    """Says what is missing on the machine before minutes are spent.

    Raises:
        StepError: A compiler or cmake is missing for a compile that is due, or the disk is too full.
    """
    key = wanted["llama"]
    if not environment.is_done("llama", key) and llama_wheel.cached_wheel(key) is None:
        llama_wheel.check_toolchain()
    free = shutil.disk_usage(ROOT).free
    if free < FREE_BYTES_NEEDED and not environment.is_done("packages", wanted["packages"]):
        there, needed = (f"{count / 2**30:.1f} GiB" for count in (free, FREE_BYTES_NEEDED))
        msg = f"{there} are free on the disk of {ROOT}, and the set-up needs {needed}."
        raise StepError(msg)


def install_packages(environment: Environment) -> None:
    """Everything in the lock but llama-cpp-python, which is compiled apart."""
    say("installing the packages the lock names")
    _, others = split_lock(llama_wheel.LOCK.read_text(encoding="utf-8"), llama_wheel.PACKAGE)
    requirements = CACHE / "packages.txt"
    requirements.write_text(others, encoding="utf-8")
    environment.install_locked("installing packages", requirements, log="packages.log")


def install_llama(environment: Environment, key: str, cmake_args: str) -> None:
    wheel = llama_wheel.cached_wheel(key)
    if wheel is not None:
        say("installing llama.cpp as compiled on this machine before")
        if install_wheel(environment, wheel):
            return
        say("  it does not load any more, so it is compiled again")
        llama_wheel.forget(wheel)
    wheel = llama_wheel.compile_wheel(environment, key, cmake_args)
    if not install_wheel(environment, wheel):
        msg = f"llama.cpp was compiled but does not load; `{environment.python} -c 'import llama_cpp'` tells"
        raise StepError(msg)


def install_wheel(environment: Environment, wheel: os.PathLike[str]) -> bool:
    """Installs a compiled wheel; whether its libraries load."""
    environment.pip(
        "installing llama.cpp",
        ["install", "--no-index", "--no-deps", "--force-reinstall", str(wheel)],
        log="llama-install.log",
    )
    check = subprocess.run(
        [environment.python, "-c", IMPORT_CHECK], capture_output=True, timeout=120, check=False
    )
    return check.returncode == 0


def install_project(environment: Environment) -> None:
    say("installing paddock itself, so that changes to the sources take effect at once")
    environment.pip(
        "installing paddock",
        [
            "install",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--editable",
            f"{ROOT}[server,gateway]",
        ],
        log="project.log",
    )


@contextlib.contextmanager
def alone() -> Generator[None]:
    """Holds the set-up lock of this clone; two terminals at once would install over each other."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w", encoding="utf-8") as lock:
        deadline = time.monotonic() + LOCK_WAIT_S
        told = False
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                msg = "another set-up of this clone has been running for half an hour; end it and try again."
                raise StepError(msg)
            if not told:
                say("waiting for another set-up of this clone to end")
                told = True
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
