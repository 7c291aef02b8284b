"""Commands about models of the Hugging Face Hub: pull, rm."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from paddock.cli import output
from paddock.cli.output import note, write_json
from paddock.cli.progress import load_view
from paddock.cli.session import DEFAULT_SERVER, JsonOption, ModelArgument, ServerOption, call, valid_text
from paddock.sizes import size_text

if TYPE_CHECKING:
    from paddock.client import Client

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="hf:ORG/REPO[@REVISION][:QUANT], for example hf:org/repo:Q4_K_M.",
        callback=valid_text,
    ),
]


def pull(
    name: NameArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    pause: Annotated[
        bool, typer.Option("--pause", help="Pause its download instead; another pull resumes it.")
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop its download instead, and drop what has arrived.")
    ] = False,
) -> None:
    """Download a model to the server and show how far it is. Ctrl-C leaves the download running."""
    if pause and cancel:
        message = "--pause and --cancel exclude each other."
        raise typer.BadParameter(message)
    if pause or cancel:
        stopped = call(server, lambda client: client.stop_download(name, keep=pause))
        if as_json:
            write_json({"event": "paused" if pause else "cancelled", "model": stopped})
            return
        note(f"Paused the download of {stopped.id}." if pause else f"Cancelled the download of {stopped.id}.")
        return

    async def work(client: Client) -> None:
        try:
            await _pull(client, name, as_json=as_json)
        except asyncio.CancelledError:
            note(
                f"The download goes on. `paddock pull {name}` shows it again, "
                f"`paddock pull {name} --pause` pauses it and --cancel drops it."
            )
            raise

    call(server, work)


async def _pull(client: Client, name: str, *, as_json: bool) -> None:
    async with client.download(name) as stream:
        if as_json:
            async for progress in stream:
                write_json({"event": "progress", **output.as_object(progress)})
            write_json({"event": "downloaded", "model": stream.model})
            return
        with load_view() as view:
            async for progress in stream:
                view.show(progress)
        note(f"Downloaded {stream.model.id} ({size_text(stream.model.size_bytes)}).")


def rm(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    if_exists: Annotated[bool, typer.Option("--if-exists", help="Succeed when there is none.")] = False,
) -> None:
    """Delete the files of an unloaded model of the hub, apart from those that another revision uses."""
    freed = call(server, lambda client: client.delete(model, allow_missing=if_exists))
    if as_json:
        write_json({"model": model, "freed_bytes": freed})
        return
    note(f"Deleted {model}; {size_text(freed)} are free again.")
