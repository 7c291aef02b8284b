"""A real `paddock up` that downloads from a hub on loopback, and is killed while it does."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from paddock_server.config import DEMO_DIR
from tests.fakes.hub import Repo, digest_of, running_hub
from tests.servers import ServerProcess, paddock_up, wait_until

REPO = "org/foal-GGUF"
NAME = f"hf:{REPO}:Q8_0"


def paddock(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paddock", *arguments, "--server", server.grpc_address],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_server_killed_during_a_download_comes_back_and_ends_it(tmp_path: Path, at: float) -> None:
    content = (DEMO_DIR / "foal.gguf").read_bytes()
    empty = tmp_path / "empty"
    empty.mkdir()
    opened, reached = threading.Event(), threading.Event()

    def gate(served_bytes: int) -> None:
        if served_bytes >= min(at * len(content), len(content) - 4096):
            reached.set()
            opened.wait(50)

    with running_hub() as hub:
        hub.repos[REPO] = Repo({"foal-Q8_0.gguf": content})
        hub.block_gate = gate
        # A port of its own: what is remembered is kept by port.
        flags = ("--state-dir", str(tmp_path / "state"))
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
        blobs = tmp_path / "hub" / "models--org--foal-GGUF" / "blobs"
        partial = blobs / f"{digest_of(content)}.incomplete"
        with paddock_up(empty, tmp_path / "first.log", *flags, environment=environment) as first:
            pull = subprocess.Popen(
                [sys.executable, "-m", "paddock", "pull", NAME, "--server", first.grpc_address],
                stderr=subprocess.DEVNULL,
            )
            assert reached.wait(50)
            wait_until(lambda: partial.exists() and partial.stat().st_size >= at * len(content) / 2)
            fetchers = psutil.Process(first.process.pid).children()
            first.process.kill()
            first.process.wait()
            assert psutil.wait_procs(fetchers, timeout=10)[1] == []
            pull.wait(50)
            there = partial.stat().st_size
            opened.set()
        assert not (blobs / digest_of(content)).exists()
        with paddock_up(empty, tmp_path / "second.log", *flags, environment=environment) as second:
            wait_until(lambda: "downloaded" in paddock(second, "show", f"{REPO}:Q8_0").stdout)
            answer = paddock(second, "run", NAME, "Once", "--max-tokens", "4", "--temperature", "0")
            assert answer.returncode == 0, answer.stderr
            assert answer.stdout.strip()
        assert hub.ranges[-1] == (f"bytes={there}-" if there else "")
