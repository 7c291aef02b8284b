"""What a server or a gateway says to the person who started it. A log collector reads the same in the log."""

from __future__ import annotations

import sys

from paddock.cli.output import note


class Person:
    """Who started a server, if it is somebody at a terminal; else nothing is said."""

    def __init__(self, log_format: str) -> None:
        """`log_format` is the one of the log: who asked for JSON is no reader of sentences."""
        self._listens = sys.stderr.isatty() and log_format != "json"
        self.http_url = ""
        """Where HTTP is served; empty where it is not."""

    def ready(self, grpc_address: str) -> None:
        """Say where things are, and how to stop. `grpc_address` is empty where no gRPC is served."""
        if self.http_url:
            self._say(f"HTTP   {self.http_url}/v1  (OpenAI-compatible)", style="bold")
        if grpc_address:
            self._say(f"gRPC   {grpc_address}", style="bold")
            self._say("`paddock ls` lists the models, `paddock chat MODEL` talks with one.")
        self._say("Ctrl-C stops " + ("the server." if grpc_address else "the gateway."))

    def draining(self, seconds: float) -> None:
        """Say that what runs may end, and what a second Ctrl-C does."""
        self._say(f"Stopping: what runs may go on for {seconds:g} s at most. Ctrl-C again stops at once.")

    def stopping_at_once(self) -> None:
        """Say that what runs is ended."""
        self._say("Stopping at once.")

    def _say(self, text: str, *, style: str = "") -> None:
        if self._listens:
            note(text, style=style)
