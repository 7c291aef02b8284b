"""What reaches the build of llama.cpp: `make setup` in a copy whose interpreter and compilers are stubs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_wheel import OWN_FLAGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
SECONDS = 50
FLAGS = "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=90"

STUB_PYTHON = """\
#!{python} -S
import json, os, pathlib, sys, tarfile

class Arguments(list):
    def folder(self, flag):
        folder = pathlib.Path(self[self.index(flag) + 1])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

arguments = Arguments(sys.argv[1:])
if arguments[0] == "-c":  # whether it works, whether llama.cpp loads
    print(sys.version_info[:2])
    sys.exit()
with open({calls!r}, "a") as calls:
    print(json.dumps([arguments, os.environ.get("CMAKE_ARGS")]), file=calls)
if "download" in arguments:
    with tarfile.open(arguments.folder("--dest") / "source.tar.gz", "w:gz") as archive:
        archive.add(sys.argv[0], "llama_cpp_python/setup")
if "wheel" in arguments:
    (arguments.folder("--wheel-dir") / "llama.whl").touch()
"""


@dataclass(frozen=True, slots=True)
class Clone:
    """A copy of what the set-up reads, and what its stub interpreter was called with."""

    path: Path
    calls: Path

    def make_setup(self, *arguments: str, **environment: str) -> None:
        """Run `make setup`, and fail where it does."""
        done = subprocess.run(
            ["make", "setup", f"PYTHON={sys.executable}", *arguments],
            cwd=self.path,
            env={**plain_environment(self.path), **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def build_flags(self) -> list[list[str]]:
        """Return the CMAKE_ARGS of each build of the wheel, split as a shell does."""
        calls: list[tuple[Sequence[str], str]] = [
            json.loads(line) for line in self.calls.read_text().splitlines()
        ]
        return [shlex.split(cmake_args) for arguments, cmake_args in calls if "wheel" in arguments]


def plain_environment(clone: Path) -> Mapping[str, str]:
    """The environment without what an outer make hands on, its programs and cache in the clone."""
    outer = {"CMAKE_ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "CC", "CXX"}
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    path = os.pathsep.join([str(clone / "stubs"), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "XDG_CACHE_HOME": str(clone / "user-cache")}


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    if shutil.which("make") is None:
        pytest.skip("make is not installed, and this is a test of the Makefile")
    path = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, path)
    programs = path / ".venv" / "bin"
    programs.mkdir(parents=True)
    calls = tmp_path / "calls"
    write_program(programs / "python", STUB_PYTHON.format(python=sys.executable, calls=str(calls)))
    write_program(programs / "pip", "#!/bin/sh\n")
    (path / "stubs").mkdir()
    for name in ("cc", "c++", "cmake"):
        write_program(path / "stubs" / name, "#!/bin/sh\necho cmake version 3.30.0\n")
    return Clone(path, calls)


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def expected_flags(clone: Clone, given: str) -> list[str]:
    hook = clone.path / "scripts" / "llama_cpp.cmake"
    return [*OWN_FLAGS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={hook}", *given.split()]


def test_without_cmake_args_llama_cpp_is_compiled_for_this_processor(clone: Clone) -> None:
    clone.make_setup()

    assert clone.build_flags() == [expected_flags(clone, "")]
    assert "-DGGML_NATIVE=ON" in clone.build_flags()[0]


@pytest.mark.parametrize("as_argument", [False, True], ids=["environment", "argument of make"])
def test_cmake_args_reach_the_build_after_the_own_flags_so_that_they_win(
    clone: Clone, as_argument: bool
) -> None:
    if as_argument:
        clone.make_setup(f"CMAKE_ARGS={FLAGS}")
    else:
        clone.make_setup(CMAKE_ARGS=FLAGS)

    assert clone.build_flags() == [expected_flags(clone, FLAGS)]


def test_llama_cpp_is_compiled_again_for_other_cmake_args_and_only_then(clone: Clone) -> None:
    for environment in ({"CMAKE_ARGS": FLAGS}, {}, {"CMAKE_ARGS": FLAGS}, {"CMAKE_ARGS": ""}):
        clone.make_setup(**environment)

    assert clone.build_flags() == [expected_flags(clone, FLAGS), expected_flags(clone, "")]
