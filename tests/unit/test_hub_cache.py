"""What a scan finds in the hub's cache, and what removing a model leaves there."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from paddock_server.catalog import Catalog, HubRef, InvalidConfigError
from paddock_server.catalog.hub_cache import lock_path
from paddock_server.config import ServerConfig, default_hub_cache
from paddock_server.downloads.messages import Resolved
from paddock_server.downloads.removal import finish_removals, remove_model, remove_partial
from paddock_server.downloads.store import Unfinished, read_store
from paddock_server.state_files import StateFileError
from tests.models import make_noise

A, B = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_noise(tmp_path_factory.mktemp("gguf") / "noise.gguf")[0].read_bytes()


class Cache:
    """A cache of the hub, made by hand as huggingface_hub makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def repo(self, name: str) -> Path:
        return self.folder / ("models--" + name.replace("/", "--"))

    def add(self, name: str, commit: str, file: str, content: bytes, *refs: str, blob: str = "") -> Path:
        repo = self.repo(name)
        target = repo / "blobs" / (blob or f"{abs(hash((name, file))):040x}")
        link = repo / "snapshots" / commit / file
        for path in (target, link, *(repo / "refs" / ref for ref in refs)):
            path.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        link.symlink_to(target)
        for ref in refs:
            (repo / "refs" / ref).write_text(commit)
        return link

    def ids(self, *directories: Path) -> list[str]:
        return list(Catalog(directories, hub_cache=self.folder).scan())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hub")


def test_a_model_is_named_after_its_repository_and_quantization(cache: Cache, gguf: bytes) -> None:
    link = cache.add("org/repo", A, "m-Q4_K_M.gguf", gguf, "main")
    entry = Catalog([], hub_cache=cache.folder).scan()["org/repo:Q4_K_M"]

    assert entry.path == link
    assert entry.facts is not None
    assert entry.hub is not None
    assert (entry.hub.repo_id, entry.hub.commit, entry.hub.file) == ("org/repo", A, "m-Q4_K_M.gguf")
    assert entry.size_bytes == len(gguf)


def test_other_revisions_and_second_files_have_names_that_mean_them_too(cache: Cache, gguf: bytes) -> None:
    cache.add("org/repo", A, "a-Q8_0.gguf", gguf, "main")
    cache.add("org/repo", A, "b-Q8_0.gguf", gguf)
    cache.add("org/repo", A, "sub/plain.gguf", gguf)
    cache.add("org/repo", B, "a-Q8_0.gguf", gguf, "refs/pr/1", blob="c" * 40)
    cache.add("org/repo", "d" * 40, "a-Q8_0.gguf", gguf, blob="d" * 40)

    assert set(cache.ids()) == {
        "org/repo:Q8_0",
        "org/repo:b-Q8_0.gguf",
        "org/repo:sub/plain.gguf",
        "org/repo@refs/pr/1:Q8_0",
        f"org/repo@{'d' * 40}:Q8_0",
    }


def test_no_cache_is_no_error(cache: Cache) -> None:
    assert cache.ids() == []


def test_what_is_not_whole_or_no_model_is_not_listed(cache: Cache, gguf: bytes) -> None:
    cache.add("org/shards", A, "m-Q8_0-00001-of-00002.gguf", gguf, "main")
    cache.add("org/vision", A, "mmproj-F16.gguf", gguf, "main")
    cache.add("org/gone", A, "m-Q8_0.gguf", gguf, "main")
    for blob in (cache.repo("org/gone") / "blobs").iterdir():
        blob.rename(blob.with_name(blob.name + ".incomplete"))

    assert cache.ids() == []


