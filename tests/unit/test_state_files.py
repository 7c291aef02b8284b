"""Files the server remembers things in: what is no good is set aside, and nothing stops a start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paddock_server.state_files import (
    StateFile,
    StateFileError,
    check_directory,
    read_document,
    read_or_set_aside,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def names(document: Any) -> list[str]:
    return [one["name"].upper() for one in document["names"]]


def read(path: Path) -> list[str] | None:
    return read_document(path, names, version=3, max_bytes=100)


def remembered(path: Path | None) -> list[str] | None:
    return asyncio.run(read_or_set_aside(path, read))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "names.json"


def aside(path: Path) -> Path:
    return path.with_name("names.json.corrupt")


def test_what_a_file_holds_is_read(path: Path) -> None:
    path.write_text('{"version": 3, "names": [{"name": "a"}, {"name": "b"}], "more": 1}')
    assert remembered(path) == ["A", "B"]
    assert not aside(path).exists()


@pytest.mark.parametrize("given", [True, False])
def test_no_file_and_no_path_are_nothing(path: Path, given: bool) -> None:
    assert remembered(path if given else None) is None
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError: 'version'"),
        (b'{"version": 4, "names": []}', "its version is 4; 3 is known"),
        (b'{"version": 3}', "KeyError: 'names'"),
        (b'{"version": 3, "names": [{"name": 1}]}', "AttributeError"),
        (b" " * 101, "larger than 100 bytes"),
    ],
)
def test_a_file_that_is_no_good_says_why_and_is_set_aside(
    path: Path, content: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    with pytest.raises(StateFileError, match=why):
        read(path)
    assert remembered(path) is None
    assert aside(path).read_bytes() == content
    assert not path.exists()
    assert "state_file_corrupt" in capsys.readouterr().out


def test_deep_nesting_is_no_good_either(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(StateFileError, match="RecursionError"):
        read_document(path, names, version=3, max_bytes=200_000)


def blocked(path: Path) -> None:
    path.mkdir()


def blocked_aside(path: Path) -> None:
    path.write_bytes(b"{")
    (aside(path) / "in the way").mkdir(parents=True)


@pytest.mark.parametrize("block", [blocked, blocked_aside])
def test_a_file_that_cannot_be_read_or_moved_is_left_and_warned_of(
    path: Path, block: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    block(path)
    assert remembered(path) is None
    assert path.exists()
    assert "state_file_unreadable" in capsys.readouterr().out


def test_a_directory_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_directory(tmp_path / "file")


def test_what_could_not_be_written_is_written_later_and_the_log_says_both(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    async def change_twice() -> None:
        file = StateFile(path, lambda: b"content")
        running = asyncio.create_task(file.run())
        file.changed()
        await file.caught_up()
        said.append(capsys.readouterr().out)
        await asyncio.to_thread(path.rmdir)
        file.changed()
        await file.caught_up()
        file.close()
        await running

    path.mkdir()  # no file can take its name
    asyncio.run(change_twice())
    assert "state_file_not_written" in said[0]
    assert "would not outlive this server" in said[0]
    assert "state_file_written_again" in capsys.readouterr().out
    assert path.read_bytes() == b"content"
