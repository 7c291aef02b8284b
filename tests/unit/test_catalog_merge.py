"""Sources laid over each other: precedence, names, conflicts, and who shares a worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paddock_server.catalog import Catalog, CatalogEntry, CatalogError, InvalidConfigError, Origin
from tests.unit.gguf_bytes import BOOL, Gguf, number, text

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL = Gguf()


class Files:
    """A model directory with two configuration files beside it."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.models.mkdir()
        self.preset = folder / "models.ini"
        self.toml = folder / "paddock.toml"
        self.preset.touch()
        self.toml.touch()

    def catalog(self, *models: str, preset: str = "", toml: str = "") -> Catalog:
        for model in models:
            MODEL.write(self.models / f"{model}.gguf")
        self.preset.write_text(preset)
        self.toml.write_text(toml)
        return Catalog([self.models], preset=self.preset, config_file=self.toml)

    def scan(self, *models: str, preset: str = "", toml: str = "") -> Mapping[str, CatalogEntry]:
        return self.catalog(*models, preset=preset, toml=toml).scan()

    def refused(self, *models: str, preset: str = "", toml: str = "") -> str:
        catalog = self.catalog(*models, preset=preset, toml=toml)
        with pytest.raises(InvalidConfigError) as caught:
            catalog.scan(reread=True)
        return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_what_is_said_of_one_model_beats_what_is_said_of_all_and_toml_beats_the_preset(files: Files) -> None:
    served = files.scan(
        "a",
        "b",
        preset="[*]\nc = 1\nb = 100\nt = 1\nnp = 1\n[a]\nc = 2\nb = 200\n",
        toml="[defaults]\nctx_size = 3\nthreads = 3\n[models.a]\nctx_size = 4\n",
    )

    assert served["a"].setup.options == {
        "context_size_tokens": 4,
        "batch_size_tokens": 200,
        "thread_count": 3,
        "slot_count": 1,
    }
    assert served["b"].setup.options["context_size_tokens"] == 3


def test_each_model_says_which_source_it_came_from(files: Files) -> None:
    served = files.scan("a", "b", "c", preset="[b]\nt = 1\n[c]\nt = 1\n", toml="[models.c]\nthreads = 2\n")

    assert {id_: entry.setup.origin for id_, entry in served.items()} == {
        "a": Origin.MODELS_DIR,
        "b": Origin.PRESET,
        "c": Origin.CONFIG_FILE,
    }


def test_a_directory_alone_is_served_as_it_was(files: Files) -> None:
    entry = files.scan("a")["a"]

    assert entry == Catalog([files.models]).resolve_local("a.gguf")


def test_names_with_equal_file_and_load_options_are_one_model(files: Files) -> None:
    served = files.scan(
        "a",
        toml=(
            '[models.poet]\npath = "models/a.gguf"\nsystem_prompt = "Rhyme."\nsampling.temperature = 1.5\n'
            '[models.clerk]\npath = "a.gguf"\naliases = ["scribe"]\nreasoning_budget = 0\npriority = 3\n'
        ),
    )

    assert list(served) == ["a"]
    setup = served["a"].setup
    assert setup.aliases == ("poet", "clerk", "scribe")
    assert setup.names["a"].system_prompt == ""
    assert (setup.names["poet"].system_prompt, setup.names["poet"].sampling) == (
        "Rhyme.",
        {"temperature": 1.5},
    )
    assert setup.names["scribe"].template_arguments_json == '{"enable_thinking": false}'
    assert setup.priority == 3


def test_another_load_option_is_another_model(files: Files) -> None:
    served = files.scan("a", toml='[models.long]\npath = "a.gguf"\nctx_size = 65536\n')

    assert list(served) == ["a", "long"]
    assert served["a"].path == served["long"].path


def test_a_name_that_comes_later_does_not_change_the_id_of_a_model(files: Files) -> None:
    section = '[models.{}]\npath = "../elsewhere/x.gguf"\n'
    MODEL.write(files.models.parent / "elsewhere" / "x.gguf")

    assert list(files.scan(toml=section.format("m").replace("../", ""))) == ["m"]
    assert list(files.scan(toml=(section.format("m") + section.format("a")).replace("../", ""))) == ["m"]


def test_hidden_names_work_and_are_not_shown(files: Files) -> None:
    setup = files.scan("a", toml='[models.b]\npath = "a.gguf"\nhidden = true\n')["a"].setup

    assert "b" in setup.names
    assert setup.aliases == ()
    assert not setup.hidden


@pytest.mark.parametrize(
    ("toml", "both"),
    [
        ('[models.a]\naliases = ["x"]\n[models.b]\naliases = ["x"]\n', "alias of both 'a' and 'b'"),
        ('[models.a]\naliases = ["b"]\n', "'b' is an alias of 'a', and the id of another model"),
    ],
)
def test_conflicts_are_refused_with_both_names_and_the_line(files: Files, toml: str, both: str) -> None:
    message = files.refused("a", "b", toml=toml)

    assert both in message
    assert f"paddock.toml:{toml.count(chr(10), 0, toml.rindex('aliases')) + 1}: aliases" in message