def test_links_that_leave_the_cache_are_not_followed(cache: Cache, gguf: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside-Q8_0.gguf"
    outside.write_bytes(gguf)
    snapshot = cache.repo("org/repo") / "snapshots" / A
    snapshot.mkdir(parents=True)
    (cache.repo("org/repo") / "blobs").mkdir()
    (snapshot / "out-Q8_0.gguf").symlink_to(outside)
    (snapshot / "copy-Q8_0.gguf").write_bytes(gguf)
    (cache.repo("org/repo") / "blobs" / "e").symlink_to(outside)
    (snapshot / "by-way-of-a-blob-Q8_0.gguf").symlink_to(cache.repo("org/repo") / "blobs" / "e")
    (cache.folder / "models--..--etc").mkdir()
    (cache.folder / "models--a--b").symlink_to(tmp_path)

    assert cache.ids() == []


def test_a_model_in_a_directory_wins_over_one_of_the_cache(
    cache: Cache, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "same.gguf").write_bytes(gguf)
    cache.add("org/repo", A, "m-Q8_0.gguf", gguf, "main")
    # No file name has a slash in it, so the two meet only when an id is made otherwise.
    monkeypatch.setattr("paddock_server.catalog.directory.hub_id", _same)

    entry = Catalog([models], hub_cache=cache.folder).scan()["same"]

    assert entry.hub is None


def _same(repo_id: str, revision: str, suffix: str) -> str:
    del repo_id, revision, suffix
    return "same"


def test_removing_a_model_keeps_the_blob_another_snapshot_links_to(cache: Cache, gguf: bytes) -> None:
    first = cache.add("org/repo", A, "sub/m-Q8_0.gguf", gguf, "main", blob="c" * 40)
    second = cache.add("org/repo", B, "sub/m-Q8_0.gguf", gguf, blob="c" * 40)

    assert remove_model(cache.folder, "org/repo", [first]) == 0
    assert second.exists()
    assert not first.parent.exists()
    assert remove_model(cache.folder, "org/repo", [second]) == len(gguf)
    assert not list((cache.repo("org/repo") / "blobs").iterdir())


def test_removing_what_arrived_keeps_what_a_snapshot_links_to(cache: Cache, gguf: bytes) -> None:
    link = cache.add("org/repo", A, "m-Q8_0.gguf", gguf, "main", blob="c" * 40)
    partial = cache.repo("org/repo") / "blobs" / f"{'d' * 40}.incomplete"
    partial.write_bytes(b"half")

    assert remove_partial(cache.folder, "org/repo", ["c" * 40, "d" * 40, "e" * 40]) == 4
    assert link.exists()
    assert not partial.exists()


def test_what_another_process_fetches_or_is_about_to_link_is_not_removed(cache: Cache, gguf: bytes) -> None:
    link = cache.add("org/repo", A, "m-Q8_0.gguf", gguf, "main", blob="c" * 40)
    blobs = cache.repo("org/repo") / "blobs"
    growing = blobs / f"{'d' * 40}.incomplete"
    growing.write_bytes(b"half")
    locks = [lock_path(cache.folder, cache.repo("org/repo"), letter * 40) for letter in "cd"]
    locks[0].parent.mkdir(parents=True)
    with ExitStack() as held:
        for path in locks:
            fcntl.flock(held.enter_context(path.open("w")), fcntl.LOCK_EX)
        assert remove_model(cache.folder, "org/repo", [link]) == 0
        assert remove_partial(cache.folder, "org/repo", ["c" * 40, "d" * 40]) == 0
        assert not link.is_symlink()
        assert sorted(blobs.iterdir()) == [blobs / ("c" * 40), growing]

    assert remove_partial(cache.folder, "org/repo", ["c" * 40, "d" * 40]) == len(gguf) + 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert default_hub_cache() == Path(expected)
    assert ServerConfig.load({}).hub_cache == Path(expected)
    assert ServerConfig.load({"hf_cache": False}).hub_cache is None


def test_a_state_file_that_names_paths_is_refused(tmp_path: Path) -> None:
    entry = (
        '{"version": 1, "downloads": [{"repo_id": "o/r", "revision": "main", "pattern": "", "paused": true,'
        ' "completed_bytes": 1, "resolved": %s}]}'
    )
    resolved = '{"commit": "%s", "file": "f", "suffix": "s", "total_bytes": 2, "digests": ["%s"]}'
    path = tmp_path / "downloads.json"
    path.write_text(entry % "null")
    (unfinished,) = read_store(path).values()
    assert unfinished == Unfinished(paused=True, completed_bytes=1)
    path.write_text(entry % (resolved % (A, B)))
    (unfinished,) = read_store(path).values()
    assert unfinished.resolved == Resolved(A, "f", "s", 2, [B])

    path.write_text(entry % (resolved % (A, "../../x")))
    with pytest.raises(StateFileError):
        read_store(path)
    path.write_text("[]")
    with pytest.raises(StateFileError):
        read_store(path)


class Configured:
    """A cache of the hub with a configuration file beside it."""

    def __init__(self, folder: Path, toml: str, preset: str = "") -> None:
        self.cache = Cache(folder / "hub")
        self.toml, self.preset = folder / "paddock.toml", folder / "models.ini"
        self.toml.write_text(toml)
        self.preset.write_text(preset)

    def catalog(self, *, with_hub: bool = True) -> Catalog:
        hub_cache = self.cache.folder if with_hub else None
        return Catalog([], preset=self.preset, config_file=self.toml, hub_cache=hub_cache)


@pytest.mark.parametrize("options", ["", "ctx_size = 512\n"])
def test_a_configured_model_keeps_its_id_when_it_arrives_in_the_cache(
    tmp_path: Path, gguf: bytes, options: str
) -> None:
    toml = f'[models.helper]\nhf = "hf:org/repo:q4_k_m"\naliases = ["h"]\n{options}'
    configured = Configured(tmp_path, toml)
    catalog = configured.catalog()
    before = catalog.scan()
    problems = catalog.problems
    link = configured.cache.add("org/repo", A, "m-Q4_K_M.gguf", gguf, "main")
    after = catalog.scan(reread=True)

    assert list(before) == ["helper"]
    assert before["helper"].absent == HubRef("org/repo", "main", "Q4_K_M")
    assert (before["helper"].problem, problems) == (None, ())
    assert (after["helper"].absent, after["helper"].path) == (None, link)
    assert before["helper"].setup.options == after["helper"].setup.options
    assert ("org/repo:Q4_K_M" in after) == bool(options)  # with its own options it is a model of its own
    names = {name for entry in after.values() for name in entry.setup.names}
    assert names == {"helper", "h", "org/repo:Q4_K_M"}


def test_names_of_one_absent_model_are_one_model(tmp_path: Path) -> None:
    toml = '[models.a]\nhf = "org/repo:Q8_0"\n[models.b]\nhf = "org/repo:q8_0"\nmax_tokens = 3\n'
    preset = "[c]\nhf-repo = org/repo:Q8_0\nc = 77\n"
    served = Configured(tmp_path, toml, preset).catalog().scan()

    assert {id_: entry.setup.aliases for id_, entry in served.items()} == {"a": ("b",), "c": ()}
    assert {entry.absent for entry in served.values()} == {HubRef("org/repo", "main", "Q8_0")}


def test_without_the_hub_s_cache_a_model_of_it_says_why_it_cannot_be_loaded(tmp_path: Path) -> None:
    catalog = Configured(tmp_path, '[models.a]\nhf = "org/repo"\n').catalog(with_hub=False)
    problem = catalog.scan()["a"].problem

    assert problem is not None
    assert "--no-hf-cache" in problem.message
    assert [found.place.line for found in catalog.problems] == [1]


@pytest.mark.parametrize("name", ["repo", "org/repo@", "org/repo:../x.gguf"])
def test_a_name_that_the_hub_cannot_have_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"paddock\.toml:2: models\.a\.hf: must be ORG/REPO"):
        Configured(tmp_path, f'[models.a]\nhf = "{name}"\n').catalog()


