"""What the set-up promises to the person at the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import bootstrap
import gen_protos
import llama_wheel
import run_demo
from steps import StepError, fingerprint, run
from tools import lacking_go
from venvs import Environment, split_lock

SCRIPTS = Path(__file__).parents[2] / "scripts"
LOCK = """\
ninja==1.13.2 \\
    --hash=sha256:aa
numpy==1.0 ; python_full_version < '3.12' \\
    --hash=sha256:bb
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    environment = Environment(tmp_path / "venv", tmp_path / "logs")
    environment.path.mkdir()
    return environment


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failed_step_tells_the_cause_the_first_errors_and_the_last_lines(tmp_path: Path) -> None:
    code = (
        "print('ggml.c:1: error: No space left on device')\n"
        "for number in range(100): print('noise', number)\n"
        "raise SystemExit(3)"
    )

    with pytest.raises(StepError) as failure:
        run("compiling", python(code), log=tmp_path / "log")

    told = str(failure.value)
    assert told.startswith("compiling ended with status 3.\nThe disk is full.")
    assert "    ggml.c:1: error: No space left on device" in told
    assert told.endswith("    noise 99")
    assert "noise 70" not in told


def test_a_cause_is_told_once_however_many_lines_point_at_it(tmp_path: Path) -> None:
    code = "print('dial tcp: no such host')\nprint('ProxyError')\nraise SystemExit(1)"

    with pytest.raises(StepError) as failure:
        run("downloading", python(code), log=tmp_path / "log")

    assert str(failure.value).count("could not be reached") == 1


def test_a_step_whose_program_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="there is no program paddock-no-such-tool"):
        run("building", ["paddock-no-such-tool"], log=tmp_path / "log")


INTERRUPTED_IMPORT = """
import runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupts())
sys.path.insert(0, {scripts!r})
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "module"),
    [("run_demo.py", "argparse"), ("run_demo.py", "steps"), ("bootstrap.py", "llama_wheel")],
)
def test_ctrl_c_while_a_script_still_imports_ends_it_without_a_word(script: str, module: str) -> None:
    code = INTERRUPTED_IMPORT.format(module=module, scripts=str(SCRIPTS), script=str(SCRIPTS / script))

    done = subprocess.run(python(code), capture_output=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_an_interrupted_step_leaves_no_process_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    step = f"run('compiling', ['sh', '-c', 'sleep 300 & echo $!; wait'], log=Path({str(log)!r}))"
    code = f"from pathlib import Path\nfrom steps import run\n{step}"
    script = subprocess.Popen(
        python(code), cwd=SCRIPTS, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, stderr=subprocess.DEVNULL
    )
    grandchild = first_line_of(log)

    script.send_signal(signal.SIGINT)

    assert script.wait(timeout=30) != 0
    wait_for_exit(int(grandchild))


def first_line_of(log: Path) -> str:
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return log.read_text().splitlines()[0]


def wait_for_exit(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=30)


def test_a_package_is_taken_out_of_a_lock_with_its_hashes() -> None:
    entry, others = split_lock(LOCK, "ninja")

    assert entry == "ninja==1.13.2 \\\n    --hash=sha256:aa\n"
    assert entry + others == LOCK


def test_a_lock_without_the_package_is_refused() -> None:
    with pytest.raises(StepError, match="names torch 0 times"):
        split_lock(LOCK, "torch")


def test_the_compiled_wheel_depends_on_flags_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama_wheel.build_key("")
    with_cuda = llama_wheel.build_key("-DGGML_CUDA=on")
    monkeypatch.setenv("CXX", "clang++")

    assert len({plain, with_cuda, llama_wheel.build_key("")}) == 3


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "-DGGML_CUDA=on"), ("", ""), (" -DGGML_VULKAN=on ", "-DGGML_VULKAN=on")]
)
def test_build_flags_stay_until_they_are_named_again(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    environment.mark_done(cmake_args="-DGGML_CUDA=on")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    if given is not None:
        monkeypatch.setenv("CMAKE_ARGS", given)

    assert expected == bootstrap.wanted_cmake_args(environment)


def test_a_step_is_done_for_the_inputs_it_was_made_from(environment: Environment) -> None:
    environment.mark_done(packages=fingerprint("lock 1"))
    environment.mark_done(project=fingerprint("project"))

    assert environment.is_done("packages", fingerprint("lock 1"))
    assert not environment.is_done("packages", fingerprint("lock 2"))
    assert not environment.is_done("llama", fingerprint("lock 1"))


def test_stamps_that_were_cut_off_count_as_none(environment: Environment) -> None:
    environment.mark_done(packages="key")
    (environment.path / "paddock-setup.json").write_text('{"packages": "ke')

    assert environment.stamps() == {}


def test_an_environment_without_an_interpreter_does_not_work(environment: Environment) -> None:
    assert not environment.works()


def test_a_compile_without_a_compiler_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    with pytest.raises(StepError, match=r"there is no C compiler .* build-essential"):
        llama_wheel.check_toolchain()


def test_a_compile_without_cmake_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable, name in (("CC", "cc"), ("CXX", "c++")):
        monkeypatch.delenv(variable, raising=False)
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(StepError, match=r"there is no cmake, and llama.cpp needs 3\.21 or newer"):
        llama_wheel.check_toolchain()


@pytest.mark.parametrize(
    ("says", "lacking"), [("go1.24.0", None), ("go1.26.8", None), ("go1.23.9", "Go is older than 1.24")]
)
def test_go_is_used_when_it_knows_tool_directives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, lacking: str | None
) -> None:
    fake = tmp_path / "go"
    fake.write_text(f"#!/bin/sh\necho {says}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert lacking == lacking_go()


def test_go_is_reported_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert lacking_go() == "Go is not installed"


def test_stubs_that_differ_are_counted_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, made = tmp_path / "kept", tmp_path / "made"
    files = {kept: {"same": "1", "changed": "1", "stale": "1"}, made: {"same": "1", "changed": "2"}}
    for root, contents in files.items():
        (root / "v1").mkdir(parents=True)
        for name, content in contents.items():
            (root / "v1" / f"{name}_pb2.py").write_text(content)
    monkeypatch.setattr(gen_protos, "ROOT", kept)

    assert gen_protos.compare_or_write(["v1"], made, check=True) == 2
    assert (kept / "v1" / "stale_pb2.py").exists()
    assert gen_protos.compare_or_write(["v1"], made, check=False) == 2
    assert gen_protos.compare_or_write(["v1"], made, check=True) == 0


@pytest.mark.parametrize("has_grpcurl", [True, False])
def test_the_last_page_of_make_run_fits_a_small_terminal_below_the_answer(
    has_grpcurl: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def which(name: str) -> str | None:
        return name if has_grpcurl else None

    monkeypatch.setattr(run_demo.shutil, "which", which)
    monkeypatch.setattr(run_demo, "CACHE", run_demo.ROOT / ".none")

    run_demo.tell_what_next(8080, 50051)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 18  # of 22; the answer takes the others
    assert max(map(len, lines)) <= 80
    assert any("make tools" in line for line in lines) is not has_grpcurl


def test_ports_that_are_taken_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_listening(port: int) -> bool:
        return port in taken

    monkeypatch.setattr(run_demo, "is_listening", is_listening)
    taken = {8080}
    with pytest.raises(StepError, match=r"^port 8080 is taken"):
        run_demo.show(8080, 50051)
    taken = {8080, 50051}
    with pytest.raises(StepError, match=r"^ports 8080 and 50051 are taken"):
        run_demo.show(8080, 50051)
