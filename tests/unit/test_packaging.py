"""The promises of pyproject.toml, held to the files they speak of."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = ("constraints.txt", "constraints-gen.txt")
STUB_ROOTS = ("clients/python/paddock", "server/paddock_server")


def stubs(pattern: str) -> list[Path]:
    return sorted(path for root in STUB_ROOTS for path in (ROOT / root).rglob(pattern))


def requirement(name: str) -> Requirement:
    wanted = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    return next(entry for entry in wanted if entry.name == name)


def floor(name: str) -> Version:
    return next(Version(part.version) for part in requirement(name).specifier if part.operator == ">=")


def locked(name: str) -> dict[str, str]:
    """The entries of a lock by package, each with its hashes; a package may stand there once per Python."""
    entries = re.split(r"^(?=\w)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {entry.split(" ", 1)[0]: entry for entry in entries if entry}


def locked_versions(name: str) -> dict[str, set[Version]]:
    versions: dict[str, set[Version]] = {}
    for pin in locked(name):
        package, _, version = pin.partition("==")
        versions.setdefault(canonicalize_name(package), set()).add(Version(version))
    return versions


def declared() -> list[Requirement]:
    project, groups = PYPROJECT["project"], PYPROJECT["dependency-groups"]
    texts = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
        *(text for group in ("build", "dev") for text in groups[group] if isinstance(text, str)),
    ]
    return [Requirement(text) for text in sorted(set(texts))]


@pytest.mark.parametrize("stub", stubs("*_pb2_grpc.py"), ids=lambda path: path.name)
def test_the_floor_of_grpcio_is_the_version_that_made_the_stubs(stub: Path) -> None:
    made_with = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub.read_text(encoding="utf-8"))

    assert made_with is not None
    assert floor("grpcio") == Version(made_with[1])


@pytest.mark.parametrize("stub", stubs("*_pb2.py"), ids=lambda path: path.name)
def test_the_range_of_protobuf_is_that_of_the_stubs(stub: Path) -> None:
    made_with = re.search(r"\n# Protobuf Python Version: ([\d.]+)\n", stub.read_text(encoding="utf-8"))
    assert made_with is not None
    generated = Version(made_with[1])
    specifier = requirement("protobuf").specifier

    # Stubs run under the major version that made them and the next one.
    assert floor("protobuf") == generated
    assert specifier.contains(f"{generated.major + 1}.99.0")
    assert not specifier.contains(f"{generated.major + 2}.0.0")


def test_there_are_stubs_to_hold_the_floors_to() -> None:
    assert {"model_manager_pb2_grpc.py"} == {path.name for path in stubs("*_pb2_grpc.py")}
    assert {"worker_pb2.py", "model_pb2.py"} < {path.name for path in stubs("*_pb2.py")}


def test_the_generator_is_locked_at_the_floors() -> None:
    versions = locked_versions("constraints-gen.txt")

    assert versions["grpcio-tools"] == {floor("grpcio")}
    assert all(version >= floor("protobuf") for version in versions["protobuf"])


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_pins_with_hashes_and_no_addresses(lock: str) -> None:
    pin = re.compile(r"[\w.-]+==[\w.+!-]+( ; [^\n\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n")

    for entry in locked(lock).values():
        assert pin.fullmatch(entry), entry
    assert "://" not in (ROOT / lock).read_text(encoding="utf-8")


@pytest.mark.parametrize("wanted", declared(), ids=str)
def test_the_lock_satisfies_every_declared_dependency(wanted: Requirement) -> None:
    versions = locked_versions("constraints.txt").get(canonicalize_name(wanted.name), set())

    assert versions, f"{wanted} is not in the lock; run `make lock`"
    assert all(wanted.specifier.contains(version) for version in versions), f"{wanted}: {versions}"


SOURCES = {
    "clients/python/paddock": [],
    "server/paddock_server": ["server"],
    "gateway/paddock_gateway": ["gateway"],
    "tests": ["server", "gateway", "dev", "build"],
    "bench": ["server", "gateway", "dev"],
}


@pytest.mark.parametrize("folder", SOURCES)
def test_what_a_folder_imports_is_declared(folder: str) -> None:
    own = {"paddock", "paddock_server", "paddock_gateway", "tests", "bench", "models"}
    own |= {path.stem for path in (ROOT / "scripts").glob("*.py")}
    declared_here = {canonicalize_name(name) for name in declared_names(SOURCES[folder])}
    providers = packages_distributions()
    modules = {name for path in (ROOT / folder).rglob("*.py") for name in imported_modules(path)}

    undeclared = {
        module
        for module in modules - own - sys.stdlib_module_names - {"_typeshed"}
        if not declared_here & {canonicalize_name(name) for name in providers.get(module, [])}
    }

    assert not undeclared


def declared_names(extras: list[str]) -> list[str]:
    optional = {**PYPROJECT["project"]["optional-dependencies"], **PYPROJECT["dependency-groups"]}
    texts = [*PYPROJECT["project"]["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text).name for text in texts if isinstance(text, str)]


def imported_modules(path: Path) -> Iterator[str]:
    """Top-level names of what a file imports when it is imported; functions may look for what is optional."""
    pending: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    while pending:
        match pending.pop():
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module)):
                yield module.partition(".")[0]
            case ast.If(body=body, orelse=orelse) | ast.Try(body=body, orelse=orelse):
                pending += [*body, *orelse]
            case _:
                pass


def test_the_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert headings[0] == "Unreleased"
    released = headings[1:]
    assert not released or released[0] == PYPROJECT["project"]["version"]


def test_the_demo_model_is_in_the_package() -> None:
    files = WheelBuilder(str(ROOT)).recurse_included_files()

    assert "paddock_server/demo/foal.gguf" in {file.distribution_path for file in files}