class _KilledError(Exception):
    """The server is killed here."""


@pytest.mark.parametrize("steps", range(5))
def test_a_removal_that_was_cut_short_at_any_step_is_finished_later(
    cache: Cache, gguf: bytes, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    links = [cache.add("org/repo", A, f"m-Q8_0-0000{n}-of-00002.gguf", gguf) for n in (1, 2)]
    kept = cache.add("org/repo", A, "other-Q4_K_M.gguf", gguf, "main")
    left = steps
    unlink = Path.unlink

    def unlink_or_die(path: Path, *, missing_ok: bool = False) -> None:
        nonlocal left
        if left == 0:
            raise _KilledError
        left -= 1
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_or_die)
        with pytest.raises(_KilledError):
            remove_model(cache.folder, "org/repo", links)
    assert finish_removals(cache.folder) == ["models--org--repo"]

    repo = cache.repo("org/repo")
    assert [path for path in repo.rglob("*") if path.is_symlink()] == [kept]
    assert list((repo / "blobs").iterdir()) == [kept.readlink()]
    assert [path.name for path in repo.iterdir() if path.name.startswith(".")] == []
    assert finish_removals(cache.folder) == []
    assert cache.ids() == ["org/repo:Q4_K_M"]


def test_what_was_downloaded_again_since_a_removal_was_cut_short_stays(
    cache: Cache, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise _KilledError

    link = cache.add("org/repo", A, "m-Q8_0.gguf", gguf, "main")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(_KilledError):
            remove_model(cache.folder, "org/repo", [link])
    (note,) = cache.repo("org/repo").glob(".paddock-removal-*")
    os.utime(note, (0, 0))  # It is older than the file and the link.
    finish_removals(cache.folder)
    assert cache.ids() == ["org/repo:Q8_0"]


@pytest.mark.parametrize(
    "note",
    [b"", b"[]", b"{", b'{"links": ["../../../../victim", "/etc/x"], "blobs": ["../victim", "..", "a/b"]}'],
)
def test_a_note_of_a_removal_that_makes_no_sense_or_leads_out_removes_nothing(
    cache: Cache, gguf: bytes, tmp_path: Path, note: bytes
) -> None:
    cache.add("org/repo", A, "m-Q8_0.gguf", gguf, "main")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (cache.repo("org/repo") / "victim").write_text("mine")
    (cache.repo("org/repo") / ".paddock-removal-1.json").write_bytes(note)
    finish_removals(cache.folder)
    assert victim.exists()
    assert (cache.repo("org/repo") / "victim").exists()
    assert cache.ids() == ["org/repo:Q8_0"]
