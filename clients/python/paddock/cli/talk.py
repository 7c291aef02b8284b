"""Commands that generate: run and chat."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from paddock.cli import output
from paddock.cli.failures import describe
from paddock.cli.models import load_with_progress
from paddock.cli.output import note, notes, seconds_text, write, write_json
from paddock.cli.session import (
    DEFAULT_SERVER,
    MOST,
    JsonOption,
    ModelArgument,
    ServerOption,
    call,
    fail,
    names_near,
    read_text,
    valid_text,
)
from paddock.durations import keep_alive_seconds
from paddock.errors import PaddockError, Reason, make_error
from paddock.generation import ChatMessage, FinishReason, GenerateOptions, Prompt, Role
from paddock.types import ModelState

if TYPE_CHECKING:
    from paddock.client import Client
    from paddock.streams import GenerationStream
    from paddock.types import Model

SystemOption = Annotated[
    str | None, typer.Option("--system", help="Instructions for the model.", callback=valid_text)
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=1, max=MOST, help="Most tokens to generate.")
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0, help="0 always takes the likeliest token.")
]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Nucleus threshold, above 0 to 1.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", min=0, max=MOST, help="Candidates kept; 0: all.")]
MinPOption = Annotated[float | None, typer.Option("--min-p", help="Minimum relative probability, 0 to 1.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=-(2**63), max=2**63 - 1, help="Makes sampling repeatable.")
]


def _keep_alive(value: str) -> float:
    try:
        return keep_alive_seconds(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


KeepAliveOption = Annotated[
    float | None,
    typer.Option(
        "--keep-alive",
        metavar="DURATION",
        parser=_keep_alive,
        help="Keep the idle model at least so long: 30s, 5m, 1h; below 0: 30 days.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends the answer. Can be repeated.", callback=valid_text),
]


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to answer; - reads standard input.", callback=valid_text),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    keep_alive: KeepAliveOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt once; load the model first when it is not loaded.

    A model with a chat template is asked, any other continues the text.
    """
    text = _prompt_text(prompt)
    options = _options(max_tokens, temperature, top_p, top_k, min_p, seed, stop, keep_alive)

    async def work(client: Client) -> None:
        known = await ensure_loaded(client, model)
        question = _question(known, text, system=system, raw=raw)
        async with client.generate(known.id, question, **options) as stream:
            if as_json:
                await _write_events(stream)
            else:
                await _write_answer(stream)

    call(server, work)


