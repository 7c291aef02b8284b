"""Commands about models: ls, ps, show, load, unload, sleep, wake, pin, unpin, reload, logs, tokenize."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from paddock.cli import listing, output
from paddock.cli.facts import facts
from paddock.cli.memory import CacheTypeOption, ContextOption  # noqa: TC001  # typer reads the annotation
from paddock.cli.output import note, seconds_text, write_json
from paddock.cli.progress import load_view
from paddock.cli.session import (
    DEFAULT_SERVER,
    MOST,
    JsonOption,
    ModelArgument,
    ServerOption,
    call,
    read_text,
    valid_text,
)
from paddock.errors import PaddockError, Reason
from paddock.requests import ConflictPolicy  # noqa: TC001  # typer reads the annotation
from paddock.types import Model, ModelState, RuntimeOptions, Unloaded

if TYPE_CHECKING:
    from paddock.client import Client
    from paddock.types import LogLine

WideOption = Annotated[bool, typer.Option("--wide", help="All columns, a line for each model however wide.")]

_AT_REST = frozenset({ModelState.UNLOADED, ModelState.FAILED})
"""States without a worker."""


def ls(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False, wide: WideOption = False) -> None:
    """List the models of the server."""
    models = call(server, lambda client: client.list())
    if not models and not as_json:
        note("The server has no models. Put a GGUF file into a directory of its --models-dir.")
        return
    _write_list(models, listing.LS_WIDE if wide else listing.LS, as_json=as_json, wide=wide)


def ps(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False, wide: WideOption = False) -> None:
    """List the models that have a worker process."""
    models = [model for model in call(server, lambda client: client.list()) if model.state not in _AT_REST]
    if not models and not as_json:
        note("No model is loaded. Load one with `paddock load MODEL`; `paddock ls` lists them.")
        return
    _write_list(models, listing.PS_WIDE if wide else listing.PS, as_json=as_json, wide=wide)


def _write_list(models: Sequence[Model], columns: Sequence[str], *, as_json: bool, wide: bool) -> None:
    if as_json:
        write_json(models, indent=2)
        return
    output.show_table(columns, listing.rows(models, columns), wide=wide)


def show(model: ModelArgument, server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Show everything the server knows about a model."""
    shown = call(server, lambda client: client.get(model))
    if as_json:
        write_json(shown, indent=2)
        return
    output.show_grid(facts(shown))


def load(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    ctx_size: ContextOption = None,
    parallel: Annotated[int | None, typer.Option(min=1, max=MOST, help="Sequences decoded at once.")] = None,
    n_gpu_layers: Annotated[
        int | None, typer.Option(min=-1, max=MOST, help="Layers on the accelerator; -1: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, max=MOST, help="Threads.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, max=MOST, help="Most tokens decoded in one step."),
    ] = None,
    cache_type_k: CacheTypeOption = None,
    cache_type_v: CacheTypeOption = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, max=16, help="Worker processes that serve it; each counts in --models-max."),
    ] = None,
    idle_timeout_seconds: Annotated[
        float | None, typer.Option(min=0, help="Unload after so long without use; 0: never.")
    ] = None,
    sleep_idle_seconds: Annotated[
        float | None, typer.Option(min=0, help="Give the memory back after so long without use; 0: never.")
    ] = None,
    timeout_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="How long the load may take.")
    ] = None,
    on_conflict: Annotated[
        ConflictPolicy, typer.Option(help="When it is loaded with other options.")
    ] = "fail",
) -> None:
    """Load a model and show how far it is. Ctrl-C leaves the load running; `paddock unload` aborts it."""
    options = RuntimeOptions(
        context_size_tokens=ctx_size,
        slot_count=parallel,
        gpu_layer_count=n_gpu_layers,
        thread_count=threads,
        batch_size_tokens=batch_size,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        idle_timeout_seconds=idle_timeout_seconds,
        sleep_timeout_seconds=sleep_idle_seconds,
        replica_count=replicas,
    )

    async def work(client: Client) -> None:
        try:
            await load_with_progress(
                client,
                model,
                as_json=as_json,
                options=None if options == RuntimeOptions() else options,
                on_conflict=on_conflict,
                timeout_seconds=timeout_seconds,
            )
        except asyncio.CancelledError:
            note(f"The load goes on; `paddock unload {model}` aborts it.")
            raise

    call(server, work)


async def load_with_progress(
    client: Client,
    model: str,
    *,
    as_json: bool = False,
    options: RuntimeOptions | None = None,
    on_conflict: ConflictPolicy = "fail",
    timeout_seconds: float | None = None,
) -> Model:
    """Load a model; show progress on standard error, or write one JSON event a line."""
    async with client.load(
        model, options=options, on_conflict=on_conflict, timeout_seconds=timeout_seconds
    ) as stream:
        if as_json:
            async for progress in stream:
                write_json({"event": "progress", **output.as_object(progress)})
            write_json(
                {
                    "event": "loaded",
                    "model": stream.model,
                    "already_loaded": stream.already_loaded,
                    "load_seconds": stream.load_seconds,
                }
            )
            return stream.model
        with load_view() as view:
            async for progress in stream:
                view.show(progress)
        if stream.already_loaded:
            note(f"{stream.model.id} is loaded already.")
        else:
            note(f"Loaded {stream.model.id} in {seconds_text(stream.load_seconds)}.")
        return stream.model


