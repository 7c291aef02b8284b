"""The models of paddock.toml: what can be said, and where what is wrong is reported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paddock_server.catalog.configured.toml_file import read_toml
from paddock_server.catalog.configured.toml_lines import key_lines

if TYPE_CHECKING:
    from paddock_server.catalog.configured.definitions import ConfiguredModels

EVERYTHING = """\
default_model = "big"
models_max = 3

[defaults]
ctx_size = 4096
sampling.temperature = 0.5

[groups.gpu]
exclusive = true

[models.big]
path = "big.gguf"
aliases = [
    "large",
    "gpt-4",
]
tags = ["chat"]
pinned = true
priority = 5
group = "gpu"
load_on_startup = true
description = "The big one."
idle_timeout_seconds = 60
system_prompt = "Be brief."
template_arguments = { enable_thinking = false }

[models.big.sampling]
top_k = 20

[models."org/repo:Q4_K_M"]
hidden = true
"""


def read(text: str) -> ConfiguredModels:
    return read_toml(text, "paddock.toml", Path("/etc"))


def test_everything_that_can_be_said_of_a_model_is_read() -> None:
    configured = read(EVERYTHING)
    big, other = configured.models

    assert configured.problems == []
    assert configured.default_model is not None
    assert configured.default_model[0] == "big"
    assert {name: setting.value for name, setting in configured.defaults.items()} == {
        "ctx_size": 4096,
        "sampling.temperature": 0.5,
    }
    assert configured.groups["gpu"].exclusive
    assert big.settings["aliases"].value == ("large", "gpt-4")
    assert big.settings["template_arguments"].value == '{"enable_thinking": false}'
    assert (big.settings["sampling.top_k"].value, big.settings["sampling.top_k"].place.line) == (20, 28)
    assert (other.name, other.place.line) == ("org/repo:Q4_K_M", 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[models.a]\nctxsize = 1\n",
            "paddock.toml:2: models.a.ctxsize: is not known; did you mean ctx_size?",
        ),
        ("[models.a]\n\nparallel = 0\n", "paddock.toml:3: models.a.parallel: must be a whole number from 1"),
        ("[models.a]\ntop_k = 3\n", "paddock.toml:2: models.a.top_k: is not known. It stands in the table"),
        (
            "[models.a.sampling]\ntop_p = 2\n",
            "paddock.toml:2: models.a.sampling.top_p: must be a number, more",
        ),
        ("[models]\na = 3\n", "paddock.toml:2: models.a: must be a table, [models.a], not 3"),
        (
            "[models.a]\ngroup = 'g'\n",
            "paddock.toml:2: models.a.group: must name a table [groups.NAME] (none)",
        ),
        ("[groups.g]\nsize = 2\n", "paddock.toml:2: groups.g.size: is not known"),
        ("[groups.g]\nexclusive = 2\n", "paddock.toml:2: groups.g.exclusive: must be true or false"),
        ("[defaults]\npath = 'x'\n", "paddock.toml:2: defaults.path: belongs to one model"),
        (
            "[models.a]\naliases = 'x'\n",
            "paddock.toml:2: models.a.aliases: must be a list of at most 64 texts",
        ),
        ("[models.a]\naliases = [' x']\n", "paddock.toml:2: models.a.aliases: must be 1 to 512 printable"),
        ("[models.a]\nhidden = 1\n", "paddock.toml:2: models.a.hidden: must be true or false, not 1"),
        ("x = 1\n\n[models.\n", "paddock.toml:3: is not TOML"),
        ("default_model = 3\n", "paddock.toml:1: default_model: must be 1 to 512 printable"),
        ("[models.a]\nreasoning_budget = 9\n", "paddock.toml:2: models.a.reasoning_budget: must be a whole"),
    ],
)
def test_what_is_wrong_names_file_line_and_key(text: str, expected: str) -> None:
    (problem,) = read(text).problems

    assert problem.is_error
    assert str(problem).startswith(expected)


def test_lines_are_those_of_the_first_mention_whatever_the_form() -> None:
    text = (
        'a.b = 1\nc = """\n[not.a.table]\nx = 1\n"""\n[t] # [u]\nd = [\n  1,\n]\n'
        '[[rows]]\nk = 1\n["quoted key".x]\ny = {z = 2}\n'
    )

    assert key_lines(text) == {
        ("a",): 1,
        ("a", "b"): 1,
        ("c",): 2,
        ("t",): 6,
        ("t", "d"): 7,
        ("rows",): 10,
        ("rows", "k"): 11,
        ("quoted key",): 12,
        ("quoted key", "x"): 12,
        ("quoted key", "x", "y"): 13,
        ("quoted key", "x", "y", "z"): 13,
    }
