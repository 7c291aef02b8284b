"""A second signal while the server drains: everything ends at once, and everybody is told why."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import psutil
import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from tests.clients.terminal import terminal
from tests.servers import START_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Generator

SECRET: Final = "three-blind-mice"
SLOTS: Final = 4
AT_ONCE_SECONDS: Final = 10.0
"""Far more than it takes, and far less than the drain."""


class Console:
    """A server whose log is for people, as in a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def address(self, name: str) -> str:
        wait_until(lambda: re.search(rf"\b{name}=\S+", self.text) is not None, START_SECONDS)
        found = re.search(rf"\b{name}=(\S+)", self.text)
        assert found is not None
        return found[1]


@pytest.fixture
def server(models_dir: Path, tmp_path: Path) -> Generator[Console]:
    log = tmp_path / "log"
    command = [str(Path(sys.executable).parent / "paddock"), "up", "--models-dir", str(models_dir)]
    command += ["--grpc-port", "0", "--port", "0", "--log-format", "console", "--state-dir", ""]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--parallel", str(SLOTS)], stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        yield Console(process, log)
    finally:
        process.kill()
        process.wait()


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "noise", "prompt": SECRET, "max_tokens": 100_000, "ignore_eos": True, **more}


async def test_a_second_signal_tells_every_stream_why_and_leaves_neither_traceback_nor_process(
    server: Console,
) -> None:
    """A newcomer's second Ctrl-C printed 3,491 lines of tracebacks, with prompts in them, and said nothing to
    clients."""
    url, grpc_address = f"http://{server.address('http')}", server.address("grpc")
    started = [asyncio.Event() for _ in range(3)]
    async with (
        asyncio.timeout(START_SECONDS),
        httpx.AsyncClient(timeout=60) as client,
        connect(grpc_address) as ch,
    ):

        async def stream(begun: asyncio.Event) -> str:
            text = ""
            async with client.stream(
                "POST", f"{url}/v1/completions", json=completion(stream=True)
            ) as response:
                async for line in response.aiter_lines():
                    text += line + "\n"
                    begun.set()
            return text

        async def generate(begun: asyncio.Event) -> str:
            stop = gen.StopParams(max_tokens=100_000, ignore_eos=True)
            request = pb.GenerateRequest(model="noise", prompt=SECRET, stop=stop)
            async with aclosing(GrpcApi(ch).generate(request)) as responses:
                async for _ in responses:
                    begun.set()
            return ""

        calls = [asyncio.create_task(stream(begun)) for begun in started[:2]]
        call = asyncio.create_task(generate(started[2]))
        await asyncio.gather(*(begun.wait() for begun in started))
        documents = [
            asyncio.create_task(client.post(f"{url}/v1/completions", json=completion())) for _ in range(3)
        ]
        await asyncio.sleep(0.2)  # one of them runs, the others wait for a slot
        workers = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGINT)
        await asyncio.to_thread(wait_until, lambda: "server_draining" in server.text)
        told = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        exit_code = await asyncio.to_thread(server.process.wait, AT_ONCE_SECONDS)
        took = time.monotonic() - told

        texts = await asyncio.gather(*calls)
        answers = await asyncio.gather(*documents)
        with pytest.raises(PaddockError) as failure:
            await call

    log = server.text
    assert (exit_code, took < AT_ONCE_SECONDS) == (0, True)
    assert all('"code":"shutting_down"' in text and "[DONE]" not in text for text in texts)
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
        (503, "shutting_down")
    ] * 3
    assert failure.value.reason == Reason.SHUTTING_DOWN
    assert "stopping_at_once" in log
    assert not any(word in log for word in ("Traceback", "Error", "destroyed", SECRET, "locals")), log
    assert [worker for worker in workers if worker.is_running()] == []


def test_the_addresses_come_last_below_what_remembered_loads_log(models_dir: Path, tmp_path: Path) -> None:
    flags = ["up", "--models-dir", str(models_dir), "--grpc-port", "0", "--port", "0"]
    flags += ["--state-dir", str(tmp_path / "state")]
    state = tmp_path / "state" / "loads-0.json"
    state.parent.mkdir()
    state.write_text('{"version": 1, "loads": [{"model": "noise", "options": {}}]}')

    with terminal("", *flags) as server:
        said = server.read_until("Ctrl-C stops the server.")
        server.interrupt()
        server.read_to_end()
        assert server.exit_code() == 0

    assert "load_replayed" in said
    assert re.search(r"RAM\S*=\S*[\d.]+ [KMGT]iB", re.sub(r"\x1b\[\d+m", "", said))
    assert said.index("model_state_changed") < said.index("HTTP   http://")
    assert said.rindex("ready") < said.index("HTTP   http://")