def chat(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    keep_alive: KeepAliveOption = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves."""
    from paddock.client import Client

    options = _options(max_tokens, temperature, top_p, top_k, min_p, seed, stop, keep_alive)
    # A runner rather than one coroutine: between answers this thread waits in input(), where Ctrl-C and the
    # keys of the line editor work, and no event loop has to run.
    with asyncio.Runner() as runner:
        client = Client.connect(server)
        try:
            known = runner.run(ensure_loaded(client, model))
            if known.info is not None and not known.info.has_chat_template:
                message = f"{known.id} has no chat template; `paddock run {known.id} TEXT` continues a text."
                raise make_error(Reason.TEMPLATE_ERROR, message)
            Conversation(runner, client, known.id, system, options, server).talk()
        except PaddockError as failure:
            fail(failure, server, runner.run(names_near(client, failure)))
        finally:
            runner.run(client.close())


_CHAT_HELP = "Ctrl-C stops an answer, Ctrl-D leaves, /clear forgets what was said."


class Conversation:
    """The turns of a chat."""

    def __init__(
        self,
        runner: asyncio.Runner,
        client: Client,
        model: str,
        system: str | None,
        options: GenerateOptions,
        server: str,
    ) -> None:
        self._runner = runner
        self._client = client
        self._model = model
        self._start = [ChatMessage(Role.SYSTEM, system)] if system else []
        self._messages = list(self._start)
        self._options = options
        self._server = server

    def talk(self) -> None:
        """Ask and answer until the input ends."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):  # not on every system
                import_module("readline")  # gives input() history and editing
            note(_CHAT_HELP, style="dim")
        while (line := _read_line("> " if interactive else "")) is not None:
            if line.strip() == "/clear":
                self._messages = list(self._start)
                note("Forgotten.", style="dim")
            elif line.strip() == "/help":
                note(_CHAT_HELP, style="dim")
            elif line.strip():
                self._take_turn(line)

    def _take_turn(self, question: str) -> None:
        """Answer one question. What got no answer is taken back, half an answer stays."""
        answer: list[str] = []
        messages = [*self._messages, ChatMessage(Role.USER, question)]
        try:
            self._runner.run(self._answer(messages, answer.append))
        except KeyboardInterrupt:
            write("\n")
            note("Stopped.", style="dim")
            if not answer:
                return
        except PaddockError as failure:
            output.error(describe(failure, self._server))
            return
        self._messages = [*messages, ChatMessage(Role.ASSISTANT, "".join(answer))]

    async def _answer(self, messages: list[ChatMessage], keep: Callable[[str], None]) -> None:
        async with self._client.generate(self._model, messages, **self._options) as stream:
            await _write_answer(stream, keep)


async def ensure_loaded(client: Client, model: str) -> Model:
    """Return the model, loaded; show progress when it has to be loaded first."""
    known = await client.get(model)
    if known.state is ModelState.LOADED:
        return known
    return await load_with_progress(client, model, on_conflict="keep")


def _prompt_text(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        message = "Give a prompt, or talk with `paddock chat MODEL`."
        raise typer.BadParameter(message, param_hint="PROMPT")
    text = read_text("-" if prompt is None else prompt)
    if not text.strip():
        message = "There is nothing to answer: give a text, or one on standard input."
        raise typer.BadParameter(message, param_hint="PROMPT")
    return text


def _question(model: Model, text: str, *, system: str | None, raw: bool) -> Prompt:
    can_chat = model.info is not None and model.info.has_chat_template
    if can_chat and not raw:
        start = [ChatMessage(Role.SYSTEM, system)] if system else []
        return [*start, ChatMessage(Role.USER, text)]
    if system:
        message = "Only a model with a chat template takes instructions, and not with --raw."
        raise typer.BadParameter(message, param_hint="--system")
    return text


def _options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    stop: list[str] | None,
    keep_alive: float | None,
) -> GenerateOptions:
    options = GenerateOptions()
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if min_p is not None:
        options["min_p"] = min_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    if keep_alive is not None:
        options["keep_alive_seconds"] = keep_alive
    return options


async def _write_answer(stream: GenerationStream, keep: Callable[[str], None] | None = None) -> None:
    """Write text as it comes, reasoning as a note, and a line of figures for a person."""
    text = ""
    finish_reason: FinishReason | None = None
    try:
        async for chunk in stream:
            if chunk.reasoning_text:
                notes().print(chunk.reasoning_text, style="dim", end="", markup=False)
            if chunk.text:
                text = chunk.text
                write(chunk.text)
                if keep is not None:
                    keep(chunk.text)
            finish_reason = chunk.finish_reason or finish_reason
    except PaddockError:
        if text and not text.endswith("\n"):
            write("\n")  # the error begins a line of its own
        raise
    if not text.endswith("\n"):
        write("\n")
    if sys.stderr.isatty():
        note(_figures(stream, finish_reason), style="dim")


def _figures(stream: GenerationStream, finish_reason: FinishReason | None) -> str:
    """Say how many tokens, how fast, and whether the answer was cut."""
    tokens, seconds = stream.usage.completion_tokens, stream.timings.generation_seconds
    rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    first = stream.timings.queue_seconds + stream.timings.prompt_seconds
    cut = "; cut at the token limit" if finish_reason is FinishReason.LENGTH else ""
    return f"{stream.usage.prompt_tokens} + {tokens} tokens{rate}, first after {seconds_text(first)}{cut}"


async def _write_events(stream: GenerationStream) -> None:
    write_json({"event": "started", "generation_id": stream.generation_id, "model": stream.model})
    async for chunk in stream:
        write_json({"event": "chunk", **output.as_object(chunk)})
    write_json({"event": "generated", "usage": stream.usage, "timings": stream.timings, "seed": stream.seed})


def _read_line(prompt: str) -> str | None:
    """Read a line; None at the end of the input. Ctrl-C clears the line."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                write("\n")
            return None
        except KeyboardInterrupt:
            write("\n")
            note("Ctrl-D leaves.", style="dim")
