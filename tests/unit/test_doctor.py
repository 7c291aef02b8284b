"""What `paddock doctor` makes of facts, and how it reads them."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from paddock_server.config import ServerConfig
from paddock_server.doctor import examine, findings, machine
from paddock_server.doctor.findings import (
    GIB,
    UNLIMITED,
    Answer,
    Build,
    Cpu,
    Disk,
    Finding,
    Hub,
    Level,
    Memory,
    Models,
    Port,
    Running,
    StateDirectory,
    Versions,
    features_of,
)
from paddock_server.doctor.machine import LlamaError
from paddock_server.memory import DeviceMemory, own_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OK, WARNING, PROBLEM = Level.OK, Level.WARNING, Level.PROBLEM

VERSIONS = Versions(
    python="3.11.7", paddock="0.1.0", grpcio="1.76.0", llama_cpp="0.3.36", llama_cpp_wanted="0.3.36"
)
BUILD = Build(
    system_info="CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 | ",
    gpu_offload=False,
    gpus=(),
    cpu_flags=frozenset({"avx2"}),
    gpu_hardware=(),
)
CPU = Cpu(logical=8, physical=4, allowed=8, quota=None)
MEMORY = Memory(total=16 * GIB, available=8 * GIB, limit=None)
MODELS = Models(directories=("/models",), count=2, broken={}, largest_bytes=GIB)
HUB = Hub(endpoint="https://huggingface.co", offline=False, cache="/cache", cache_fault="", token_from="")
RUNNING = Running(
    address="127.0.0.1:50051",
    version="0.1.0",
    uptime_seconds=90.0,
    serving=True,
    loaded=1,
    failed={},
    restarts={},
    memory={"RAM": (GIB, 8 * GIB)},
)
PORT = Port(purpose="gRPC", address="127.0.0.1:50051", flag="--grpc-port", answer=Answer.FREE)


def worst(found: Sequence[Finding]) -> Level:
    order = [OK, WARNING, PROBLEM]
    return max((finding.level for finding in found), key=order.index)


JUDGEMENTS = {
    "versions": (findings.judge_versions(VERSIONS), OK, "0.3.36"),
    "no llama": (findings.judge_versions(replace(VERSIONS, llama_cpp=None)), PROBLEM, "not installed"),
    "other llama": (
        findings.judge_versions(replace(VERSIONS, llama_cpp="0.3.1")),
        PROBLEM,
        "made for 0.3.36",
    ),
    "build": (findings.judge_build(BUILD), OK, "AVX2"),
    "slow build": (
        findings.judge_build(replace(BUILD, cpu_flags=frozenset({"avx2", "avx512f"}))),
        WARNING,
        "AVX512, which llama.cpp was built without",
    ),
    "idle gpu": (findings.judge_build(replace(BUILD, gpu_hardware=("NVIDIA",))), WARNING, "cannot use it"),
    "gpu": (
        findings.judge_build(
            replace(BUILD, gpu_offload=True, gpus=(DeviceMemory("CUDA0", "a card", 2 * GIB, GIB),))
        ),
        OK,
        "CUDA0: a card, 1.0 GiB of 2.0 GiB free",
    ),
    "unknown build": (findings.judge_build(replace(BUILD, system_info="x")), OK, "says about itself: x"),
    "cpu": (findings.judge_cpu(CPU, threads=0), OK, "8 logical cores, 4 physical"),
    "quota": (findings.judge_cpu(replace(CPU, quota=1.5), threads=0), WARNING, "4 threads by default"),
    "affinity": (findings.judge_cpu(replace(CPU, allowed=2), threads=0), WARNING, "2 of them usable"),
    "threads": (findings.judge_cpu(CPU, threads=9), WARNING, "--threads is 9"),
    "threads fit": (findings.judge_cpu(replace(CPU, quota=2.0), threads=2), OK, "2 of them usable"),
    "memory": (findings.judge_memory(MEMORY), OK, "16.0 GiB, 8.0 GiB available"),
    "cgroup": (findings.judge_memory(replace(MEMORY, limit=2 * GIB)), OK, "2.0 GiB (the limit of a cgroup"),
    "little memory": (
        findings.judge_memory(replace(MEMORY, available=GIB // 2)),
        WARNING,
        "only 512 MiB are available",
    ),
    "large model": (findings.judge_memory(MEMORY, 20 * GIB), WARNING, "the largest model has 20.0 GiB"),
    "limits": (findings.judge_limits(4096, UNLIMITED), OK, "4096 open files"),
    "few files": (findings.judge_limits(256, 65536), WARNING, "may open 256 files"),
    "disk": (findings.judge_disks([Disk(("models",), "/", 9 * GIB, 10 * GIB)]), OK, "9.0 GiB of 10.0 GiB"),
    "low disk": (findings.judge_disks([Disk(("models",), "/", GIB, 10 * GIB)]), WARNING, "1.0 GiB of"),
    "full disk": (findings.judge_disks([Disk(("state",), "/", 0, 10 * GIB)]), PROBLEM, "(state)"),
    "models": (findings.judge_models(MODELS), OK, "2 usable in /models"),
    "no models": (findings.judge_models(replace(MODELS, count=0)), WARNING, "none usable in /models"),
    "broken": (
        findings.judge_models(replace(MODELS, broken={"a": "a.gguf: bad magic"})),
        WARNING,
        "'a' cannot be loaded: a.gguf: bad magic",
    ),
    "config": (findings.judge_config(replace(MODELS, files=("p.toml",))), OK, "p.toml is sound"),
    "config left out": (
        findings.judge_config(replace(MODELS, files=("p.toml",), left_out=("p.toml:3: x: is unknown",))),
        WARNING,
        "p.toml:3: x: is unknown",
    ),
    "config invalid": (
        findings.judge_invalid_config(["p.toml:3: x: is wrong"]),
        PROBLEM,
        "p.toml:3: x: is wrong",
    ),
    "state": ([findings.judge_state(StateDirectory("/state"))], OK, "/state is writable"),
    "state off": ([findings.judge_state(None)], OK, "not remembered"),
    "state fault": (
        [findings.judge_state(StateDirectory("/state", "Permission denied"))],
        PROBLEM,
        "Permission",
    ),
    "hub": (findings.judge_hub(HUB), OK, "not asked whether it answers, no token"),
    "hub offline": (findings.judge_hub(replace(HUB, offline=True)), OK, "offline"),
    "endpoint": (findings.judge_hub(replace(HUB, endpoint="hub.local")), PROBLEM, "is no address"),
    "hub cache": (findings.judge_hub(replace(HUB, cache_fault="Read-only")), WARNING, "cannot be written"),
    "no server": (findings.judge_running(None, "h:1", "0.1.0"), OK, "none answers at h:1"),
    "server": (findings.judge_running(RUNNING, "h:1", "0.1.0"), OK, "up 1 min, 1 models loaded"),
    "old server": (findings.judge_running(RUNNING, "h:1", "0.2.0"), WARNING, "it is version 0.1.0"),
    "stopping": (findings.judge_running(replace(RUNNING, serving=False), "h", "0.1.0"), WARNING, "stopping"),
    "failed": (
        findings.judge_running(replace(RUNNING, failed={"a": "It died."}), "h", "0.1.0"),
        WARNING,
        "model 'a' failed: It died.",
    ),
    "restarts": (
        findings.judge_running(replace(RUNNING, restarts={"a": 3}), "h", "0.1.0"),
        WARNING,
        "restarted 3 times",
    ),
    "free port": ([findings.judge_port(PORT)], OK, "is free"),
    "our port": (
        [findings.judge_port(replace(PORT, answer=Answer.PADDOCK, detail="0.1.0"))],
        OK,
        "Paddock 0.1.0 answers",
    ),
    "exposed": (findings.judge_exposure({"HTTP": "192.0.2.1"}), WARNING, "whoever reaches it"),
    "budget": (
        findings.judge_running(RUNNING, RUNNING.address, "0.1.0"),
        OK,
        "models hold 1.0 GiB of the 8.0 GiB they may have of RAM",
    ),
    "taken port": ([findings.judge_port(replace(PORT, answer=Answer.OTHER))], PROBLEM, "not Paddock"),
    "refused port": (
        [findings.judge_port(replace(PORT, answer=Answer.REFUSED, detail="Permission denied"))],
        PROBLEM,
        "cannot be listened on: Permission denied",
    ),
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_facts_are_judged(name: str) -> None:
    found, level, text = JUDGEMENTS[name]

    assert worst(found) == level
    assert any(text in finding.message for finding in found), found


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_what_is_not_well_says_what_to_do(name: str) -> None:
    assert all(bool(finding.advice) == (finding.level != OK) for finding in JUDGEMENTS[name][0])


def test_every_answer_at_a_port_is_judged() -> None:
    judged = {answer: findings.judge_port(replace(PORT, answer=answer)).level for answer in Answer}
    assert judged == {
        Answer.FREE: OK,
        Answer.PADDOCK: OK,
        Answer.OTHER: PROBLEM,
        Answer.REFUSED: PROBLEM,
    }


def test_many_broken_models_are_counted_rather_than_named() -> None:
    broken = {f"m{number:03}": "bad" for number in range(50)}
    found = findings.judge_models(replace(MODELS, count=50, broken=broken))

    assert len(found) == 1 + findings.NAMED_MODELS + 1
    assert found[-1].message == "30 more cannot be loaded"


def test_features_are_told_apart_by_backend() -> None:
    line = "CUDA : ARCHS = 500,860 | USE_GRAPHS = 1 | CPU : AVX = 1 | AVX2 = 0 | nonsense | "
    assert features_of(line) == {"CUDA": ("ARCHS=500,860", "USE_GRAPHS"), "CPU": ("AVX",)}


def test_the_memory_is_what_the_server_says_it_is() -> None:
    seen, own = machine.memory(), own_memory()

    assert (seen.limit or seen.total) == own.total_bytes


def test_the_build_is_described_by_the_process_the_server_asks() -> None:
    build = machine.build()

    assert features_of(build.system_info)["CPU"]
    assert not [gpu for gpu in build.gpus if gpu.name == "CPU"]


def test_a_directory_that_is_not_there_is_judged_by_where_it_would_be_made(tmp_path: Path) -> None:
    assert machine.write_fault(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_directory_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")

    assert "Not a directory" in machine.write_fault(tmp_path / "state")


def test_a_file_system_is_named_once_with_all_it_holds(tmp_path: Path) -> None:
    (disk,) = machine.disks([("models", tmp_path), ("models", tmp_path), ("state", tmp_path / "none")])

    assert disk.holds == ("models", "state")
    assert 0 <= disk.free_bytes <= disk.total_bytes


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@hub.local/x?token=secret", "https://hub.local/x"),
        ("https://huggingface.co", "https://huggingface.co"),
        ("http://[broken", "not an address"),
    ],
)
def test_no_credentials_of_an_endpoint_are_shown(url: str, shown: str) -> None:
    assert machine.without_credentials(url) == shown


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 4)", "signal 4: it said nothing"),
        ("import sys; sys.exit('cannot open libllama.so')", "exit code 1: cannot open libllama.so"),
    ],
)
def test_a_llama_that_does_not_load_says_how_it_ended(program: str, said: str) -> None:
    with pytest.raises(LlamaError, match=said):
        machine.build([sys.executable, "-c", program])


def test_a_llama_that_loads_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.2)
    with pytest.raises(LlamaError, match=r"longer than 0\.2 s"):
        machine.build([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ModuleNotFoundError("psutil")])
async def test_a_probe_that_fails_is_a_problem_and_the_others_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(machine, "limits", fail)
    config = ServerConfig.load({"models_dir": (tmp_path,), "grpc_port": 0, "port": 0, "state_dir": None})
    found = await examine(config, "127.0.0.1:1")

    (limits,) = [finding for finding in found if finding.area == "limits"]
    assert (limits.level, limits.message) == (PROBLEM, f"could not be examined: {error}")
    assert "server" in {finding.area for finding in found}


async def test_a_probe_that_hangs_is_a_problem_and_the_others_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()

    def hang(config: ServerConfig) -> Models:
        never.wait(60)
        return MODELS

    monkeypatch.setattr(machine, "models", hang)
    config = ServerConfig.load({"models_dir": (tmp_path,), "grpc_port": 0, "port": 0, "state_dir": None})
    found = await examine(config, "127.0.0.1:1", probe_seconds=5)
    never.set()

    (models,) = [finding for finding in found if finding.area == "models"]
    assert (models.level, models.message) == (PROBLEM, "could not be examined within 5 s")
    assert {"versions", "cpu", "limits", "disk", "ports", "server"} <= {finding.area for finding in found}
