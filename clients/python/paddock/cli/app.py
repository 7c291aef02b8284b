"""The command line put together."""

from __future__ import annotations

import asyncio
import os
import threading
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING, Annotated, Final

import typer

from paddock.cli import daemons, doctor, hub, memory, models, talk, watch
from paddock.cli.help import PanelGroup
from paddock.cli.output import note, write, write_json
from paddock.cli.session import DEFAULT_SERVER, JsonOption, ServerOption
from paddock.errors import PaddockError
from paddock.interrupts import raise_again

if TYPE_CHECKING:
    from paddock.types import ServerInfo

_DAEMONS: Final = frozenset({"up", "serve", "gateway"})

_VERSION_SECONDS: Final = 2.0
"""How long `paddock version` waits for a server that may not be there."""


app = typer.Typer(
    name="paddock",
    cls=PanelGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Load, serve and unload language models.",
    epilog=(
        "Exit codes: 0 done, 1 failed, 2 wrong argument, 3 no such model, 4 server unreachable, "
        "5 not now (try again), 6 model cannot be loaded, 130 interrupted."
    ),
)


def _tell_version(value: bool) -> None:  # typer calls it
    if value:
        version(os.environ.get("PADDOCK_SERVER", DEFAULT_SERVER))
        raise typer.Exit


@app.callback()
def begin(
    context: typer.Context,
    *,
    version: Annotated[  # told by its callback, before any command
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="As `paddock version`.")
    ] = False,
) -> None:
    """Prepare for a command."""
    # A server has its own way with signals, from when there is something to stop; until then, and while it
    # imports itself, Ctrl-C just ends the process. Other commands have something to say about it.
    if context.invoked_subcommand not in _DAEMONS and threading.current_thread() is threading.main_thread():
        raise_again()


_SERVING, _TALKING, _MODELS, _OTHER = "Serve", "Talk", "Models", "Other"


app.command(rich_help_panel=_SERVING)(daemons.up)
app.command(rich_help_panel=_SERVING)(daemons.serve)
app.command(rich_help_panel=_SERVING)(daemons.gateway)
app.command("check-config", rich_help_panel=_SERVING)(daemons.check_config)
app.command(rich_help_panel=_SERVING)(models.reload)
app.command(rich_help_panel=_TALKING)(talk.run)
app.command(rich_help_panel=_TALKING)(talk.chat)
for command in (
    models.ls,
    models.ps,
    models.show,
    memory.estimate,
    models.load,
    models.unload,
    models.sleep,
    models.wake,
    models.pin,
    models.unpin,
    models.logs,
    models.tokenize,
):
    app.command(rich_help_panel=_MODELS)(command)
app.command(rich_help_panel=_MODELS)(watch.watch)


app.command(rich_help_panel=_OTHER)(doctor.doctor)


for command in (hub.pull, hub.rm):
    app.command(rich_help_panel=_MODELS)(command)


@app.command(rich_help_panel=_OTHER)
def version(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Show the version of this program, and of the server if one answers."""
    own = distribution_version("paddock")
    try:
        info = asyncio.run(_server_info(server))
    except (PaddockError, TimeoutError):
        info = None
    if as_json:
        write_json({"version": own, "server": info}, indent=2)
        return
    write(f"paddock {own}\n")
    if info is None:
        note(f"No server answers at {server}.")
    else:
        write(f"server  {info.version}\n")


async def _server_info(server: str) -> ServerInfo:
    from paddock.client import Client

    async with asyncio.timeout(_VERSION_SECONDS), Client.connect(server) as client:
        return await client.server_info()
