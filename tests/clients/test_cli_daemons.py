from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from paddock.cli.app import app
from paddock.cli.daemons import HTTP_FLAGS, SERVER_FLAGS
from paddock.cli.failures import ExitCode
from paddock_server import app as server_app
from paddock_server.config import ServerConfig
from tests.clients.fake_server import WAY_OUT_SECONDS
from tests.clients.terminal import terminal

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from tests.clients.fake_server import FakeServer

WITHOUT = "import sys; sys.modules[{missing!r}] = None; from paddock.cli import main; main()"
"""A program that cannot import one package."""


class Runs:
    """Stands in for `paddock_server.app.run`: notes what it is asked for."""

    def __init__(self) -> None:
        self.configs: list[ServerConfig] = []
        self.options: dict[str, Any] = {}
        self.failure: Exception | None = None

    def __call__(self, config: ServerConfig, **options: Any) -> None:
        self.configs.append(config)
        self.options = options
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(server_app, "run", runs)
    return runs


def paddock(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(app, arguments)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def taken_port() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_every_setting_of_the_server_is_a_flag() -> None:
    # The file is named by --config, which says where the other settings come from.
    assert {*SERVER_FLAGS, *HTTP_FLAGS, "config_file"} == set(ServerConfig.model_fields)


@pytest.mark.parametrize("command", ["up", "serve"])
def test_flags_win_over_the_environment_and_that_over_the_file(
    command: str, runs: Runs, tmp_path: Path
) -> None:
    file = tmp_path / "paddock.toml"
    file.write_text("parallel = 2\nctx_size = 3\nmodels_max = 9\n")

    result = paddock(
        *(command, "--config", str(file), "--models-dir", str(tmp_path), "--parallel", "6"),
        *("--no-models-autoload", "--no-reflection", "--state-dir", ""),
        PADDOCK_PARALLEL="5",
        PADDOCK_CTX_SIZE="4",
    )

    (config,) = runs.configs
    assert (config.parallel, config.ctx_size, config.models_max) == (6, 4, 9)
    assert (config.models_autoload, config.reflection, config.state_dir) == (False, False, None)
    assert config.models_dir == (tmp_path.resolve(),)
    assert config.batch_size == ServerConfig.model_fields["batch_size"].default
    assert (result.exit_code, result.output) == (ExitCode.OK, "")


@pytest.mark.parametrize("command", ["up", "serve"])
def test_what_keeps_a_server_from_starting_is_one_sentence(command: str, runs: Runs, tmp_path: Path) -> None:
    runs.failure = server_app.StartError("The port is taken.")

    result = paddock(command, "--models-dir", str(tmp_path))

    assert (result.exit_code, result.stderr) == (ExitCode.FAILED, "Error: The port is taken.\n")


@pytest.mark.parametrize("named", [True, False])
def test_a_state_directory_that_cannot_be_written_ends_the_start_if_it_was_named(
    tmp_path: Path, named: bool
) -> None:
    """`--state-dir /proc/nope` was taken, and everything answered was lost at the end."""
    (tmp_path / "file").touch()
    flags = ["--state-dir", str(tmp_path / "file")] if named else []
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "file")}
    environment.pop("PADDOCK_STATE_DIR", None)
    command = [sys.executable, "-m", "paddock", "serve", "--models-dir", str(tmp_path), "--grpc-port", "0"]
    with subprocess.Popen(
        [*command, *flags, "--log-format", "json"], stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            if named:
                assert server.wait(WAY_OUT_SECONDS) == ExitCode.FAILED
                assert line.startswith(f"Error: Cannot write to the state directory {tmp_path / 'file'}: ")
                assert server.stderr.read() == ""
            else:
                assert json.loads(line)["event"] == "state_dir_not_writable"
        finally:
            server.kill()


def test_a_server_without_directories_says_what_it_serves(runs: Runs) -> None:
    result = paddock("serve")

    assert "demo model foal" in result.stderr
    assert len(runs.configs) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--models-dir", "/nonexistent"), "--models-dir"),
        (("--parallel", "0"), "--parallel"),
        (("--log-level", "loud"), "--log-level"),
        (("--config", "/nonexistent.toml"), "/nonexistent.toml"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_names_it(
    runs: Runs, flags: tuple[str, ...], named: str
) -> None:
    result = paddock("serve", *flags)

    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith("Error: ")
    assert named in result.stderr
    assert runs.configs == []


async def test_up_puts_the_gateway_beside_the_server(runs: Runs, server: FakeServer, tmp_path: Path) -> None:
    from paddock.transport import GrpcApi, connect

    await asyncio.to_thread(paddock, "up", "--models-dir", str(tmp_path), "--port", "0")

    async with (
        connect(server.target) as channel,
        runs.options["attach"](GrpcApi(channel), asyncio.Event()) as gateway,
    ):
        body = await asyncio.to_thread(get, f"{gateway.url}/v1/models")
    assert "tiny" in [model["id"] for model in body["data"]]


async def test_up_says_which_flags_help_when_the_http_port_is_taken(
    runs: Runs, tmp_path: Path, taken_port: int
) -> None:
    await asyncio.to_thread(paddock, "up", "--models-dir", str(tmp_path), "--port", str(taken_port))

    with pytest.raises(server_app.StartError, match=r"choose another with --port\."):
        async with runs.options["attach"](object(), asyncio.Event()):
            pytest.fail("listens")


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("up", "uvicorn", "server,gateway"),
        ("serve", "llama_cpp", "server"),
        ("gateway", "starlette", "gateway"),
    ],
)
def test_a_missing_extra_is_one_sentence_that_says_how_to_install_it(
    command: str, missing: str, extra: str
) -> None:
    code = WITHOUT.format(missing=missing)

    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)

    assert done.returncode == ExitCode.FAILED
    install = f"pip install 'paddock[{extra}]'"
    assert done.stderr == f"Error: `paddock {command}` needs {missing}, which is not installed: {install}.\n"


