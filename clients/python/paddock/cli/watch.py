"""`paddock watch`: changes as they happen, over lost connections and restarts of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from paddock.cli import output
from paddock.cli.output import note, results, state_text, write_json
from paddock.cli.session import DEFAULT_SERVER, JsonOption, ServerOption, call, valid_text
from paddock.errors import PaddockError, Reason, make_error
from paddock.types import Failure, Model, ModelChanged, ModelDeleted, ModelState, Synced, WatchEvent

if TYPE_CHECKING:
    from paddock.client import Client

SILENCE_SECONDS: Final = 90.0
"""Silence after which a connection counts as lost: the server speaks every 30 seconds."""

FIRST_DELAY_SECONDS: Final = 0.2
MOST_DELAY_SECONDS: Final = 5.0

_LOST: Final = frozenset(
    {Reason.SERVER_UNREACHABLE, Reason.SHUTTING_DOWN, Reason.CANCELLED, Reason.WATCH_TOO_SLOW}
)
"""Ends of a watch after which it can go on where it was."""


@dataclass(frozen=True, slots=True)
class StartedOver:
    """Not every change since the last event is known: forget all models, every one comes anew."""

    reason: str
    message: str
    restarted: bool = False
    """Whether it is because the server is another one than before."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection is lost; the watch goes on when there is one again."""

    message: str


Event = WatchEvent | StartedOver | Lost


async def follow(
    client: Client,
    models: tuple[str, ...] = (),
    *,
    reconnect_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Event]:
    """Watch models without an end: a lost connection is made anew and the watch resumes after the last
    revision that was seen, or starts over, and says so.

    Raises:
        PaddockError: the first connection failed; there was no other for `reconnect_seconds`; anything a new
            connection does not help against.
    """
    instance_id = ""
    seen: int | None = None  # the revision to go on after; None until the initial state is whole
    partial = connected = False
    delay, lost_at = FIRST_DELAY_SECONDS, None
    while True:
        try:
            instance_id = instance_id or (await client.server_info()).instance_id
            start = 0 if seen is None else seen + 1
            async with aclosing(_events(client, models, start, instance_id)) as events:
                async for event in events:
                    if seen is not None or isinstance(event, Synced):
                        seen = event.revision
                    partial, connected = seen is None, True
                    delay, lost_at = FIRST_DELAY_SECONDS, None
                    yield event
            failure = make_error(Reason.SERVER_UNREACHABLE, "The server ended the watch.")
        except PaddockError as error:
            failure = error
        gone = failure.reason == Reason.REVISION_GONE
        first = lost_at is None
        lost_at = clock() if lost_at is None else lost_at
        if not gone and (
            failure.reason not in _LOST or not connected or clock() - lost_at >= reconnect_seconds
        ):
            raise failure
        if gone or partial:
            restarted = gone and failure.metadata.get("instance_id", instance_id) != instance_id
            instance_id, seen, partial = "", None, False
            yield StartedOver(failure.reason, failure.message, restarted)
        elif first:
            yield Lost(failure.message)
        await asyncio.sleep(delay)
        delay = min(delay * 2, MOST_DELAY_SECONDS)


async def _events(
    client: Client, models: tuple[str, ...], start: int, instance_id: str
) -> AsyncGenerator[WatchEvent]:
    """Watch over one connection; too long a silence is its end."""
    async with client.watch(models, start_revision=start, instance_id=instance_id) as stream:
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    event = await anext(stream, None)
            except TimeoutError:
                message = f"The server said nothing for {SILENCE_SECONDS:g} seconds."
                raise make_error(Reason.SERVER_UNREACHABLE, message) from None
            if event is None:
                return
            yield event


def watch(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models to watch; all when none.", callback=valid_text),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    reconnect_seconds: Annotated[
        float, typer.Option(min=0, help="How long to try to reach a server that went away.")
    ] = 60,
) -> None:
    """Show models and what becomes of them, as it happens. Ctrl-C ends it.

    A lost connection is made anew, and nothing in between is missed; where that cannot be, the watch starts
    over and says so. With --json, one event a line: changed, deleted, synced, started_over, lost.
    """

    async def work(client: Client) -> None:
        show = _write_event if as_json else Lines().show
        # A watch knows no aliases, and waits for models that are not there: at a keyboard those are slips.
        ids = tuple([(await client.get(name)).id for name in models or ()])
        async with aclosing(follow(client, ids, reconnect_seconds=reconnect_seconds)) as events:
            async for event in events:
                show(event)

    call(server, work)


def _write_event(event: Event) -> None:
    kinds = {
        ModelChanged: "changed",
        ModelDeleted: "deleted",
        Synced: "synced",
        StartedOver: "started_over",
        Lost: "lost",
    }
    write_json({"event": kinds[type(event)], **output.as_object(event)})


class Lines:
    """Events for a person: a line for every change, notes for the rest."""

    def __init__(self) -> None:
        self._synced = False
        self._failures: dict[str, Failure | None] = {}
        """The latest failure of each model that has been shown, or was there from the start."""

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case ModelChanged():
                self._print(event.model.id, self._change(event.model, event.previous_state))
            case ModelDeleted():
                self._failures.pop(event.model, None)
                self._print(event.model, Text("gone", style="red"))
            case Synced():
                if not self._synced:
                    note("Watching; Ctrl-C ends it.", style="dim")
                self._synced = True
            case StartedOver():
                self._synced = False
                note(_why_anew(event), style="yellow")
            case Lost():
                note(f"Connection lost: {event.message} Trying again.", style="yellow")

    def _print(self, model: str, what: Text) -> None:
        # The clock of this machine: what a person compares the line with.
        moment = datetime.now().astimezone().strftime("%H:%M:%S")
        results().print(Text.assemble((moment, "dim"), f"  {model}  ", what))

    def _change(self, model: Model, previous: ModelState | None) -> Text:
        """Return what has changed; with the failure that is the reason, the first time it is seen."""
        failure = model.last_failure
        is_news = failure is not None and failure != self._failures.get(model.id)
        self._failures[model.id] = failure
        reason = failure.reason if failure is not None and model.state is ModelState.FAILED else ""
        now = state_text(model.state, reason)
        if previous is None:
            return now
        why = f": {failure.message}" if failure is not None and is_news else ""
        if previous is model.state:
            return Text.assemble(now, why or " (changed)")
        return Text.assemble(f"{previous} -> ", now, why)


def _why_anew(event: StartedOver) -> str:
    if event.restarted:
        return "The server has restarted; starting over."
    if event.reason == Reason.REVISION_GONE:
        return "More has changed meanwhile than the server remembers; starting over."
    return f"{event.message} Starting over."
