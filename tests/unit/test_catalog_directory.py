from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from paddock_server.catalog import Catalog, CatalogEntry, directory
from tests.unit import gguf_bytes as gb
from tests.unit.gguf_bytes import Gguf, Tensor

MODEL = Gguf()
NOT_UTF_8 = pytest.param(
    b"bad\xff.gguf", marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS has UTF-8 names only")
)


def _typed(general_type: str, architecture: str = "llama") -> Gguf:
    return Gguf([("general.architecture", gb.text(architecture)), ("general.type", gb.text(general_type))])


def _shard(number: int, count: int, tensor_count: int | None = None) -> Gguf:
    first = [("general.architecture", gb.text("llama"))] if number == 1 else []
    tensors = [Tensor(f"blk.{number}.weight")]
    return Gguf(
        [
            *first,
            ("split.no", gb.number(gb.UINT16, number - 1)),
            ("split.count", gb.number(gb.UINT16, count)),
            ("split.tensors.count", gb.number(gb.INT32, count if tensor_count is None else tensor_count)),
        ],
        tensors,
    )


def _write_shards(folder: Path, stem: str, count: int, present: range | None = None) -> None:
    for number in present or range(1, count + 1):
        _shard(number, count).write(folder / f"{stem}-{number:05}-of-{count:05}.gguf")


def _problem(entry: CatalogEntry) -> tuple[str, str]:
    assert entry.problem is not None
    assert entry.facts is None
    assert set(entry.problem.metadata) == {"file", "what", "where"}
    for part in ("file", "what"):
        assert entry.problem.metadata[part] in entry.problem.message
    return str(entry.problem.reason), entry.problem.message


def test_a_file_is_a_model_named_like_it(tmp_path: Path) -> None:
    path = MODEL.write(tmp_path / "Qwen2.5-0.5B.q4_k_m.gguf")

    (entry,) = Catalog([tmp_path]).scan().values()

    assert entry.id == "Qwen2.5-0.5B.q4_k_m"
    assert entry.path == path
    assert entry.shard_paths == (path,)
    assert entry.relative_path == "Qwen2.5-0.5B.q4_k_m.gguf"
    assert entry.size_bytes == path.stat().st_size
    assert entry.modified_ns == path.stat().st_mtime_ns
    assert entry.facts is not None
    assert entry.facts.architecture == "llama"
    assert entry.problem is None


def test_the_suffix_of_a_file_counts_in_any_case(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "UPPER.GGUF")
    _write_shards(tmp_path, "big", 2)
    for shard in list(tmp_path.glob("big*")):
        shard.rename(shard.with_suffix(".Gguf"))

    entries = Catalog([tmp_path]).scan()

    assert list(entries) == ["UPPER", "big"]
    assert all(entry.problem is None for entry in entries.values())


def test_a_folder_with_one_file_is_a_model_named_like_the_folder(tmp_path: Path) -> None:
    path = MODEL.write(tmp_path / "Folder" / "ggml-model.gguf")

    (entry,) = Catalog([tmp_path]).scan().values()

    assert (entry.id, entry.path, entry.relative_path) == ("Folder", path, "Folder/ggml-model.gguf")


