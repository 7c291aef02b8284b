"""A command's talk with the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import typer

from paddock.cli import output
from paddock.cli.failures import describe, exit_code, near_names
from paddock.errors import PaddockError, Reason

if TYPE_CHECKING:
    from paddock.client import Client

ResultT = TypeVar("ResultT")
TextT = TypeVar("TextT", str, str | None, list[str] | None)

DEFAULT_SERVER: Final = "127.0.0.1:50051"

MOST: Final = 2**31 - 1
"""The largest whole number that a field of a message takes."""

ServerOption = Annotated[
    str,
    typer.Option("--server", envvar="PADDOCK_SERVER", metavar="HOST:PORT", help="Server to talk to."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]


def valid_text(value: TextT) -> TextT:
    """Refuse an argument that is not UTF-8: no message could carry it."""
    for text in (value,) if isinstance(value, str) else value or ():
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            message = "is not valid UTF-8."
            raise typer.BadParameter(message)
    return value


def read_text(argument: str) -> str:
    """Return the argument, or standard input when it is `-`."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        message = "Standard input is not valid UTF-8."
        raise typer.BadParameter(message) from error


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model, as `paddock ls` names it.", callback=valid_text)
]


def call(server: str, work: Callable[[Client], Coroutine[Any, Any, ResultT]]) -> ResultT:
    """Run `work` with a client of the server; end the command when it fails."""

    near: list[str] = []

    async def connected() -> ResultT:
        from paddock.client import Client  # imports grpc, which `--help` does without

        async with Client.connect(server) as client:
            try:
                return await work(client)
            except PaddockError as failure:
                near.extend(await names_near(client, failure))
                raise

    try:
        return asyncio.run(connected())
    except PaddockError as failure:
        fail(failure, server, near)
    except KeyboardInterrupt:
        output.note("")  # the terminal has just written ^C
        raise


async def names_near(client: Client, failure: PaddockError) -> Sequence[str]:
    """Return names like the one that no model has; none when something else failed."""
    name = failure.resource or failure.metadata.get("model")
    if failure.reason != Reason.MODEL_NOT_FOUND or not name:
        return ()
    try:
        models = await client.list()
    except PaddockError:
        return ()  # a hint less; what failed first is what is told
    return near_names(name, [name for model in models for name in (model.id, *model.aliases)])


def fail(failure: PaddockError, server: str, near: Sequence[str] = ()) -> NoReturn:
    """Say what went wrong, and end the command with the exit code that says it too."""
    output.error(describe(failure, server, near))
    raise typer.Exit(exit_code(failure.reason)) from failure
