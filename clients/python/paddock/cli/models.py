"""Commands about models: ls, ps, show, load, unload, logs, tokenize."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer

from paddock.cli import output
from paddock.cli.facts import facts
from paddock.cli.output import ago_text, bytes_text, count_text, note, results, seconds_text, write_json
from paddock.cli.progress import load_view
from paddock.cli.session import (
    DEFAULT_SERVER,
    JsonOption,
    ModelArgument,
    ServerOption,
    call,
    read_text,
    valid_text,
)
from paddock.requests import ConflictPolicy  # noqa: TC001  # typer reads the annotation
from paddock.types import Model, ModelState, RuntimeOptions

if TYPE_CHECKING:
    from rich.text import Text

    from paddock.client import Client

_AT_REST = frozenset({ModelState.UNLOADED, ModelState.FAILED})
"""States without a worker."""


def ls(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """List the models of the server."""
    models = call(server, lambda client: client.list())
    if as_json:
        write_json(models, indent=2)
        return
    if not models:
        note("The server has no models. Put a GGUF file into a directory of its --models-dir.")
        return
    results().print(
        output.table(
            ("MODEL", "STATE", "SIZE", "PARAMETERS", "QUANTIZATION", "CONTEXT"),
            [
                (
                    model.id,
                    _state(model),
                    bytes_text(model.size_bytes),
                    count_text(model.info.parameter_count) if model.info else "-",
                    (model.info.quantization or "-") if model.info else "-",
                    str(model.info.trained_context_tokens) if model.info else "-",
                )
                for model in models
            ],
        )
    )


def ps(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """List the models that have a worker process."""
    models = [model for model in call(server, lambda client: client.list()) if model.state not in _AT_REST]
    if as_json:
        write_json(models, indent=2)
        return
    if not models:
        note("No model is loaded. Load one with `paddock load MODEL`; `paddock ls` lists them.")
        return
    results().print(
        output.table(
            ("MODEL", "STATE", "PID", "MEMORY", "ACTIVE", "QUEUED", "KV CACHE", "RESTARTS", "USED"),
            [
                (model.id, _state(model), *_worker_cells(model), ago_text(model.last_use_time))
                for model in models
            ],
        )
    )


def show(model: ModelArgument, server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """Show everything the server knows about a model."""
    shown = call(server, lambda client: client.get(model))
    if as_json:
        write_json(shown, indent=2)
        return
    results().print(output.grid(facts(shown)))


def load(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    ctx_size: Annotated[
        int | None, typer.Option("--ctx-size", "-c", min=0, help="Tokens the KV cache holds; 0: as trained.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Sequences decoded at once.")] = None,
    n_gpu_layers: Annotated[
        int | None, typer.Option(min=-1, help="Layers on the accelerator; -1: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Most tokens decoded in one step.")
    ] = None,
    idle_timeout_seconds: Annotated[
        float | None, typer.Option(min=0, help="Unload after so long without use; 0: never.")
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
        idle_timeout_seconds=idle_timeout_seconds,
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
    force: Annotated[bool, typer.Option("--force", help="Abort running requests.")] = False,
    drain_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long running requests may go on; 30 when left out.")
    ] = None,
) -> None:
    """Unload a model, or abort its load."""
    unloaded = call(
        server, lambda client: client.unload(model, force=force, drain_timeout_seconds=drain_seconds)
    )
    aborted = unloaded.aborted_request_count
    note(f"Unloaded {unloaded.model.id}." + (f" {aborted} requests were aborted." if aborted else ""))


def logs(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Newest lines to start with; 0: all there are.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show what the workers of a model wrote to their standard error."""

    async def work(client: Client) -> None:
        dropped = 0
        async with client.logs(model, tail=tail, follow=follow) as stream:
            async for line in stream:
                if stream.dropped_line_count > dropped:
                    note(f"... {stream.dropped_line_count - dropped} lines lost ...")
                    dropped = stream.dropped_line_count
                if as_json:
                    write_json(line)
                else:
                    output.write(line.text + "\n")

    call(server, work)


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


def _state(model: Model) -> Text:
    if model.download is not None and model.state is ModelState.UNLOADED:
        return output.download_text(model.download)
    failed = model.state is ModelState.FAILED and model.last_failure
    return output.state_text(model.state, model.last_failure.reason if failed and model.last_failure else "")


def _piece_text(piece: bytes) -> str:
    """Quote a token; half a character has no text, so its bytes are shown."""
    try:
        return json.dumps(piece.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(piece)


def _worker_cells(model: Model) -> tuple[str, ...]:
    worker = model.worker
    if worker is None:
        return ("-",) * 6
    used = f"{worker.kv_cache_used_tokens} of {worker.kv_cache_total_tokens}"
    return (
        str(worker.pid),
        bytes_text(worker.resident_bytes),
        str(worker.active_request_count),
        str(worker.queued_request_count),
        used if worker.kv_cache_total_tokens else "-",
        str(worker.restart_count),
    )