@pytest.mark.parametrize(("folder", "id_"), [("", "big-q4"), ("Big", "Big")])
def test_a_set_of_shards_is_one_model_loaded_by_its_first(tmp_path: Path, folder: str, id_: str) -> None:
    _write_shards(tmp_path / folder, "big-q4", 3)

    (entry,) = Catalog([tmp_path]).scan().values()

    assert entry.id == id_
    assert entry.path == tmp_path / folder / "big-q4-00001-of-00003.gguf"
    assert [path.name for path in entry.shard_paths] == [f"big-q4-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert entry.size_bytes == sum(path.stat().st_size for path in entry.shard_paths)
    assert entry.facts is not None
    assert (entry.facts.tensor_count, entry.facts.parameter_count) == (3, 3 * 128)


def test_every_shard_and_the_folder_lead_to_the_same_files(tmp_path: Path) -> None:
    _write_shards(tmp_path / "Big", "big", 3)
    catalog = Catalog([tmp_path])
    whole = catalog.scan()["Big"]

    for path in ("Big", "Big/big-00001-of-00003.gguf", "Big/big-00003-of-00003.gguf"):
        entry = catalog.resolve_local(path)
        assert (entry.path, entry.shard_paths, entry.facts) == (whole.path, whole.shard_paths, whole.facts)


@pytest.mark.parametrize(("present", "missing"), [(range(1, 3), 3), (range(2, 4), 1), (range(2, 3), 1)])
def test_a_set_with_missing_shards_is_an_entry_that_says_so(
    tmp_path: Path, present: range, missing: int
) -> None:
    _write_shards(tmp_path, "big", 3, present)

    entry = Catalog([tmp_path]).scan()["big"]

    assert entry.path == tmp_path / "big-00001-of-00003.gguf"
    reason, message = _problem(entry)
    assert reason == "MODEL_CORRUPT"
    absent = (
        f"{3 - len(present)} of 3 shards are missing, the first of them 'big-0000{missing}-of-00003.gguf'"
    )
    assert absent in message


def test_a_set_of_absurd_size_is_described_in_few_words(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "big-00001-of-99999.gguf")

    reason, message = _problem(Catalog([tmp_path]).scan()["big"])

    assert reason == "MODEL_CORRUPT"
    assert "99998 of 99999 shards are missing, the first of them 'big-00002-of-99999.gguf'" in message


@pytest.mark.parametrize("numbering", ["00000-of-00002", "00003-of-00002", "00001-of-00000"])
def test_a_shard_number_outside_its_set_is_an_entry_that_says_so(tmp_path: Path, numbering: str) -> None:
    MODEL.write(tmp_path / f"big-{numbering}.gguf")

    reason, message = _problem(Catalog([tmp_path]).scan()["big"])

    assert reason == "MODEL_CORRUPT"
    assert "shards count from 1" in message


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    _write_shards(tmp_path, "big", 2)
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(_shard(2, 2).content()[:-200])

    reason, message = _problem(Catalog([tmp_path]).scan()["big"])

    assert reason == "MODEL_CORRUPT"
    assert message.startswith("big-00002-of-00002.gguf: is truncated: tensor 'blk.2.weight'")


def test_shards_of_another_set_are_refused_by_their_headers(tmp_path: Path) -> None:
    _write_shards(tmp_path, "big", 2)
    _shard(1, 2).write(tmp_path / "big-00002-of-00002.gguf")
    _shard(1, 2).write(tmp_path / "alone.gguf")
    MODEL.write(tmp_path / "whole-00001-of-00002.gguf")
    MODEL.write(tmp_path / "whole-00002-of-00002.gguf")

    entries = Catalog([tmp_path]).scan()

    assert "is shard 1 of 2 by its header, and 2 of 2 by its name" in _problem(entries["big"])[1]
    assert "is shard 1 of 2 by its header, and 1 of 1 by its name" in _problem(entries["alone"])[1]
    assert "is shard 1 of 1 by its header, and 1 of 2 by its name" in _problem(entries["whole"])[1]


def test_shards_must_have_the_tensors_that_the_first_promises(tmp_path: Path) -> None:
    _write_shards(tmp_path, "big", 2)
    _shard(1, 2, tensor_count=3).write(tmp_path / "big-00001-of-00002.gguf")

    message = _problem(Catalog([tmp_path]).scan()["big"])[1]

    assert "has 3 tensors in all its shards by its header, and 2 are there" in message


def test_a_set_of_one_shard_needs_no_split_keys(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "small-00001-of-00001.gguf")

    assert Catalog([tmp_path]).scan()["small"].problem is None


@pytest.mark.parametrize(
    "other",
    [
        "mmproj-model-f16.gguf",
        "MMPROJ.gguf",
        ".hidden.gguf",
        "model.gguf.part",
        "model.gguf.incomplete",
        "README.md",
        "model.bin",
        ".cache/model.gguf",
        "download.incomplete/model.gguf",
        "lost+found/model.gguf",
        "one/two/three/four/five/model.gguf",
    ],
)
def test_other_files_and_folders_are_no_models(tmp_path: Path, other: str) -> None:
    MODEL.write(tmp_path / other)

    assert Catalog([tmp_path]).scan() == {}


@pytest.mark.parametrize(
    "file",
    [_typed("adapter"), _typed("imatrix"), _typed("mmproj"), _typed("", "clip"), _typed("mmproj", "clip")],
)
def test_files_that_say_they_are_no_models_are_none(tmp_path: Path, file: Gguf) -> None:
    file.write(tmp_path / "innocent.gguf")
    MODEL.write(tmp_path / "Folder" / "model.gguf")
    file.write(tmp_path / "Folder" / "beside.gguf")

    entries = Catalog([tmp_path]).scan()

    assert list(entries) == ["Folder"]
    assert entries["Folder"].problem is None


@pytest.mark.parametrize(
    ("name", "file"), [("mmproj-f16.gguf", MODEL), ("vision-f16.gguf", _typed("mmproj", "clip"))]
)
def test_a_projector_in_the_folder_of_a_model_is_noted(tmp_path: Path, name: str, file: Gguf) -> None:
    _write_shards(tmp_path / "Vision", "v", 2)
    projector = file.write(tmp_path / "Vision" / name)

    entry = Catalog([tmp_path]).scan()["Vision"]

    assert entry.mmproj_path == projector
    assert len(entry.shard_paths) == 2


def test_of_several_models_in_a_folder_each_is_called_by_folder_and_name(tmp_path: Path) -> None:
    for name in ("a-q4.gguf", "a-q8.gguf"):
        MODEL.write(tmp_path / "Folder" / name)
    projector = MODEL.write(tmp_path / "Folder" / "mmproj-f16.gguf")

    entries = Catalog([tmp_path]).scan()

    assert list(entries) == ["Folder/a-q4", "Folder/a-q8"]
    assert {entry.mmproj_path for entry in entries.values()} == {projector}


def test_a_model_in_nested_folders_is_called_by_their_path(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "publisher" / "repository" / "model-q4.gguf")
    MODEL.write(tmp_path / "publisher" / "model.gguf")

    assert list(Catalog([tmp_path]).scan()) == ["publisher", "publisher/repository"]


def test_a_link_back_up_and_a_directory_in_another_are_not_followed(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "outer" / "folder" / "model.gguf")
    (tmp_path / "outer" / "folder" / "back").symlink_to(tmp_path / "outer" / "folder")
    MODEL.write(tmp_path / "outer" / "inner" / "other.gguf")

    entries = Catalog([tmp_path / "outer", tmp_path / "outer" / "inner"]).scan()

    assert list(entries) == ["folder", "other"]


def test_files_that_cannot_be_read_are_entries_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("this is text")
    Gguf(version=3 << 24).write(tmp_path / "big-endian.gguf")
    Gguf([("general.name", gb.text("x"))]).write(tmp_path / "anonymous.gguf")
    Gguf(tensors=[]).write(tmp_path / "vocabulary.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")

    problems = {id_: _problem(entry) for id_, entry in Catalog([tmp_path]).scan().items()}

    assert problems == {
        "anonymous": ("MODEL_CORRUPT", "anonymous.gguf: does not name the architecture of its model"),
        "big-endian": (
            "UNSUPPORTED_MODEL",
            "big-endian.gguf: is a big-endian GGUF file; convert it to little-endian (at byte 4)",
        ),
        "empty": ("MODEL_CORRUPT", "empty.gguf: the file is empty (at byte 0)"),
        "pipe": ("UNSUPPORTED_MODEL", "pipe.gguf: is not a regular file"),
        "text": (
            "MODEL_CORRUPT",
            "text.gguf: is no GGUF file: it starts with b'this' and not with GGUF (at byte 0)",
        ),
        "vocabulary": (
            "UNSUPPORTED_MODEL",
            "vocabulary.gguf: has no tensors, so that it is a vocabulary at most and no model",
        ),
    }


def test_links_that_lead_nowhere_or_outside_are_entries_that_say_so(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    secret = MODEL.write(tmp_path / "outside" / "secret.gguf")
    (models / "file.gguf").symlink_to(secret)
    (models / "folder").symlink_to(secret.parent)
    (models / "nothing.gguf").symlink_to("absent.gguf")
    (models / "loop.gguf").symlink_to("loop.gguf")
    (models / "Inner").mkdir()
    (models / "Inner" / "m.gguf").symlink_to(secret)

    entries = Catalog([models]).scan()

    leaves = "is a link that leaves the configured model directories"
    assert _problem(entries["file"]) == ("UNSUPPORTED_MODEL", f"file.gguf: {leaves}")
    assert _problem(entries["folder"]) == ("UNSUPPORTED_MODEL", f"folder: {leaves}")
    assert _problem(entries["Inner"]) == ("UNSUPPORTED_MODEL", f"Inner/m.gguf: {leaves}")
    assert _problem(entries["nothing"]) == ("MODEL_CORRUPT", "nothing.gguf: is a link to nothing")
    assert {name for name, entry in entries.items() if entry.is_absent} == {"nothing"}
    assert "Too many levels of symbolic links" in _problem(entries["loop"])[1]
    assert len(entries) == 5
    assert all(entry.size_bytes == 0 for entry in entries.values())
    assert not any(str(tmp_path / "outside") in _problem(entry)[1] for entry in entries.values())


def test_links_inside_the_directories_are_models(tmp_path: Path) -> None:
    blob = MODEL.write(tmp_path / "blobs" / "abc")
    (tmp_path / "Snapshot").mkdir()
    (tmp_path / "Snapshot" / "m.gguf").symlink_to(Path("..", "blobs", "abc"))

    (entry,) = Catalog([tmp_path]).scan().values()

    assert (entry.id, entry.problem) == ("Snapshot", None)
    assert entry.path == tmp_path / "Snapshot" / "m.gguf"
    assert entry.size_bytes == blob.stat().st_size


def test_two_models_with_one_id_are_both_refused_with_both_paths(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    MODEL.write(one / "same.gguf")
    MODEL.write(two / "same" / "x.gguf")
    _write_shards(three, "same", 2)
    MODEL.write(two / "other.gguf")

    entries = Catalog([one, two, three]).scan()

    assert list(entries) == ["other", "same"]
    assert entries["other"].problem is None
    reason, message = _problem(entries["same"])
    assert reason == "UNSUPPORTED_MODEL"
    for path in (one / "same.gguf", two / "same" / "x.gguf", three / "same-00001-of-00002.gguf"):
        assert str(path) in message


def test_a_directory_configured_twice_is_scanned_once(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "models" / "m.gguf")
    (tmp_path / "link").symlink_to("models")

    entries = Catalog([tmp_path / "models", tmp_path / "link", tmp_path / "models"]).scan()

    assert entries["m"].problem is None


@pytest.mark.parametrize("raw", [NOT_UTF_8, b"new\nline.gguf", b"esc\x1b[31m.gguf"])
def test_a_name_that_cannot_be_an_id_is_an_entry_that_says_so(tmp_path: Path, raw: bytes) -> None:
    MODEL.write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + raw)))
    MODEL.write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/D" + raw)) / "m.gguf")

    entries = Catalog([tmp_path]).scan()

    assert len(entries) == 2
    for id_, entry in entries.items():
        assert "\ufffd" in id_
        assert id_.encode()
        assert entry.relative_path.encode()
        assert "has a name that is not UTF-8 or has control characters in it" in _problem(entry)[1]