def test_client_commands_need_no_extra(server: FakeServer) -> None:
    block = "; ".join(
        f"sys.modules[{name!r}] = None"
        for name in ("structlog", "pydantic_settings", "psutil", "uvicorn", "starlette", "llama_cpp")
    )
    code = f"import sys; {block}; from paddock.cli import main; main()"

    done = subprocess.run([sys.executable, "-c", code, "ls", "--server", server.target], check=False)

    assert done.returncode == ExitCode.OK


INTERRUPTED_IMPORT = """
import signal, sys

class Interrupts:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from paddock.cli import main
main()
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("up", "typer"),
        ("up", "paddock.cli.daemons"),
        ("up", "paddock_gateway.app"),
        ("serve", "paddock_server.app"),
        ("gateway", "paddock.multiplexed"),
        ("ls", "paddock.cli.models"),
    ],
)
def test_ctrl_c_while_a_command_still_imports_ends_it_without_a_word(command: str, module: str) -> None:
    """A newcomer's `paddock up` and Ctrl-C after 0.15 s printed twenty lines of KeyboardInterrupt."""
    code = INTERRUPTED_IMPORT.format(module=module)

    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.INTERRUPTED, b"", b"")


def test_a_gateway_stands_in_front_of_a_server_until_sigterm(server: FakeServer) -> None:
    command = [sys.executable, "-m", "paddock", "gateway", "--server", server.target, "--port", "0"]
    with subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stderr is not None
            ready = json.loads(gateway.stderr.readline())
            assert ready["event"] == "gateway_ready"

            models = get(f"http://{ready['http']}/v1/models")
            gateway.send_signal(signal.SIGTERM)

            assert "tiny" in [model["id"] for model in models["data"]]
            assert gateway.wait(WAY_OUT_SECONDS) == ExitCode.OK
        finally:
            gateway.kill()


def test_a_gateway_says_when_no_server_answers_and_when_one_does(free_port: int) -> None:
    target = f"127.0.0.1:{free_port}"
    command = [sys.executable, "-m", "paddock", "gateway", "--server", target, "--port", "0"]
    backend = grpc.server(ThreadPoolExecutor(1))
    with subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stderr is not None
            before = [json.loads(gateway.stderr.readline()) for _ in range(2)]
            backend.add_insecure_port(target)
            backend.start()
            after = json.loads(gateway.stderr.readline())
            gateway.send_signal(signal.SIGTERM)

            assert gateway.wait(WAY_OUT_SECONDS) == ExitCode.OK
            assert "Traceback" not in gateway.stderr.read()
        finally:
            gateway.kill()
            backend.stop(None)

    assert [line["event"] for line in before] == ["gateway_ready", "server_not_reached"]
    assert (before[1]["level"], before[1]["server"]) == ("warning", target)
    assert (after["event"], after["server"]) == ("server_reached", target)


def test_a_gateway_in_a_terminal_says_where_it_is_and_how_it_stops(server: FakeServer) -> None:
    with terminal(server.target, "gateway", "--port", "0") as gateway:
        said = gateway.read_until("Ctrl-C stops the gateway.")
        assert re.search(r"HTTP   http://127\.0\.0\.1:\d+/v1", said)
        assert server.target in said
        gateway.interrupt()
        assert "Ctrl-C again stops at once." in gateway.read_to_end()
        assert gateway.exit_code() == ExitCode.OK


def test_a_gateway_whose_port_is_taken_says_so_in_one_line(taken_port: int) -> None:
    command = [sys.executable, "-m", "paddock", "gateway", "--port", str(taken_port)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == ExitCode.FAILED
    assert len(done.stderr.splitlines()) == 1
    assert str(taken_port) in done.stderr


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=WAY_OUT_SECONDS) as response:  # noqa: S310  # loopback
        return json.load(response)


def test_check_config_names_every_problem_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    toml, preset = tmp_path / "paddock.toml", tmp_path / "models.ini"
    toml.write_text("[models.a]\nthreads = 'two'\nctx = 3\n")
    preset.write_text("[a]\nc = many\n")
    arguments = ["--config", str(toml), "--models-preset", str(preset)]
    result = paddock("check-config", "--models-dir", str(tmp_path / "models"), *arguments)

    assert result.exit_code == ExitCode.FAILED
    places = [line.rsplit("/", 1)[1].split(": ")[:2] for line in result.stdout.splitlines()]
    assert places == [
        ["models.ini:2", "[a] c"],
        ["paddock.toml:2", "models.a.threads"],
        ["paddock.toml:3", "models.a.ctx"],
    ]


def test_check_config_names_wrong_settings_beside_wrong_models(tmp_path: Path) -> None:
    toml = tmp_path / "paddock.toml"
    toml.write_text("models_max = 1\nparallel = 0\n[defaults]\nctx_size = 'x'\n")
    result = paddock("check-config", "--config", str(toml))

    assert result.exit_code == ExitCode.FAILED
    assert [line.rsplit("/", 1)[1].split(": ")[0] for line in result.stdout.splitlines()] == [
        "paddock.toml:2",
        "paddock.toml:4",
    ]


def test_check_config_is_content_with_what_is_sound(tmp_path: Path) -> None:
    toml = tmp_path / "paddock.toml"
    toml.write_text("models_max = 1\n[defaults]\nctx_size = 512\n")

    assert paddock("check-config", "--config", str(toml)).exit_code == 0
