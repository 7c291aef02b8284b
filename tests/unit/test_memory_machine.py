"""What the machine has: control groups of both versions, and what the probe for accelerators says."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import psutil
import pytest

from paddock_server.memory import RAM, DeviceMemory, MachineWatch, own_memory
from paddock_server.memory.cgroups import cpu_quota
from paddock_server.memory.machine import FRESH_SECONDS, MOST_RETRY_SECONDS, parsed_answer

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
GPU = (
    b'{"gpus": [{"name": "CUDA0", "description": "H200", "total_bytes": 9, "free_bytes": 7}], "features": []}'
)


class Groups:
    """A hierarchy of control groups in files."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.own = folder / "self"

    def write(self, group: str, **files: str) -> None:
        directory = self.root / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)

    def memory(self) -> DeviceMemory:
        return own_memory(self.root, self.own)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_control_groups_it_is_the_machine(groups: Groups) -> None:
    found = groups.memory()
    assert (found.name, found.total_bytes) == (RAM, psutil.virtual_memory().total)


def test_the_limit_of_version_2_is_the_memory(groups: Groups) -> None:
    groups.own.write_text("0::/a/b\n")
    groups.write("a/b", memory__max=f"{100 * MIB}\n", memory__current=f"{30 * MIB}\n")
    groups.write("a/b", memory__stat=f"anon 5\ninactive_file {10 * MIB}\nfile 7\n")
    found = groups.memory()
    assert found.total_bytes == 100 * MIB
    # Pages nobody uses are free.
    assert found.free_bytes == 80 * MIB


def test_the_tightest_limit_on_the_way_up_counts(groups: Groups) -> None:
    groups.own.write_text("0::/a/b\n")
    groups.write("a/b", memory__max="max\n", memory__current="0\n")
    groups.write("a", memory__max=f"{50 * MIB}\n", memory__current=f"{20 * MIB}\n")
    groups.write(".", memory__max=f"{90 * MIB}\n", memory__current=f"{80 * MIB}\n")
    found = groups.memory()
    assert (found.total_bytes, found.free_bytes) == (50 * MIB, 10 * MIB)


def test_the_limit_of_version_1_is_the_memory(groups: Groups) -> None:
    groups.own.write_text("9:cpu:/x\n4:memory:/box\n0::/\n")
    groups.write("memory/box", memory__limit_in_bytes=f"{64 * MIB}", memory__usage_in_bytes=f"{4 * MIB}")
    groups.write("memory", memory__limit_in_bytes="9223372036854771712")
    found = groups.memory()
    assert (found.total_bytes, found.free_bytes) == (64 * MIB, 60 * MIB)


def test_a_path_of_the_host_finds_the_root_of_the_container(groups: Groups) -> None:
    groups.own.write_text("0::/../host/only\n")
    groups.write(".", memory__max=f"{64 * MIB}", memory__current="0")
    assert groups.memory().total_bytes == 64 * MIB


@pytest.mark.parametrize("text", ["max", "", "many", "-1", "²"])
def test_what_is_no_number_is_no_limit(groups: Groups, text: str) -> None:
    groups.own.write_text("0::/a\n")
    groups.write("a", memory__max=text)
    assert groups.memory().total_bytes == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "quota"), [("50000 100000\n", 0.5), ("max 100000\n", None), ("", None), ("1 0\n", None)]
)
def test_a_quota_of_processor_time_is_counted_in_processors(
    groups: Groups, text: str, quota: float | None
) -> None:
    groups.own.write_text("0::/a\n")
    groups.write("a", cpu__max=text)
    assert cpu_quota(groups.root, groups.own) == quota