def test_a_file_that_takes_an_alias_later_changes_nothing_until_one_is_renamed(files: Files) -> None:
    catalog = files.catalog("a", toml='[models.a]\naliases = ["new"]\n')
    catalog.scan()
    MODEL.write(files.models / "new.gguf")

    with pytest.raises(CatalogError, match="alias of 'a'"):
        catalog.scan()


def test_a_file_that_does_not_validate_changes_nothing(files: Files) -> None:
    catalog = files.catalog("a", toml="[models.a]\nthreads = 1\n")
    files.toml.write_text("[models.a]\nthreads = 'two'\n")

    with pytest.raises(InvalidConfigError, match=r"paddock\.toml:2"):
        catalog.scan(reread=True)

    assert catalog.scan()["a"].setup.options == {"thread_count": 1}


def test_a_section_without_a_model_is_reported_and_stands_in_nobodys_way(files: Files) -> None:
    catalog = files.catalog("a", preset="[ghost]\nc = 1\n")

    assert list(catalog.scan(reread=True)) == ["a"]
    (problem,) = catalog.problems
    assert (problem.place.line, problem.key, problem.is_error) == (1, "ghost", False)


@pytest.mark.parametrize("line", ['path = "gone.gguf"', 'hf = "org/repo:Q4_K_M"'])
def test_a_model_whose_files_are_not_there_is_listed_with_the_reason(files: Files, line: str) -> None:
    catalog = files.catalog(toml=f"[models.m]\n{line}\n")

    assert catalog.scan()["m"].problem is not None
    assert catalog.scan()["m"].is_absent == line.startswith("path")
    assert catalog.unusable_count == 1
    assert [problem.place.line for problem in catalog.problems] == [1]


def test_a_named_file_may_lie_outside_the_directories_and_a_requested_one_may_not(files: Files) -> None:
    outside = MODEL.write(files.models.parent / "outside.gguf")
    catalog = files.catalog(toml=f'[models.m]\npath = "{outside}"\n')

    assert catalog.scan()["m"].path == outside
    with pytest.raises(CatalogError):
        catalog.resolve_local(str(outside))


def test_the_empty_name_is_that_of_the_default_model(files: Files) -> None:
    served = files.scan("a", "b", toml='default_model = "nick"\n[models.b]\naliases = ["nick"]\n')

    assert {id_: "" in entry.setup.names for id_, entry in served.items()} == {"a": False, "b": True}


def test_a_default_model_that_is_not_there_is_reported(files: Files) -> None:
    catalog = files.catalog("a", toml='default_model = "b"\n')

    assert "" not in catalog.scan()["a"].setup.names
    assert str(catalog.problems[0]).endswith("paddock.toml:1: default_model: there is no model named 'b'")


def test_models_of_an_exclusive_group_say_so(files: Files) -> None:
    served = files.scan(
        "a",
        "b",
        toml='[groups.g]\nexclusive = true\n[groups.h]\n[models.a]\ngroup = "g"\n[models.b]\ngroup = "h"\n',
    )

    assert (served["a"].setup.exclusive, served["b"].setup.exclusive) == (True, False)


def test_a_projector_may_be_named_for_a_model_of_a_directory(files: Files) -> None:
    projector = Gguf(pairs=[*MODEL.pairs, ("clip.has_audio_encoder", number(BOOL, True))]).write(
        files.models.parent / "mmproj.gguf"
    )
    entry = files.scan("a", preset="[a]\nmmproj = mmproj.gguf\n")["a"]

    assert entry.mmproj_path == projector
    assert entry.projector is not None
    assert entry.projector.has_audio_encoder


def test_only_a_table_of_a_model_may_name_files(files: Files) -> None:
    with pytest.raises(InvalidConfigError, match=r"defaults\.hf: belongs to one model"):
        files.catalog(toml='[defaults]\nhf = "x/y"\n')


def test_what_is_as_it_was_is_the_same_entry_at_the_next_scan(files: Files) -> None:
    catalog = files.catalog("a", "b")
    first = catalog.scan()
    MODEL.plus(("general.name", text("new"))).write(files.models / "b.gguf")
    second = catalog.scan()

    assert second["a"] is first["a"]
    assert second["b"] != first["b"]


@pytest.mark.parametrize(
    "path", ["x" * 4000, "a.gguf/inside", "~nobody-at-all/x.gguf", "/proc/self/mem", "."]
)
def test_a_path_that_leads_nowhere_is_a_problem_of_its_model_alone(files: Files, path: str) -> None:
    served = files.scan("a", "b", toml=f"[models.m]\npath = '{path}'\n")

    assert served["m"].problem is not None
    assert served["a"].problem is None


def test_a_path_with_control_characters_does_not_validate(files: Files) -> None:
    with pytest.raises(InvalidConfigError, match=r"paddock\.toml:2: models\.m\.path: must have no control"):
        files.catalog(toml='[models.m]\npath = "a\\u0000b"\n')