def unload(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    force: Annotated[bool, typer.Option("--force", help="Abort running requests.")] = False,
    drain_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long running requests may go on; 30 when left out.")
    ] = None,
) -> None:
    """Unload a model, or abort its load; forget one that is remembered and not there any more."""

    async def work(client: Client) -> tuple[Model | None, Unloaded]:
        try:
            before = await client.get(model)
        except PaddockError as error:
            if error.reason != Reason.MODEL_NOT_FOUND:
                raise
            before = None  # The server may remember it, from when it was there.
        return before, await client.unload(model, force=force, drain_timeout_seconds=drain_seconds)

    before, unloaded = call(server, work)
    if as_json:
        write_json(unloaded, indent=2)
        return
    aborted = unloaded.aborted_request_count
    if before is None:
        note(f"Forgot {unloaded.model.id}: it was remembered, and is not there.")
        return
    if before.state is ModelState.UNLOADED and not aborted:
        note(f"{unloaded.model.id} was not loaded.")
        return
    note(f"Unloaded {unloaded.model.id}." + (f" {aborted} requests were aborted." if aborted else ""))


def sleep(model: ModelArgument, server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Have a loaded model give its memory back; the next request wakes it."""
    slept = call(server, lambda client: client.sleep(model))
    if as_json:
        write_json(slept, indent=2)
    if slept.state is not ModelState.SLEEPING:
        note(f"{slept.id} is {slept.state} by now.")
        raise typer.Exit(1)
    if not as_json:
        note(f"{slept.id} sleeps. The next request wakes it, or `paddock wake {slept.id}`.")


def wake(model: ModelArgument, server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Wake a model that sleeps, with the options it had; one that is not loaded is loaded."""
    call(server, lambda client: load_with_progress(client, model, as_json=as_json))


def pin(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    off: Annotated[bool, typer.Option("--off", help="Take the pin off, as `paddock unpin` does.")] = False,
) -> None:
    """Keep a model from being evicted, or put to sleep or unloaded for idleness."""
    _pin(model, server, pinned=not off, as_json=as_json)


def unpin(model: ModelArgument, server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Take the pin off a model."""
    _pin(model, server, pinned=False, as_json=as_json)


def _pin(model: str, server: str, *, pinned: bool, as_json: bool) -> None:
    shown = call(server, lambda client: client.pin(model, pinned=pinned))
    if as_json:
        write_json(shown, indent=2)
        return
    note(f"{shown.id} is pinned." if shown.pinned else f"{shown.id} is not pinned.")


def reload(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Have the server read its configuration files and model directories again."""
    reloaded = call(server, lambda client: client.reload())
    if as_json:
        write_json(reloaded, indent=2)
        return
    for problem in reloaded.problems:
        note(f"{problem.file}:{problem.line}: {problem.key}: {problem.message}")
    for what in ("added", "changed", "removed"):
        for model in getattr(reloaded, what):
            output.write(f"{what}\t{model}\n")
    count = reloaded.unchanged_count
    note("1 model is as it was." if count == 1 else f"{count} models are as they were.")


def logs(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    tail: Annotated[
        int, typer.Option(min=0, max=MOST, help="Newest lines to start with; 0: all there are.")
    ] = 0,
    as_json: JsonOption = False,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", "-t", help="Put the time each line was read before it.")
    ] = False,
) -> None:
    """Show what the workers of a model wrote to their standard error, earlier workers included.

    With --follow, go on with new lines, also of workers that are yet to start, until Ctrl-C.
    """

    async def work(client: Client) -> None:
        dropped = pid = 0
        async with client.logs(model, tail=tail, follow=follow) as stream:
            async for line in stream:
                if stream.dropped_line_count > dropped:
                    note(f"... {stream.dropped_line_count - dropped} lines lost ...")
                    dropped = stream.dropped_line_count
                if as_json:
                    write_json(line)
                    continue
                if pid not in {0, line.pid}:
                    note(f"--- worker {line.pid} ---", style="dim")
                pid = line.pid
                output.write(f"{_line_time(line)}{line.text}\n" if timestamps else f"{line.text}\n")

    call(server, work)


def _line_time(line: LogLine) -> str:
    if line.read_time is None:
        return ""
    return line.read_time.astimezone().isoformat(sep=" ", timespec="milliseconds") + "  "


def tokenize(
    model: ModelArgument,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="Text; - reads standard input.", callback=valid_text)
    ],
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    add_special: Annotated[
        bool, typer.Option("--add-special", help="Add the tokens that start and end a text.")
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens written out in the text.")
    ] = False,
) -> None:
    """Show the tokens of a text. The model must be loaded."""
    text = read_text(text)
    tokens = call(
        server,
        lambda client: client.tokenize(
            model,
            text,
            add_special_tokens=add_special,
            parse_special_tokens=parse_special,
            include_pieces=True,
        ),
    )
    if as_json:
        write_json(tokens)
        return
    for token_id, piece in zip(tokens.token_ids, tokens.pieces, strict=True):
        output.write(f"{token_id}\t{_piece_text(piece)}\n")


def _piece_text(piece: bytes) -> str:
    """Quote a token; half a character has no text, so its bytes are shown."""
    try:
        return json.dumps(piece.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(piece)