def test_the_quota_of_version_1_is_in_two_files_and_the_smallest_on_the_way_up_counts(groups: Groups) -> None:
    groups.own.write_text("3:memory:/box\n2:cpu,cpuacct:/box\n1:cpuset:/\n")
    groups.write("cpu/box", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    groups.write("cpu", cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(groups.root, groups.own) == 1.5


def test_the_answer_of_the_probe_is_devices_and_types() -> None:
    gpus, types = parsed_answer(GPU.replace(b"[]", b'["AVX2", "REPACK"]'))
    assert gpus == (DeviceMemory("CUDA0", "H200", 9, 7),)
    assert {"Q4_0", "Q4_K"} <= types
    assert "Q8_0" not in types


def test_a_build_that_reorders_nothing_has_no_types() -> None:
    assert parsed_answer(b'{"gpus": [], "features": ["AVX2"]}') == ((), frozenset())


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"gpus": [1], "features": []}', b'{"gpus": 3}', b"\xff"]
)
def test_an_answer_that_describes_no_devices_is_an_error(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed_answer(answer)


async def test_accelerators_come_behind_the_memory_of_the_machine() -> None:
    watch = MachineWatch((sys.executable, "-c", f"print({GPU.decode()!r})"))
    machine = await watch.look()
    assert [device.name for device in machine.devices] == [RAM, "CUDA0"]
    assert (machine.placement.gpus, machine.placement.gpu_free_bytes) == (("CUDA0",), (7,))


@pytest.mark.parametrize(
    "command",
    [
        ("/nonexistent/program",),
        (sys.executable, "-c", "raise SystemExit(3)"),
        (sys.executable, "-c", "print('no devices')"),
        (sys.executable, "-c", "import time; time.sleep(60)"),
    ],
)
async def test_a_probe_that_fails_leaves_the_memory_of_the_machine(command: tuple[str, ...]) -> None:
    machine = await MachineWatch(command, timeout_seconds=0.5).look()
    assert [device.name for device in machine.devices] == [RAM]


class Probe:
    """A probe that answers only while told to, and notes each time it is asked."""

    def __init__(self, folder: Path) -> None:
        self._asked = folder / "asked"
        self._answer = folder / "answer"
        self._asked.touch()
        script = f"open({str(self._asked)!r}, 'a').write('x'); print(open({str(self._answer)!r}).read())"
        self.command = (sys.executable, "-c", script)

    def answers(self, yes: bool) -> None:
        if yes:
            self._answer.write_bytes(GPU)
        else:
            self._answer.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        return len(self._asked.read_text())


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(tmp_path)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_probe_that_failed_is_asked_again_after_a_while(probe: Probe) -> None:
    clock = Clock()
    watch = MachineWatch(probe.command, clock=clock)
    assert len((await watch.look()).devices) == 1
    clock.now += FRESH_SECONDS - 1
    probe.answers(True)
    assert len((await watch.look()).devices) == 1
    assert probe.count == 1
    clock.now += 2
    assert [device.name for device in (await watch.look()).devices] == [RAM, "CUDA0"]


async def test_a_probe_that_keeps_failing_is_asked_less_and_less_and_never_given_up(probe: Probe) -> None:
    clock = Clock()
    watch = MachineWatch(probe.command, clock=clock)
    asked_at: list[float] = []
    for second in range(300):
        clock.now = 1000.0 + second
        before = probe.count
        await watch.look()
        if probe.count > before:
            asked_at.append(second)
    waits = [later - earlier for earlier, later in pairwise(asked_at)]
    assert waits == sorted(waits)
    assert waits[0] == FRESH_SECONDS
    assert waits[-1] == MOST_RETRY_SECONDS


async def test_what_is_known_of_accelerators_outlives_a_probe_that_fails(probe: Probe) -> None:
    clock = Clock()
    watch = MachineWatch(probe.command, clock=clock)
    probe.answers(True)
    await watch.look()
    probe.answers(False)
    clock.now += FRESH_SECONDS
    assert len((await watch.look()).devices) == 2
    assert probe.count == 2
    probe.answers(True)
    clock.now += FRESH_SECONDS
    await watch.look()
    clock.now += FRESH_SECONDS
    await watch.look()
    assert probe.count == 4, "one that answered again is asked as often as before"


async def test_a_machine_without_accelerators_is_asked_once(tmp_path: Path) -> None:
    clock = Clock()
    asked = tmp_path / "asked"
    script = f"open({str(asked)!r}, 'a').write('x'); print('{{\"gpus\": [], \"features\": []}}')"
    watch = MachineWatch((sys.executable, "-c", script), clock=clock)
    for _ in range(3):
        await watch.look()
        clock.now += 1000
    assert asked.read_text() == "x"


async def test_the_real_probe_answers() -> None:
    machine = await MachineWatch().look()
    assert machine.devices[0].total_bytes > 0
