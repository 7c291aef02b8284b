"""What `paddock doctor` makes of facts, and how it reads them."""

from __future__ import annotations

import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest

from paddock.listening import GRPC, HTTP, Front, ListenFault
from paddock_server.addresses import without_credentials
from paddock_server.config import ServerConfig
from paddock_server.doctor import (
    examine,
    examine_server,
    findings,
    is_own,
    machine,
    network,
    own_address,
    serving,
)
from paddock_server.doctor.findings import (
    GIB,
    UNLIMITED,
    Build,
    Cpu,
    Disk,
    Finding,
    Hub,
    Level,
    Memory,
    Models,
    StateDirectory,
    Versions,
    features_of,
)
from paddock_server.doctor.machine import LlamaError
from paddock_server.doctor.serving import Answer, Port, Running, Unanswered
from paddock_server.memory import DeviceMemory, own_memory

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
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
PORT = Port(GRPC, "127.0.0.1:50051", Answer.NOBODY)
NOBODY = Unanswered("h:1", "The connection failed.")
NVIDIA = replace(BUILD, gpu_hardware=("NVIDIA",))


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
    "labelled llama": (findings.judge_versions(replace(VERSIONS, llama_cpp="0.3.36+cu124")), OK, "+cu124"),
    "build": (findings.judge_build(BUILD), OK, "AVX2"),
    "slow build": (
        findings.judge_build(replace(BUILD, cpu_flags=frozenset({"avx2", "avx512f"}))),
        WARNING,
        "AVX512, which llama.cpp was built without",
    ),
    "idle gpu": (findings.judge_build(NVIDIA), WARNING, "cannot use it"),
    "gpu": (
        findings.judge_build(
            replace(BUILD, gpu_offload=True, gpus=(DeviceMemory("CUDA0", "a card", 2 * GIB, GIB),))
        ),
        OK,
        "CUDA0: a card, 1.0 GiB of 2.0 GiB free",
    ),
    "hidden gpu": (
        findings.judge_build(replace(NVIDIA, gpu_offload=True)),
        WARNING,
        "built for one, finds none",
    ),
    "unknown build": (findings.judge_build(replace(BUILD, system_info="x")), OK, "says about itself: x"),
    "cpu": (findings.judge_cpu(CPU, threads=0), OK, "8 logical cores, 4 physical"),
    "quota": (findings.judge_cpu(replace(CPU, quota=1.5), threads=0), WARNING, "4 threads by default"),
    "affinity": (findings.judge_cpu(replace(CPU, allowed=2), threads=0), OK, "2 of them usable"),
    "threads": (findings.judge_cpu(CPU, threads=9), WARNING, "--threads is 9"),
    "threads fit": (findings.judge_cpu(replace(CPU, quota=2.0), threads=2), OK, "2 of them usable"),
    "memory": (findings.judge_memory(MEMORY), OK, "16.0 GiB, 8.0 GiB available"),
    "cgroup": (findings.judge_memory(replace(MEMORY, limit=2 * GIB)), OK, "2.0 GiB (the limit of a cgroup"),
    "little memory": (
        findings.judge_memory(replace(MEMORY, available=GIB // 2)),
        WARNING,
        "only 512 MiB are available",
    ),
    "limits": (findings.judge_limits(4096, UNLIMITED), OK, "4096 open files"),
    "few files": (findings.judge_limits(256, 65536), WARNING, "may open 256 files"),
    "disk": (findings.judge_disks([Disk(("hub cache",), "/", 9 * GIB, 10 * GIB)]), OK, "9.0 GiB of 10.0 GiB"),
    "low disk": (findings.judge_disks([Disk(("hub cache",), "/", GIB, 10 * GIB)]), WARNING, "1.0 GiB of"),
    "low disk of state": (findings.judge_disks([Disk(("state",), "/", GIB, 10 * GIB)]), OK, "1.0 GiB of"),
    "full disk": (findings.judge_disks([Disk(("models", "state"), "/", 0, GIB)]), PROBLEM, "(models, state)"),
    "read-only models": (findings.judge_disks([Disk(("models",), "/cd", 0, GIB)]), OK, "0 B of 1.0 GiB free"),
    "models": (findings.judge_models(MODELS, 8 * GIB), OK, "2 usable in /models"),
    "no models": (findings.judge_models(replace(MODELS, count=0), GIB), WARNING, "none usable in /models"),
    "broken": (
        findings.judge_models(replace(MODELS, broken={"a": "a.gguf: bad magic"}), GIB),
        WARNING,
        "'a' cannot be loaded: a.gguf: bad magic",
    ),
    "large model": (findings.judge_models(MODELS, GIB - 1), WARNING, "the largest has 1.0 GiB, more than"),
    "only absent": (findings.judge_models(replace(MODELS, absent=2), GIB), WARNING, "none usable in /models"),
    "absent": (
        findings.judge_models(replace(MODELS, absent=1), GIB),
        OK,
        "1 model of the configuration",
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
    "no hub": (findings.judge_hub(None), OK, "off: its models are neither served nor downloaded"),
    "no server": (serving.judge_unanswered(NOBODY, asked_for=False), OK, "none answers at h:1"),
    "no server where one was": (
        serving.judge_unanswered(NOBODY, asked_for=True),
        PROBLEM,
        "no Paddock answers at h:1: The connection failed.",
    ),
    "server": (serving.judge_running(RUNNING, "0.1.0"), OK, "up 1 min, 1 model loaded"),
    "budget": (
        serving.judge_running(RUNNING, "0.1.0"),
        OK,
        "1.0 GiB of the 8.0 GiB they may have of RAM",
    ),
    "old server": (serving.judge_running(RUNNING, "0.2.0"), WARNING, "it is version 0.1.0"),
    "stopping": (serving.judge_running(replace(RUNNING, serving=False), "0.1.0"), WARNING, "stopping"),
    "no health": (serving.judge_running(replace(RUNNING, serving=None), "0.1.0"), WARNING, "does not answer"),
    "no list": (serving.judge_running(replace(RUNNING, loaded=None), "0.1.0"), WARNING, "does not list"),
    "failed": (
        serving.judge_running(replace(RUNNING, failed={"a": "It died."}), "0.1.0"),
        WARNING,
        "model 'a' failed: It died.",
    ),
    "restarts": (
        serving.judge_running(replace(RUNNING, restarts={"a": 3}), "0.1.0"),
        WARNING,
        "restarted 3 times",
    ),
    "many restarts": (
        serving.judge_running(replace(RUNNING, restarts={f"m{number}": 1 for number in range(25)}), "0.1.0"),
        WARNING,
        "5 more workers were restarted",
    ),
    "free port": ([serving.judge_port(PORT)], OK, "is free"),
    "our port": (
        [serving.judge_port(replace(PORT, answer=Answer.PADDOCK, version="0.1.0"))],
        OK,
        "gRPC 127.0.0.1:50051: Paddock 0.1.0 answers",
    ),
    "our port, no version": (
        [serving.judge_port(replace(PORT, answer=Answer.PADDOCK))],
        OK,
        "gRPC 127.0.0.1:50051: Paddock answers",
    ),
    "taken port": (
        [serving.judge_port(replace(PORT, answer=Answer.OTHER))],
        PROBLEM,
        "does not answer as Paddock",
    ),
    "refused port": (
        [serving.judge_port(replace(PORT, fault=ListenFault("Permission denied", "Choose another.")))],
        PROBLEM,
        "cannot be listened on: Permission denied",
    ),
    "one port for both": (serving.judge_same_port(8080, 8080), PROBLEM, "both to listen on port 8080"),
    "exposed": (serving.judge_exposure({"HTTP": "192.0.2.1"}), WARNING, "whoever reaches it"),
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
    judged = {answer: serving.judge_port(replace(PORT, answer=answer)).level for answer in Answer}
    assert judged == {Answer.NOBODY: OK, Answer.PADDOCK: OK, Answer.OTHER: PROBLEM}


def test_two_free_ports_are_not_the_same_one() -> None:
    assert serving.judge_same_port(0, 0) == serving.judge_same_port(50051, 8080) == []


def test_many_broken_models_are_counted_rather_than_named() -> None:
    broken = {f"m{number:03}": "bad" for number in range(50)}
    found = findings.judge_models(replace(MODELS, count=50, broken=broken), GIB)

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
        ("user:secret@hub.local", "hub.local"),
        ("https:/user:secret@hub.local?token=secret", "hub.local"),
        ("hub.local", "hub.local"),
    ],
)
def test_no_credentials_of_an_endpoint_are_shown(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


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


def test_an_answer_without_its_facts_is_no_answer() -> None:
    program = """print('{"gpus": [], "features": []}')"""
    with pytest.raises(LlamaError, match="exit code 0: it said nothing"):
        machine.build([sys.executable, "-c", program])


def nothing_served(tmp_path: Path) -> ServerConfig:
    return ServerConfig.load({"models_dir": (tmp_path,), "grpc_port": 0, "port": 0, "state_dir": None})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
        (TimeoutError(110, "Connection timed out"), "[Errno 110] Connection timed out"),
        (ModuleNotFoundError("psutil"), "psutil"),
        (ValueError("'abc' is no number"), "ValueError: 'abc' is no number"),
        (RuntimeError("no home directory"), "RuntimeError: no home directory"),
        (psutil.AccessDenied(1), "AccessDenied: (pid=1)"),
    ],
    ids=["file", "file server", "module", "value", "home", "process"],
)
async def test_a_probe_that_fails_is_a_problem_and_the_others_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(machine, "limits", fail)
    found = await examine(nothing_served(tmp_path))

    (limits,) = [finding for finding in found if finding.area == "limits"]
    assert (limits.level, limits.message) == (PROBLEM, f"could not be examined: {said}")
    assert limits.advice
    assert {"versions", "ports"} <= {finding.area for finding in found}


