"""What a server or a gateway says to the person who started it. A log collector reads the same in the log."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Final

from paddock.cli.output import note

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc.aio

    from paddock.daemons import Stop

FIRST_ANSWER_SECONDS: Final = 2.0
"""How long a gateway waits for its server before it says where things are: what is wrong comes first."""


class Person:
    """Who started a server, if it is somebody at a terminal; else nothing is said."""

    def __init__(self, log_format: str, *, server: str = "") -> None:
        """`log_format` is the one of the log: who asked for JSON is no reader of sentences. `server` is what
        a gateway stands in front of."""
        self._listens = sys.stderr.isatty() and log_format != "json"
        self._server = server
        self.http_url = ""
        """Where HTTP is served; empty where it is not."""

    def ready(self, grpc_address: str) -> None:
        """Say where things are, and how to stop. `grpc_address` is empty where no gRPC is served."""
        if self.http_url:
            self._say(f"HTTP   {self.http_url}/v1  (OpenAI-compatible)", style="bold")
        if self._server:
            self._say(f"in front of the server at {self._server}. Ctrl-C stops the gateway.")
        else:
            self._say(f"gRPC   {grpc_address}", style="bold")
            self._say(
                "`paddock ls` lists the models, `paddock chat MODEL` talks with one. Ctrl-C stops the server."
            )

    def draining(self, seconds: float) -> None:
        """Say that what runs may end, and what a second Ctrl-C does."""
        self._say(f"Stopping: what runs may go on for {seconds:g} s at most. Ctrl-C again stops at once.")

    def stopping_at_once(self) -> None:
        """Say that what runs is ended."""
        self._say("Stopping at once.")

    def _say(self, text: str, *, style: str = "") -> None:
        if self._listens:
            note(text, style=style)


@contextlib.asynccontextmanager
async def told_how_it_stops(person: Person, stop: Stop, drain_seconds: float) -> AsyncGenerator[None]:
    """Tell the log and a person of the signals that come while a gateway runs: while the block does."""
    import structlog  # the client alone does without

    log = structlog.get_logger()

    async def tell() -> None:
        await stop.asked.wait()
        log.info("gateway_draining", seconds=drain_seconds)
        person.draining(drain_seconds)
        await stop.at_once.wait()
        log.warning("gateway_stopping_at_once")
        person.stopping_at_once()

    async with _beside(asyncio.create_task(tell(), name="tell-how-it-stops")):
        yield


@contextlib.asynccontextmanager
async def told_of_the_server(channel: grpc.aio.Channel, person: Person, server: str) -> AsyncGenerator[None]:
    """Tell the log when no server answers behind a gateway, and when one does again, while the block runs.
    Tell a person where things are, once it is known whether one does."""
    known = asyncio.Event()

    async def introduce() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ANSWER_SECONDS):
                await known.wait()
        person.ready("")

    following = asyncio.create_task(_follow(channel, server, known), name="follow-server")
    async with _beside(following), _beside(asyncio.create_task(introduce(), name="introduce-gateway")):
        yield


async def _follow(channel: grpc.aio.Channel, server: str, known: asyncio.Event) -> None:
    import grpc
    import structlog

    log = structlog.get_logger()
    is_reached = True
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            if not is_reached:
                log.info("server_reached", server=server)
            is_reached = True
            known.set()
        elif state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            if is_reached:
                advice = "Requests fail until one does: start it there, or name another with --server."
                log.warning("server_not_reached", server=server, problem="No server answers.", advice=advice)
            is_reached = False
            known.set()
        await channel.wait_for_state_change(state)


@contextlib.asynccontextmanager
async def _beside(task: asyncio.Task[None]) -> AsyncGenerator[None]:
    """Have a task run no longer than the block; what went wrong in it is raised."""
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
