"""Makes the checked-in stubs from the files under protos/, or checks that making them again changes nothing.

    python scripts/gen_protos.py            write the Python stubs, and the Go stubs where Go is installed
    python scripts/gen_protos.py --check    compare instead of writing; status 1 and a diff where they differ

The Python generator lives in an environment of its own: stubs run on every runtime that is at least as new as
the generator that made them, so the generator stays at the floors `pyproject.toml` promises while the
development environment moves on (docs/adr/0004). Standard library only.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steps import CACHE, ROOT, VENV, StepError, fail, fingerprint, run, say
from tools import lacking_go
from venvs import Environment, bin_path

PROTOS = ROOT / "protos"
GENERATOR_LOCK = ROOT / "constraints-gen.txt"
LOGS = CACHE / "logs"
SHOWN_DIFF_LINES = 60


@dataclass(frozen=True)
class PythonStubs:
    """One proto package tree and the source root its stubs are written to."""

    package: str
    source_root: str


PYTHON_STUBS = (
    PythonStubs("paddock", "clients/python"),
    PythonStubs("paddock_server", "server"),
)
GO_STUBS = "clients/go/paddock"


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes or checks the checked-in stubs.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the checked-in stubs, write nothing"
    )
    check: bool = parser.parse_args().check
    try:
        with tempfile.TemporaryDirectory(prefix="paddock-gen-") as made:
            differing = compare_or_write(generate(Path(made)), Path(made), check=check)
    except StepError as err:
        fail(err)
    if check and differing:
        say(f"{differing} checked-in stubs differ from what protos/ gives; `make gen` writes them anew")
        sys.exit(1)
    if check:
        say("making the stubs again changes nothing")
    else:
        say(f"{differing} stub files changed")


def generate(out: Path) -> list[str]:
    """Writes every stub under `out` as it lies in the repository; gives the folders that hold stubs."""
    generator = generator_environment()
    folders: list[str] = []
    for stubs in PYTHON_STUBS:
        generate_python(generator, stubs, out / stubs.source_root)
        folders += sorted(
            f"{stubs.source_root}/{proto.parent.relative_to(PROTOS)}" for proto in proto_files(stubs.package)
        )
    if lacking := lacking_go():
        say(f"{lacking}: the Go stubs are left as they are (https://go.dev/doc/install)")
    else:
        generate_go(out)
        folders.append(GO_STUBS)
    return list(dict.fromkeys(folders))


def generator_environment() -> Environment:
    """The environment that holds protoc and its Python plugins, made when the lock has changed."""
    generator = Environment(CACHE / "gen-venv", LOGS)
    key = fingerprint(GENERATOR_LOCK, sys.version)
    if not generator.is_done("packages", key) or not generator.works():
        say("installing the stub generator (once; it has an environment of its own)")
        generator.create()
        generator.install_locked("installing the stub generator", GENERATOR_LOCK, log="gen-venv.log")
        generator.mark_done(packages=key)
    return generator


def generate_python(generator: Environment, stubs: PythonStubs, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    run(
        f"generating {stubs.source_root}",
        [
            *(generator.python, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"),
            *(f"--python_out={out}", f"--mypy_out=quiet:{out}"),
            *(f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"),
            *(proto.relative_to(PROTOS) for proto in proto_files(stubs.package)),
        ],
        log=LOGS / f"gen-{stubs.package}.log",
        env={"PATH": bin_path(generator)},
    )
    # The plugins write a gRPC module for every file; one without a service holds nothing.
    for proto in proto_files(stubs.package):
        if "\nservice " not in proto.read_text(encoding="utf-8"):
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (out / proto.relative_to(PROTOS).with_name(proto.stem + suffix)).unlink()


def generate_go(out: Path) -> None:
    run(
        "generating clients/go",
        [VENV / "bin" / "buf", "generate", "--template", "buf.gen.go.yaml", "--output", out],
        log=LOGS / "gen-go.log",
    )


def proto_files(package: str) -> list[Path]:
    return sorted((PROTOS / package).rglob("*.proto"))


def compare_or_write(folders: list[str], made: Path, *, check: bool) -> int:
    """Counts the stubs that differ between `made` and the repository; writes them there unless checking."""
    differing = 0
    for name in sorted({*stub_files(made, folders), *stub_files(ROOT, folders)}):
        new, old = made / name, ROOT / name
        if new.exists() and old.exists() and new.read_bytes() == old.read_bytes():
            continue
        differing += 1
        if check:
            show_difference(name, old, new)
        elif new.exists():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new, old)
            say(f"wrote {name}")
        else:
            old.unlink()
            say(f"removed {name}")
    return differing


def stub_files(root: Path, folders: list[str]) -> Iterator[str]:
    for folder in folders:
        for pattern in ("*_pb2.py*", "*_pb2_grpc.py*", "*.pb.go"):
            yield from (str(path.relative_to(root)) for path in (root / folder).rglob(pattern))


def show_difference(name: str, old: Path, new: Path) -> None:
    before = old.read_text(encoding="utf-8").splitlines() if old.exists() else []
    after = new.read_text(encoding="utf-8").splitlines() if new.exists() else []
    diff = list(difflib.unified_diff(before, after, f"{name} (checked in)", f"{name} (made)", lineterm=""))
    print("\n".join(line[:200] for line in diff[:SHOWN_DIFF_LINES]))
    if len(diff) > SHOWN_DIFF_LINES:
        print(f"... and {len(diff) - SHOWN_DIFF_LINES} more lines")


if __name__ == "__main__":
    main()
