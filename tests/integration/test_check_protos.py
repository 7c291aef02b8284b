"""Protos are compared with those of the last release, in a repository made for the purpose."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import check_protos

ROOT = Path(__file__).parents[2]
SECONDS = 50
PROTO = Path(check_protos.PUBLIC_PROTOS, "v1", "thing.proto")
RELEASED = """\
syntax = "proto3";

package paddock.v1;

message Thing {
  string name = 1;
  int32 size = 2;
}
"""
BROKEN = RELEASED.replace("int32 size = 2", "string size = 2")
EXTENDED = RELEASED.replace("}", "  bool new = 3;\n}")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one proto, committed but not released, that `check_protos` takes for its own."""
    for program, found in (("buf", check_protos.BUF.exists()), ("git", shutil.which("git"))):
        if not found:
            pytest.skip(
                f"{program} is not installed, and protos are compared with it; `make setup` brings buf"
            )
    for variable in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # a hook of git may run the tests
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(check_protos, "ROOT", tmp_path)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    git(tmp_path, "init", "--quiet")
    write_and_commit(tmp_path, RELEASED)
    return tmp_path


def git(repository: Path, *arguments: str) -> None:
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@localhost")
    own_way = ("-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false", "-c", "core.hooksPath=none")
    subprocess.run(["git", *who, *own_way, *arguments], cwd=repository, check=True, timeout=SECONDS)


def write_and_commit(repository: Path, proto: str) -> None:
    path = repository / PROTO
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(proto, encoding="utf-8")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "protos")


def test_what_breaks_clients_of_the_last_release_is_reported(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    git(repository, "tag", "v0.1.0")
    write_and_commit(repository, BROKEN)

    assert not check_protos.compatible_with_last_release()
    told = capfd.readouterr().out
    assert "break nothing since v0.1.0" in told
    assert str(PROTO) in told
    assert '"size"' in told


def test_what_is_not_committed_yet_is_compared_too(repository: Path) -> None:
    git(repository, "tag", "v0.1.0")
    (repository / PROTO).write_text(BROKEN, encoding="utf-8")

    assert not check_protos.compatible_with_last_release()


def test_a_new_field_breaks_nothing(repository: Path) -> None:
    git(repository, "tag", "v0.1.0")
    write_and_commit(repository, EXTENDED)

    assert check_protos.compatible_with_last_release()


def test_the_newest_release_counts_and_other_tags_do_not(repository: Path) -> None:
    git(repository, "tag", "v0.1.0")
    write_and_commit(repository, BROKEN)
    git(repository, "tag", "v0.2.0")
    write_and_commit(repository, BROKEN + "\n")
    git(repository, "tag", "nightly")

    assert check_protos.compatible_with_last_release()


def test_without_a_release_it_says_so_and_passes(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_and_commit(repository, BROKEN)

    assert check_protos.compatible_with_last_release()
    assert "not compared with the last release: git knows of no tag like v1.2.3" in capfd.readouterr().out


def test_a_release_before_there_were_protos_is_said_and_passes(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    git(repository, "rm", "--quiet", "-r", "protos")
    git(repository, "commit", "--quiet", "--message", "none")
    git(repository, "tag", "v0.1.0")
    write_and_commit(repository, RELEASED)

    assert check_protos.compatible_with_last_release()
    assert "not compared with v0.1.0: that release has none" in capfd.readouterr().out
