from __future__ import annotations

from pathlib import Path

import pytest

from paddock_server.catalog import Catalog, CatalogError
from tests.unit.gguf_bytes import Gguf

MODEL = Gguf()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model directory, with a model beside it that must never be reached."""
    MODEL.write(tmp_path / "outside" / "secret.gguf")
    MODEL.write(tmp_path / "models" / "inside.gguf")
    return tmp_path / "models"


def _refused(catalog: Catalog, path: str) -> str:
    with pytest.raises(CatalogError) as caught:
        catalog.resolve_local(path)
    assert caught.value.field == "source.local.path"
    assert str(caught.value) == f"source.local.path: {caught.value.message}"
    return caught.value.message


def test_a_path_is_looked_up_in_the_model_directory(models: Path) -> None:
    MODEL.write(models / "deep" / "deeper" / "m.gguf")
    catalog = Catalog([models])

    inside = catalog.resolve_local("inside.gguf")
    deep = catalog.resolve_local("deep/deeper/m.gguf")

    assert (inside.id, inside.path, inside.problem) == ("inside", models / "inside.gguf", None)
    assert (deep.id, deep.relative_path) == ("m", "deep/deeper/m.gguf")
    assert deep.facts is not None


def test_the_relative_path_of_an_entry_leads_back_to_it(models: Path) -> None:
    catalog = Catalog([models])

    entry = catalog.scan()["inside"]

    assert catalog.resolve_local(entry.relative_path) == entry


@pytest.mark.parametrize("path", ["../outside/secret.gguf", "x/../../outside/secret.gguf", "..", "a/.."])
def test_a_path_that_goes_up_is_refused(models: Path, path: str) -> None:
    assert (
        _refused(Catalog([models]), path) == f"{path!r} must be relative to a model directory, without '..'"
    )


def test_an_absolute_path_is_refused_even_to_a_model(models: Path) -> None:
    for path in (models / "inside.gguf", models.parent / "outside" / "secret.gguf"):
        assert "must be relative" in _refused(Catalog([models]), str(path))


@pytest.mark.parametrize("path", ["", ".", "./", "./."])
def test_a_path_to_nothing_in_particular_is_refused(models: Path, path: str) -> None:
    assert "is empty" in _refused(Catalog([models]), path)


@pytest.mark.parametrize("path", ["inside.gguf\0", "in\nside.gguf", "\ud800.gguf"])
def test_a_path_with_control_characters_is_refused(models: Path, path: str) -> None:
    assert "has control characters in it" in _refused(Catalog([models]), path)


@pytest.mark.parametrize("path", ["absent.gguf", "inside.gguf/x", "x" * 5000, "a/" * 3000])
def test_a_path_to_what_is_not_there_is_refused_in_few_words(models: Path, path: str) -> None:
    message = _refused(Catalog([models]), path)

    assert message.endswith("is in none of the configured model directories")
    assert len(message) < 200


def test_a_link_out_of_the_directories_is_refused_whether_its_end_exists_or_not(models: Path) -> None:
    outside = models.parent / "outside"
    (models / "file.gguf").symlink_to(outside / "secret.gguf")
    (models / "folder").symlink_to(outside)
    (models / "dangling.gguf").symlink_to(outside / "absent.gguf")
    (models / "hop").symlink_to(models / "folder")
    catalog = Catalog([models])

    for path in (
        "file.gguf",
        "folder",
        "folder/secret.gguf",
        "folder/absent.gguf",
        "dangling.gguf",
        "hop/secret.gguf",
    ):
        assert _refused(catalog, path) == f"{path!r} is a link that leaves the configured model directories"


def test_links_inside_a_directory_and_between_directories_are_followed(models: Path, tmp_path: Path) -> None:
    blob = MODEL.write(models / "blobs" / "abc123")
    (models / "snapshots").mkdir()
    (models / "snapshots" / "m.gguf").symlink_to(Path("..", "blobs", "abc123"))
    (models / "other.gguf").symlink_to(tmp_path / "outside" / "secret.gguf")
    catalog = Catalog([models, tmp_path / "outside"])

    assert catalog.resolve_local("snapshots/m.gguf").size_bytes == blob.stat().st_size
    assert catalog.resolve_local("other.gguf").problem is None


def test_a_model_directory_may_itself_be_a_link(models: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(models)

    assert list(Catalog([tmp_path / "link"]).scan()) == ["inside"]


@pytest.mark.parametrize("name", ["notes.txt", "mmproj-inside.gguf", "empty"])
def test_a_path_to_something_else_than_a_model_is_refused(models: Path, name: str) -> None:
    (models / "empty").mkdir()
    (models / "notes.txt").write_text("notes")
    MODEL.write(models / "mmproj-inside.gguf")

    message = _refused(Catalog([models]), name)

    assert message == f"{name!r} is not a model; give a .gguf file or a folder with one in it"


def test_a_path_in_two_directories_is_refused_with_both_named(models: Path, tmp_path: Path) -> None:
    MODEL.write(tmp_path / "more" / "inside.gguf")

    message = _refused(Catalog([models, tmp_path / "more"]), "inside.gguf")

    assert f"{models}/inside.gguf" in message
    assert f"{tmp_path}/more/inside.gguf" in message


def test_a_damaged_file_is_an_entry_with_its_problem(models: Path) -> None:
    (models / "bad.gguf").write_bytes(b"nothing")

    entry = Catalog([models]).resolve_local("bad.gguf")

    assert entry.problem is not None
    assert entry.problem.reason == "MODEL_CORRUPT"


def test_a_model_directory_that_does_not_exist_is_refused(models: Path) -> None:
    wrong = {models / "absent": "No such file or directory", models / "inside.gguf": "Not a directory"}

    for path, reason in wrong.items():
        with pytest.raises(CatalogError) as caught:
            Catalog([models, path])
        assert caught.value.field == "models_dir"
        assert caught.value.message == f"{str(path)!r} cannot be listed: {reason}"


def test_a_model_directory_that_went_away_is_an_error_and_not_an_empty_catalog(models: Path) -> None:
    catalog = Catalog([models])
    models.rename(models.parent / "elsewhere")

    with pytest.raises(CatalogError, match=r"models_dir: .* cannot be listed: No such file or directory"):
        catalog.scan()
