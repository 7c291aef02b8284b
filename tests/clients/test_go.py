"""The Go client: vetted, tested, and its example run against a server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.fake_server import FakeServer
    from tests.servers import ServerProcess

MODULE = Path(__file__).parents[2] / "clients" / "go"

pytestmark = pytest.mark.timeout(600)  # the first build compiles grpc


def go(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["go", *arguments], cwd=MODULE, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def toolchain() -> None:
    """Skip where there is no Go that can build the module."""
    if shutil.which("go") is None:
        pytest.skip("Go is not on this machine (https://go.dev/doc/install)")
    done = go("mod", "download")
    if done.returncode != 0:
        pytest.skip(f"Go cannot fetch the modules of clients/go: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def example(toolchain: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("go") / "example"
    done = go("build", "-o", str(program), "./example")
    assert done.returncode == 0, done.stderr
    return program


def run(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([example, *arguments], capture_output=True, text=True, check=False)


def test_the_module_vets_and_passes_its_own_tests() -> None:
    for command in ("vet", "test"):
        done = go(command, "./...")
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_module_is_formatted() -> None:
    done = subprocess.run(["gofmt", "-l", "."], cwd=MODULE, capture_output=True, text=True, check=True)

    assert done.stdout == ""


def test_the_example_loads_with_progress_and_generates(example: Path, server: FakeServer) -> None:
    done = run(example, "-server", server.target, "-model", "cold", "-prompt", "Once")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hello, wörld!\n"
    assert "weights: 50%" in done.stderr
    assert "cold is loaded." in done.stderr
    assert "3 + 4 tokens" in done.stderr


def test_the_example_tells_the_reason_of_an_error(example: Path, server: FakeServer) -> None:
    done = run(example, "-server", server.target, "-model", "nope")

    assert done.returncode == 1
    assert done.stderr.startswith("MODEL_NOT_FOUND: There is no model named 'nope'.")


def test_the_example_says_how_to_start_a_server(example: Path) -> None:
    done = run(example, "-server", "127.0.0.1:1", "-model", "tiny")

    assert done.stderr == "No Paddock server answers. Start it with `paddock up`.\n"


def test_the_example_runs_on_a_real_server(example: Path, real_server: ServerProcess) -> None:
    done = run(example, "-server", real_server.grpc_address, "-model", "noise", "-max-tokens", "8")

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "noise is loaded." in done.stderr
