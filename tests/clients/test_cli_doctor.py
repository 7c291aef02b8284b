"""`paddock doctor` from end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paddock.cli.failures import ExitCode
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from tests.clients.fake_server import FakeServer
    from tests.servers import ServerProcess

SECRET = "hf_never_to_be_seen"


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paddock", "doctor", *arguments],
        env={**os.environ, "PADDOCK_SERVER": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def by_area(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, str]]]:
    report: dict[str, Any] = json.loads(done.stdout)
    areas: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        areas.setdefault(finding["area"], []).append(finding)
    return areas


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    models.mkdir()
    make_noise(models / "good.gguf")
    (models / "broken.gguf").write_bytes(b"no model")
    return models


@pytest.fixture
def taken_port() -> Generator[int]:
    """A port where somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_without_a_server_and_without_a_problem_it_explains_what_it_sees(
    directory: Path, tmp_path: Path
) -> None:
    done = doctor(
        *("--json", "--models-dir", str(directory), "--state-dir", str(tmp_path / "state")),
        *("--grpc-port", str(free_port()), "--port", "0"),
        HF_TOKEN=SECRET,
        HF_ENDPOINT=f"https://me:{SECRET}@hub.local",
        HF_HOME=str(tmp_path / "hub"),
    )

    areas = by_area(done)
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    assert list(areas) == [
        *("versions", "llama.cpp", "gpu", "cpu", "models", "memory", "limits", "state", "disk", "hub"),
        *("ports", "server"),
    ]
    assert [finding["level"] for finding in areas["models"]] == ["ok", "warning"]
    assert "'broken' cannot be loaded: broken.gguf" in areas["models"][1]["message"]
    assert (
        "https://hub.local, not asked whether it answers, a token from HF_TOKEN" in areas["hub"][0]["message"]
    )
    assert SECRET not in done.stdout
    assert not (tmp_path / "state").exists()
    (server,) = areas["server"]
    assert (server["level"], server["advice"]) == ("ok", "")
    assert server["message"].startswith("none answers at 127.0.0.1:")


def test_a_server_that_was_named_is_asked_and_nothing_else_is_looked_at(server: FakeServer) -> None:
    found = doctor("--server", server.target)
    alone = by_area(doctor("--json", PADDOCK_SERVER=server.target))
    missing = doctor("--json", "--server", "127.0.0.1:1")

    lines = found.stdout.splitlines()
    assert lines[0] == f"The server at {server.target}:"
    assert {line.split()[0] for line in lines[1:] if not line.startswith(" ")} == {"server"}
    assert "Only that server was asked;" in found.stderr
    assert found.returncode == ExitCode.OK
    assert list(alone) == ["server"]
    assert "its health service does not answer" in {finding["message"] for finding in alone["server"]}
    assert missing.returncode == ExitCode.FAILED
    assert list(by_area(missing)) == ["server"]


def test_with_settings_and_a_server_the_report_has_two_parts(directory: Path, server: FakeServer) -> None:
    arguments = ("--models-dir", str(directory), "--grpc-port", "0", "--port", "0")

    lines = doctor(*arguments, "--server", server.target).stdout.splitlines()

    assert lines[0] == "This machine:"
    assert f"The server at {server.target}:" in lines


def test_a_name_service_that_hangs_does_not_keep_the_command_from_ending() -> None:
    code = (
        "import socket, time\n"
        "look_up = socket.getaddrinfo\n"
        "hang = lambda host, *a, **k: time.sleep(60) if host == 'hangs' else look_up(host, *a, **k)\n"
        "socket.getaddrinfo = hang\n"
        "from paddock.cli import main; main()"
    )
    arguments = ("doctor", "--json", "--host", "hangs", "--grpc-port", "0")

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=40
    )

    assert "the name service did not answer" in done.stdout


def test_a_variable_that_the_hub_cannot_read_costs_one_line(directory: Path) -> None:
    done = doctor(
        *("--json", "--models-dir", str(directory), "--grpc-port", "0", "--port", "0"),
        HF_HUB_DOWNLOAD_TIMEOUT="soon",
        HF_ENDPOINT=f"me:{SECRET}@hub.local",
    )

    areas = by_area(done)
    assert "'soon'" in areas["hub"][0]["message"]
    assert {"versions", "memory", "ports"} <= set(areas)
    assert SECRET not in done.stdout


def test_a_port_somebody_else_has_is_a_problem_with_its_flag_and_the_exit_code_says_so(
    directory: Path, taken_port: int
) -> None:
    done = doctor("--models-dir", str(directory), "--port", str(taken_port), "--grpc-port", "0")

    lines = done.stdout.splitlines()
    index = next(index for index, line in enumerate(lines) if "PROBLEM" in line)
    assert done.returncode == ExitCode.FAILED
    assert f"HTTP 127.0.0.1:{taken_port} is taken by something that does not answer as" in lines[index]
    assert "choose another with --port" in lines[index + 1]
    assert done.stderr.startswith("1 problem, ")


def test_a_setting_that_is_wrong_is_a_problem_and_the_rest_is_seen_with_the_defaults(tmp_path: Path) -> None:
    done = doctor("--json", "--models-dir", str(tmp_path / "none"), "--grpc-port", "0")

    areas = by_area(done)
    assert done.returncode == ExitCode.FAILED
    assert "--models-dir" in areas["config"][0]["message"]
    assert "models" in areas


def test_what_is_wrong_in_configuration_files_is_named_with_file_and_line(
    directory: Path, tmp_path: Path
) -> None:
    toml, preset = tmp_path / "paddock.toml", tmp_path / "preset.ini"
    toml.write_text('[models.good]\ntags = ["x"]\n')
    preset.write_text("version = 1\n[good]\nunheard-of = 3\n")
    arguments = ("--json", "--models-dir", str(directory), "--grpc-port", "0", "--port", "0")

    left_out = by_area(doctor(*arguments, "--config", str(toml), "--models-preset", str(preset)))["config"]
    toml.write_text("[models.good]\nctx_size = true\n")
    done = doctor(*arguments, "--config", str(toml))

    (unknown,) = [finding for finding in left_out if finding["level"] == "warning"]
    assert "preset.ini:3" in unknown["message"]
    assert "unheard-of" in unknown["message"]
    (wrong,) = [finding for finding in by_area(done)["config"] if finding["level"] == "problem"]
    assert "paddock.toml:2" in wrong["message"]
    assert done.returncode == ExitCode.FAILED


def test_a_running_server_is_told_from_other_programs_and_asked_how_it_is(real_server: ServerProcess) -> None:
    grpc_port, http_port = (
        address.rpartition(":")[2] for address in (real_server.grpc_address, real_server.http_address)
    )
    done = doctor("--json", "--grpc-port", grpc_port, "--port", http_port)

    areas = by_area(done)
    assert [finding["level"] for finding in areas["ports"]] == ["ok", "ok"], areas["ports"]
    assert all("Paddock" in finding["message"] for finding in areas["ports"])
    assert areas["server"][0]["level"] == "ok"
    assert real_server.grpc_address in areas["server"][0]["message"]
    assert "they may have of RAM" in areas["server"][1]["message"]
