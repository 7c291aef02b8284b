"""The clients as a new user would use them, on a real server with real llama.cpp."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paddock import Client, FinishReason, InvalidFieldError, ModelState
from paddock.cli.failures import ExitCode
from tests.clients.terminal import terminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers import ServerProcess

MODEL = "noise"
LONG_WINDED = "Gulls"
"""What the model answers with 603 tokens."""

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def paddock(server: ServerProcess, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paddock", *arguments],
        env={**os.environ, "PADDOCK_SERVER": server.grpc_address},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
async def client(real_server: ServerProcess) -> AsyncIterator[Client]:
    async with Client.connect(real_server.grpc_address) as client:
        yield client


async def test_a_model_is_loaded_used_and_unloaded(client: Client) -> None:
    await client.unload(MODEL)

    async with client.load(MODEL) as load:
        stages = [progress.stage async for progress in load]
    async with client.generate(MODEL, "Once upon a time", max_tokens=16, temperature=0) as stream:
        text = "".join([chunk.text async for chunk in stream])
    again = await client.complete(MODEL, "Once upon a time", max_tokens=16, temperature=0)
    unloaded = await client.unload(MODEL)

    assert stages
    assert load.model.state is ModelState.LOADED
    assert text == again.text
    assert stream.usage.completion_tokens == again.usage.completion_tokens <= 16
    assert again.choices[0].finish_reason in {FinishReason.LENGTH, FinishReason.STOP}
    assert unloaded.model.state is ModelState.UNLOADED


async def test_tokens_make_the_text_they_came_from(client: Client) -> None:
    async with client.load(MODEL) as load:
        await load.wait()

    tokens = await client.tokenize(MODEL, "Grüße, 世界!", include_pieces=True)

    assert await client.detokenize(MODEL, tokens.token_ids) == "Grüße, 世界!"
    assert b"".join(tokens.pieces).decode().strip() == "Grüße, 世界!"


async def test_a_wrong_field_is_named(client: Client) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        await client.complete(MODEL, "x", top_p=7)

    assert [violation.field for violation in caught.value.violations] == ["sampling.top_p"]


async def test_run_loads_a_model_and_answers(client: Client, real_server: ServerProcess) -> None:
    await client.unload(MODEL)

    done = paddock(real_server, "run", MODEL, "Once upon a time", "-n", "12", "--temperature", "0")

    assert done.returncode == ExitCode.OK, done.stderr
    assert done.stdout.strip()
    assert f"Loaded {MODEL} in" in done.stderr


async def test_a_load_in_a_terminal_draws_a_bar(client: Client, real_server: ServerProcess) -> None:
    await client.unload(MODEL)

    with terminal(real_server.grpc_address, "load", MODEL) as load:
        text = load.read_to_end()
        assert load.exit_code() == ExitCode.OK

    assert "━" in text
    assert re.search(r"✓.* Starting worker", text)
    assert f"Loaded {MODEL} in" in text


async def test_a_run_in_a_terminal_streams_its_text(client: Client, real_server: ServerProcess) -> None:
    async with client.load(MODEL) as load:
        await load.wait()
    whole = await client.complete(MODEL, LONG_WINDED, max_tokens=1000, temperature=0)
    expected = whole.choices[0].text.lstrip()
    arguments = ("run", MODEL, LONG_WINDED, "--raw", "-n", "1000", "--temperature", "0")

    with terminal(real_server.grpc_address, *arguments) as run:
        beginning = run.read_until(expected.split()[0])
        rest = run.read_to_end()
        assert run.exit_code() == ExitCode.OK

    assert expected in beginning + rest
    assert len(beginning) < len(expected) / 2
    assert f" + {whole.usage.completion_tokens} tokens, " in rest


async def test_chat_answers_and_its_worker_leaves_a_log(client: Client, real_server: ServerProcess) -> None:
    done = paddock(real_server, "chat", MODEL, "-n", "8", "--temperature", "0", stdin="hello\nagain\n")

    assert done.returncode == ExitCode.OK, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    async with client.logs(MODEL, tail=5) as logs:
        assert len([line async for line in logs]) == 5


@pytest.mark.parametrize("block", python_blocks(), ids=["openai", "paddock"])
def test_the_programs_of_the_readme_run(real_server: ServerProcess, block: str) -> None:
    program = block.replace("localhost:50051", real_server.grpc_address)
    program = program.replace("http://127.0.0.1:8080", real_server.http_url)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_model_that_is_not_there_has_its_exit_code(real_server: ServerProcess) -> None:
    done = paddock(real_server, "run", "nope", "hello")

    assert done.returncode == ExitCode.NOT_FOUND
    assert done.stderr == "Error: There is no model named 'nope'. `paddock ls` shows the models there are.\n"
