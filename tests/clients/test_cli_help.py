from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from paddock.cli.app import app
from paddock.cli.daemons import HTTP_FLAGS, SERVER_FLAGS
from paddock_server.config import ServerConfig
from tests.clients.invoke import COMMANDS


def help_of(*command: str) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--help"]).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_is_cut_in_80_columns_and_none_looks_as_if_it_wanted_a_value(command: str) -> None:
    text = help_of(command)

    assert "…" not in text
    assert "<bool>" not in text
    for option in COMMANDS[command].params:
        assert all(name in text for name in (*option.opts, *option.secondary_opts) if name.startswith("-"))
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_help_lists_every_command_in_its_panel() -> None:
    text = help_of()

    assert [line for line in text.splitlines() if re.fullmatch(r"\w+:", line)] == [
        *("Options:", "Serve:", "Talk:", "Models:", "Other:")
    ]
    assert set(COMMANDS) <= {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert "<bool>" not in text


@pytest.mark.parametrize("name", {**SERVER_FLAGS, **HTTP_FLAGS})
def test_the_help_of_a_setting_tells_its_default(name: str) -> None:
    default = ServerConfig.model_fields[name].default
    told = {True: "yes", False: "no"}.get(default) if isinstance(default, bool) else str(default)

    (option,) = {**SERVER_FLAGS, **HTTP_FLAGS}[name].__metadata__
    match = re.search(r"\[default: (\S+)\]$", option.help)
    if isinstance(default, str | int | float):
        assert match
        assert match[1] == told
    else:
        assert match is None