def test_names_in_any_script_are_ids(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "模型\u3000é.gguf")

    assert list(Catalog([tmp_path]).scan()) == ["模型\u3000é"]


def test_entries_are_ordered_by_id_whatever_the_directories(tmp_path: Path) -> None:
    for name in ("b/m2.gguf", "b/m0.gguf", "a/m3.gguf", "a/m1/x.gguf"):
        MODEL.write(tmp_path / name)

    scans = [list(Catalog([tmp_path / one, tmp_path / two]).scan()) for one, two in ("ab", "ba")]

    assert scans == [["m0", "m1", "m2", "m3"]] * 2


def test_a_folder_that_cannot_be_listed_is_an_entry_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODEL.write(tmp_path / "Locked" / "m.gguf")
    MODEL.write(tmp_path / "open.gguf")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        # Tests may run as the superuser, whom permissions do not keep out.
        if Path(path).name == "Locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    entries = Catalog([tmp_path]).scan()

    assert entries["open"].problem is None
    assert _problem(entries["Locked"])[1] == "Locked: cannot be listed: Permission denied"


class _Reads:
    """Counts the headers read, and refuses some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self.refused: set[str] = set()
        self._read_header = directory.read_header
        monkeypatch.setattr(directory, "read_header", self._read)

    def _read(self, path: Path) -> object:
        self.paths.append(path.name)
        if path.name in self.refused:
            raise PermissionError(13, "Permission denied")
        return self._read_header(path)

    def take(self) -> list[str]:
        """The names read since the last call."""
        taken, self.paths = sorted(self.paths), []
        return taken


def test_a_rescan_reads_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _Reads(monkeypatch)
    for name in ("a.gguf", "b.gguf", "F/m.gguf"):
        MODEL.write(tmp_path / name)
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    catalog = Catalog([tmp_path])

    first = catalog.scan()
    assert reads.take() == ["a.gguf", "b.gguf", "broken.gguf", "m.gguf"]
    assert catalog.scan() == first
    assert reads.take() == []

    MODEL.plus(("general.name", gb.text("New"))).write(tmp_path / "a.gguf")
    os.utime(tmp_path / "b.gguf", ns=(0, 1))
    replacement = MODEL.write(tmp_path / "replacement")
    os.utime(replacement, ns=(0, (tmp_path / "F" / "m.gguf").stat().st_mtime_ns))
    replacement.rename(tmp_path / "F" / "m.gguf")
    second = catalog.scan()
    assert reads.take() == ["a.gguf", "b.gguf", "m.gguf"]
    assert second["a"].facts is not None
    assert second["a"].facts.name == "New"


def test_a_file_that_could_not_be_opened_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = _Reads(monkeypatch)
    reads.refused.add("m.gguf")
    MODEL.write(tmp_path / "m.gguf")
    catalog = Catalog([tmp_path])

    refused = catalog.scan()["m"]
    reads.refused.clear()

    assert _problem(refused) == ("UNSUPPORTED_MODEL", "m.gguf: cannot be read: Permission denied")
    assert catalog.scan()["m"].problem is None


def test_a_deleted_file_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _Reads(monkeypatch)
    path = MODEL.write(tmp_path / "m.gguf")
    status = path.stat()
    catalog = Catalog([tmp_path])
    catalog.scan()

    path.rename(tmp_path / "kept")
    assert catalog.scan() == {}
    (tmp_path / "kept").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    reads.take()

    assert list(catalog.scan()) == ["m"]
    assert reads.take() == ["m.gguf"]


def test_an_entry_has_facts_or_a_problem(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "good.gguf")
    (tmp_path / "bad.gguf").touch()
    MODEL.write(tmp_path / "twice.gguf")
    MODEL.write(tmp_path / "twice" / "m.gguf")
    _write_shards(tmp_path, "set", 2, range(1, 2))

    for entry in Catalog([tmp_path]).scan().values():
        assert (entry.facts is None) != (entry.problem is None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            entry.id = "other"  # pyright: ignore[reportAttributeAccessIssue]
