"""grpcurl against a real server, with the commands the README shows."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.servers import ServerProcess

ROOT = Path(__file__).parents[2]
README_ADDRESS = "localhost:50051"

LIST = "grpcurl -plaintext localhost:50051 list"
DESCRIBE = "grpcurl -plaintext localhost:50051 describe paddock.v1.ModelManager"
LOAD = """grpcurl -plaintext -d '{"model": "foal"}' localhost:50051 paddock.v1.ModelManager/Load"""
GENERATE = (
    """grpcurl -plaintext -d '{"model": "foal", "chat": {"messages": [{"role": "ROLE_USER", "content": """
    """[{"text": "What is Paddock?"}]}]}}'"""
    " localhost:50051 paddock.v1.ModelManager/Generate"
)


@pytest.fixture(scope="module")
def grpcurl() -> str:
    path = os.pathsep.join((str(ROOT / ".cache" / "bin"), os.environ.get("PATH", "")))
    found = shutil.which("grpcurl", path=path)
    if found is None:
        pytest.skip("grpcurl is not on this machine; `make test` builds it where Go is")
    return found


def run(grpcurl: str, command: str, server: ServerProcess) -> str:
    arguments = shlex.split(command.replace(README_ADDRESS, server.grpc_address))[1:]
    done = subprocess.run([grpcurl, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def messages(output: str) -> list[dict[str, Any]]:
    """Parse the JSON objects grpcurl writes one after the other."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    rest = output.strip()
    while rest:
        message, end = decoder.raw_decode(rest)
        found.append(message)
        rest = rest[end:].strip()
    return found


def test_list_and_describe_need_no_proto_files(grpcurl: str, real_server: ServerProcess) -> None:
    services = run(grpcurl, LIST, real_server).split()
    description = run(grpcurl, DESCRIBE, real_server)

    assert "paddock.v1.ModelManager" in services
    assert "grpc.health.v1.Health" in services
    assert "rpc Load ( .paddock.v1.LoadRequest ) returns ( stream .paddock.v1.LoadResponse );" in description


def test_load_streams_progress_and_ends_with_the_model(grpcurl: str, real_server: ServerProcess) -> None:
    *progress, last = messages(run(grpcurl, LOAD, real_server))

    assert last["loaded"]["model"]["state"] == "MODEL_STATE_LOADED"
    assert all("progress" in message for message in progress)


def test_generate_streams_text_and_ends_with_usage(grpcurl: str, real_server: ServerProcess) -> None:
    first, *middle, last = messages(run(grpcurl, GENERATE, real_server))

    deltas = [delta for message in middle for delta in message["deltas"]["deltas"]]
    assert first["started"]["model"] == "foal"
    assert "".join(delta.get("text", "") for delta in deltas)
    count = last["generated"]["usage"]["completion_tokens"]
    assert count >= 1
    assert sum(delta.get("token_count", 0) for delta in deltas) == count


@pytest.mark.parametrize("command", [LIST, DESCRIBE, LOAD, GENERATE])
def test_the_readme_shows_the_commands_that_are_tested(command: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert command in {line.strip() for line in readme.splitlines()}
