"""`paddock doctor`: what there is, and what looks wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import typer
from rich.text import Text

from paddock.cli import output
from paddock.cli.daemons import HTTP_FLAGS, SERVER_FLAGS, ConfigOption, require_extras, with_flags
from paddock.cli.failures import ExitCode
from paddock.cli.session import DEFAULT_SERVER, JsonOption, ServerOption

if TYPE_CHECKING:
    from paddock_server.config import ServerConfig
    from paddock_server.doctor import Finding

_MARKS: Final[Mapping[str, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "bold red"),
}
"""How a level is shown, and its style."""


@with_flags({**SERVER_FLAGS, **HTTP_FLAGS})
def doctor(
    flags: Mapping[str, object],
    config: ConfigOption = None,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
) -> None:
    """Explain what a server with these settings would find here, and what looks wrong.

    Takes the flags of `paddock up`. Needs no server and no network. The exit code is 1 when there is a
    problem; a warning is none.
    """
    with require_extras("doctor", "server"):
        from paddock_server.checking import problems
        from paddock_server.config import ConfigError, ServerConfig
        from paddock_server.doctor import examine
        from paddock_server.doctor.findings import judge_invalid_config
    found: list[Finding] = []
    settings: ServerConfig
    try:
        settings = ServerConfig.load(flags, config)
    except ConfigError:
        # What else there is to see is looked at with the defaults.
        settings = ServerConfig.model_construct()
        found += judge_invalid_config(problems(flags, config))
    found += asyncio.run(examine(settings, server))
    bad = any(finding.level == "problem" for finding in found)
    if as_json:
        output.write_json({"ok": not bad, "findings": found}, indent=2)
    else:
        _show(found)
    if bad:
        raise typer.Exit(ExitCode.FAILED)


def _show(found: Sequence[Finding]) -> None:
    """Write a line for each finding, and under it what to do."""
    console = output.results()
    area_width = max(len(finding.area) for finding in found)
    for finding in found:
        mark, style = _MARKS[finding.level]
        start = f"{finding.area:<{area_width}}  "
        console.print(Text.assemble(start, (f"{mark:<7}", style), "  ", finding.message))
        if finding.advice:
            console.print(Text(f"{'':<{area_width + 11}}{finding.advice}", style="dim"))
    counts = {level: sum(finding.level == level for finding in found) for level in ("problem", "warning")}
    total = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    output.note(f"{total}.", style="dim")
