"""llama-server's presets: what is read, and none of the traps its own reader has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paddock_server.catalog.configured.keys import BY_PRESET_NAME, KEYS
from paddock_server.catalog.configured.preset import canonical_name, read_preset

if TYPE_CHECKING:
    from paddock_server.catalog.configured.definitions import ConfiguredModels

FOLDER = Path("/etc/models")


def read(text: str) -> ConfiguredModels:
    return read_preset(text, "models.ini", FOLDER)


def values(text: str, section: str = "m") -> dict[str, object]:
    configured = read(text)
    assert [str(problem) for problem in configured.problems] == []
    model = next(model for model in configured.models if model.name == section)
    return {name: setting.value for name, setting in model.settings.items()}


def problems(text: str) -> list[str]:
    return [str(problem) for problem in read(text).problems]


def test_sections_are_models_and_the_star_is_for_all() -> None:
    configured = read("version = 1\n[*]\nctx-size = 4096\n\n[a]\nmodel = /m/a.gguf\n[b]\nmodel = b.gguf\n")

    assert [model.name for model in configured.models] == ["a", "b"]
    assert {name: setting.value for name, setting in configured.defaults.items()} == {"ctx_size": 4096}
    assert configured.models[1].settings["path"].place.line == 8
    assert configured.problems == []


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("c = 2048", "ctx_size", 2048),
        ("ctx-size=2048", "ctx_size", 2048),
        ("LLAMA_ARG_CTX_SIZE = 2048", "ctx_size", 2048),
        ("ngl = all", "n_gpu_layers", -1),
        ("n-gpu-layers = auto", "n_gpu_layers", -1),
        ("threads = -1", "threads", 0),
        ("np = 2", "parallel", 2),
        ("alias = one, two", "aliases", ("one", "two")),
        ("tags = x,y", "tags", ("x", "y")),
        ("temp = 0.2", "sampling.temperature", 0.2),
        ("top-k = 7", "sampling.top_k", 7),
        ("load-on-startup = on", "load_on_startup", True),
        ("stop-timeout = 3", "drain_seconds", 3.0),
        ('chat-template-kwargs = {"a": [1, ";"]}', "template_arguments", '{"a": [1, ";"]}'),
        ("reasoning-budget = 0", "reasoning_budget", 0),
        ("  model = indented.gguf ; a comment", "path", "indented.gguf"),
    ],
)
def test_llama_servers_names_are_read(line: str, name: str, value: object) -> None:
    configured = read(f"[m]\n{line}\n")

    assert configured.models[0].settings[name].value == value
    assert not any(problem.is_error for problem in configured.problems)


@pytest.mark.parametrize("line", ["parallel = -1", "seed = -1", "n-predict = -1", "reasoning-budget = -1"])
def test_what_llama_server_writes_for_unset_is_unset(line: str) -> None:
    assert values(f"[m]\n{line}\n") == {}


def test_a_number_sign_inside_a_value_does_not_cut_it() -> None:
    configured = read("[m]\ntags = x#y\nalias = k;m # a comment\n")
    settings = configured.models[0].settings

    assert (settings["tags"].value, settings["aliases"].value) == (("x#y",), ("k;m",))
    assert [(problem.place.line, problem.is_error) for problem in configured.problems] == [
        (2, False),
        (3, False),
    ]


@pytest.mark.parametrize("key", ["models-max", "host", "LLAMA_ARG_MODELS_DIR"])
def test_a_key_of_the_server_is_reported_and_leaves_no_trace_that_a_reload_could_see(key: str) -> None:
    configured = read(f"[m]\n{key} = 3\nmodel = m.gguf\n")

    assert list(configured.models[0].settings) == ["path"]
    (problem,) = configured.problems
    assert (problem.place.line, problem.is_error) == (2, False)
    assert "--" in problem.message


def test_an_unknown_key_is_reported_by_line_and_ends_nothing() -> None:
    assert problems("[m]\nmodel = m.gguf\n\nsystem-prompt-nope = x\n") == [
        "models.ini:4: [m] system-prompt-nope: is no option that Paddock has; it is left out"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[m]\nctx-size = many\n", "models.ini:2: [m] ctx-size: must be a whole number from 0 to 16777216"),
        ("[m]\nno equals sign\n", "models.ini:2: must be [section], key = value or a comment"),
        ("[m]\nload-on-startup = perhaps\n", "models.ini:2: [m] load-on-startup: must be true or false"),
        ("[m]\nchat-template-kwargs = [1]\n", "models.ini:2: [m] chat-template-kwargs: must be a table"),
    ],
)
def test_a_wrong_value_does_not_validate(text: str, expected: str) -> None:
    (problem,) = read(text).problems

    assert problem.is_error
    assert str(problem).startswith(expected)


@pytest.mark.parametrize("text", ["ctx-size = 1\n[m]\n", "[*]\nmodel = m.gguf\n", "[m]\nc = 1\n[m]\nc = 2\n"])
def test_what_belongs_to_no_model_is_reported(text: str) -> None:
    assert [problem.is_error for problem in read(text).problems] == [False]


def test_of_two_sections_of_one_name_the_last_counts() -> None:
    configured = read("[m]\nc = 1\nt = 1\n[m]\nc = 2\n")

    assert {name: setting.value for name, setting in configured.models[0].settings.items()} == {"ctx_size": 2}


@pytest.mark.parametrize(
    ("written", "name"), [("b:q4_k_m", "b:Q4_K_M"), ("b:x-q8_0", "b:Q8_0"), ("plain", "plain"), ("a:", "a:")]
)
def test_the_tag_of_a_section_is_written_as_llama_server_does(written: str, name: str) -> None:
    assert canonical_name(written) == name


def test_no_two_keys_have_one_name() -> None:
    assert len({key.dotted for key in KEYS}) == len(KEYS)
    assert len(BY_PRESET_NAME) == sum(len(key.preset_names) for key in KEYS)
