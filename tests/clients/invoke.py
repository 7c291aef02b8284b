"""The command line, called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner, Result

from paddock.cli.app import app
from paddock.cli.help import PanelGroup

Paddock = Callable[..., Result]

_GROUP = typer.main.get_command(app)
assert isinstance(_GROUP, PanelGroup)
COMMANDS = dict(_GROUP.commands)
"""Every command by its name."""


def paddock_on(target: str) -> Paddock:
    """Return what calls the command line, on the server at `target`."""

    def invoke(*arguments: str, **options: Any) -> Result:
        environment = {"PADDOCK_SERVER": target, "COLUMNS": "100"}
        result = CliRunner(env=environment).invoke(app, arguments, **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def events(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]
