"""`paddock doctor`: what there is, and what looks wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from paddock.cli import output
from paddock.cli.daemons import HTTP_FLAGS, SERVER_FLAGS, ConfigOption, require_extras, with_flags
from paddock.cli.failures import ExitCode
from paddock.cli.session import JsonOption  # noqa: TC001  # typer reads the annotation

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
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            envvar="PADDOCK_SERVER",
            metavar="HOST:PORT",
            help="Server to ask; without, the one that these settings are of.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain what a server with these settings would find here, and what looks wrong.

    Takes the flags of `paddock up`. Needs no server and no network. With --server, it asks that one, and
    looks at this machine only if settings are given too. The exit code is 1 when there is a problem; a
    warning is none.
    """
    with require_extras("doctor", "server"):
        from paddock_server.checking import problems
        from paddock_server.config import ConfigError, ServerConfig
        from paddock_server.doctor import is_own, own_address
        from paddock_server.doctor.findings import judge_invalid_config
    wrong: list[Finding] = []
    settings: ServerConfig
    try:
        settings = ServerConfig.load(flags, config)
    except ConfigError:
        # What else there is to see is looked at with the defaults.
        settings = ServerConfig.model_construct()
        wrong = judge_invalid_config(problems(flags, config))
    is_here = not server or bool(flags or config) or is_own(server, settings)
    address = server or own_address(settings)
    here, there = asyncio.run(_examine(settings if is_here else None, address, asked_for=bool(server)))
    here = [*wrong, *here] if is_here else []
    bad = any(finding.level == "problem" for finding in (*here, *there))
    if as_json:
        output.write_json({"ok": not bad, "findings": [*here, *there]}, indent=2)
    else:
        _show({"This machine": here, f"The server at {address}": there})
        if not is_here:
            output.note("Only that server was asked; without --server, it is this machine.", style="dim")
    if bad:
        raise typer.Exit(ExitCode.FAILED)


async def _examine(
    settings: ServerConfig | None, address: str, *, asked_for: bool
) -> tuple[Sequence[Finding], Sequence[Finding]]:
    """Return what there is to say of this machine, if there are settings to look at it with, and of the
    server at an address, if there is one."""
    from paddock_server.doctor import examine, examine_server

    async def nothing() -> Sequence[Finding]:
        return ()

    return await asyncio.gather(
        nothing() if settings is None else examine(settings),
        examine_server(address, asked_for=asked_for) if address else nothing(),
    )


def _show(parts: Mapping[str, Sequence[Finding]]) -> None:
    """Write each part under its title: a line for each finding, and under it what to do."""
    console = output.results()
    everything = [finding for found in parts.values() for finding in found]
    area_width = max(len(finding.area) for finding in everything)
    for title, found in parts.items():
        if found:
            console.print(Text(f"{title}:", style="bold"))
        for finding in found:
            mark, style = _MARKS[finding.level]
            start = f"{finding.area:<{area_width}}  "
            console.print(Text.assemble(start, (f"{mark:<7}", style), "  ", finding.message))
            if finding.advice:
                console.print(Text(f"{'':<{area_width + 11}}{finding.advice}", style="dim"))
    counts = {
        level: sum(finding.level == level for finding in everything) for level in ("problem", "warning")
    }
    total = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    output.note(f"{total}.", style="dim")