async def test_a_probe_that_hangs_is_a_problem_and_the_others_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()

    def hang(config: ServerConfig) -> Models:
        never.wait(60)
        return MODELS

    monkeypatch.setattr(machine, "models", hang)
    found = await examine(nothing_served(tmp_path), probe_seconds=5)
    never.set()

    (models,) = [finding for finding in found if finding.area == "models"]
    assert (models.level, models.message) == (PROBLEM, "could not be examined within 5 s")
    assert {"versions", "cpu", "memory", "limits", "disk", "ports"} <= {finding.area for finding in found}


async def test_a_hub_that_is_turned_off_is_not_judged(tmp_path: Path) -> None:
    config = ServerConfig.load({"models_dir": (tmp_path,), "grpc_port": 0, "port": 0, "hf_cache": False})
    found = await examine(config)

    assert [finding.message for finding in found if finding.area == "hub"] == [
        "off: its models are neither served nor downloaded"
    ]
    assert not [finding for finding in found if "hub cache" in finding.message]


# Addresses


@pytest.fixture
def taken() -> Generator[int]:
    """A port that somebody listens on and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("front", [GRPC, HTTP], ids=["gRPC", "HTTP"])
async def test_who_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, taken: int, front: Front
) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.2)

    for host in ("127.0.0.1", "0.0.0.0"):  # noqa: S104  # asked for, not listened on
        assert (await network.examine_port(front, host, taken)).answer is Answer.OTHER


async def test_a_port_that_is_held_without_an_answer_is_refused() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = await network.examine_port(HTTP, "127.0.0.1", holder.getsockname()[1])

    assert port.fault == ListenFault(
        "another program has the port", "Stop it, or choose another with --port."
    )


@pytest.mark.parametrize("host", ["a..b", "203.0.113.1"])
async def test_an_address_that_is_not_ours_is_refused_with_the_flag_of_the_host(host: str) -> None:
    port = await network.examine_port(GRPC, host, 1)

    assert port.fault is not None
    assert port.fault.advice == "Choose another address with --grpc-host."


async def test_a_name_service_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hang(*_: object, **__: object) -> None:
        never.wait(60)

    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    port = await network.examine_port(GRPC, "hub.invalid", 1)
    never.set()

    assert port.fault is not None
    assert port.fault.reason == "the name service did not answer within 0.05 s"


async def test_a_server_that_does_not_answer_in_time_says_so(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.2)

    (server,) = await examine_server(f"127.0.0.1:{taken}", asked_for=True)

    assert server.level == PROBLEM
    assert server.message == f"no Paddock answers at 127.0.0.1:{taken}: there was no answer within 0.2 s"


@pytest.mark.parametrize(
    ("host", "port", "address", "own"),
    [
        ("127.0.0.1", 50051, "127.0.0.1:50051", ["localhost:50051", "[::1]:50051"]),
        ("0.0.0.0", 7, "127.0.0.1:7", ["127.0.0.1:7", "localhost:7"]),  # noqa: S104
        ("::", 7, "[::1]:7", ["[::1]:7"]),
        ("192.0.2.7", 7, "192.0.2.7:7", ["192.0.2.7:7"]),
        ("127.0.0.1", 0, "", []),
    ],
)
def test_a_server_is_ours_by_its_address(
    tmp_path: Path, host: str, port: int, address: str, own: list[str]
) -> None:
    config = ServerConfig.load({"models_dir": (tmp_path,), "grpc_host": host, "grpc_port": port})

    assert own_address(config) == address
    assert all(is_own(one, config) for one in own)
    assert not any(
        is_own(one, config) for one in ("192.0.2.1:50051", "127.0.0.1:50052", "nonsense", "unix:/x")
    )
