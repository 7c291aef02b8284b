"""What a fake worker is told to do: JSON in `PADDOCK_FAKE`, over which `<model path>.fake.json` goes at the
load."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

ENV_NAME: Final = "PADDOCK_FAKE"

Fault = Literal[
    "garbage",  # bytes that are no frame of a sane length
    "not_a_message",  # a frame that is not protobuf
    "empty_frame",
    "second_hello",
    "ready",  # once more
    "load_progress",  # once more
    "unknown_generation",
    "unknown_call",
    "close_connection",  # and live on
    "silence",  # no frame any more, and nothing read
]


@dataclass(frozen=True)
class Behaviour:
    """One field for every way to behave. Those about the start are only read from the environment."""

    # Start
    die_in_handshake: bool = False
    hang_in_handshake: bool = False
    wrong_version: bool = False
    wrong_instance_id: bool = False
    heartbeat_seconds: float = 2.0
    """0 sends none."""
    ignore_sigterm: bool = False
    fork_grandchild: Literal["", "group", "session"] = ""
    """A child of the worker that ignores SIGTERM and holds its pipe and its socket, in its process group or
    in a session of its own. It writes `grandchild PID` to the log."""

    # Load
    load_seconds: float = 0.0
    progress_steps: int = 4
    stderr_lines: tuple[str, ...] = ()
    flood_stderr_bytes: int = 0
    flood_line_bytes: int = 100
    """0 floods without a single line end."""
    crash_at: float | None = None
    """Part of the load after which it dies, with `crash_signal` or `exit_code`."""
    exit_code: int = 1
    crash_signal: str = ""
    hang_in_load: bool = False
    """Half-way it reports no progress any more; heartbeats go on."""
    ignore_abort: bool = False
    fail_load_reason: str = ""
    fail_load_message: str = "the fake was told to fail"
    fail_load_field: str = ""
    fail_load_metadata: dict[str, str] = field(default_factory=dict[str, str])

    hang_in_sleep: bool = False
    """It never gives its memory back."""

    # Service
    slot_count: int | None = None
    """None takes what the load says; so for the next two."""
    queue_limit: int | None = None
    context_size_tokens: int | None = None
    token_count: int | None = None
    """Tokens until it says end of generation; None is never, or after 16 when the request has no
    `max_tokens`."""
    tokens_per_second: float = 0.0
    """Steps a second, each a token of every running sequence; 0 does not wait."""
    pieces: tuple[str, ...] = ()
    """Texts of the tokens, over and over; without any, `tok0 tok1 tok2 ...`."""
    stderr_bytes_per_step: int = 0
    fail_generate_reason: str = ""
    fail_generate_message: str = "the fake was told to fail"
    fail_generate_field: str = ""
    step_milliseconds: int = 0
    """What its heartbeats say while a generation runs; so for the next one."""
    preparation_milliseconds: int = 0
    crash_after_tokens: int | None = None
    """Tokens of one generation after which it dies, as for `crash_at`."""
    fault: Fault | None = None
    fault_after_tokens: int = 0
    """Tokens of one generation after which `fault` happens."""

    # Stop
    hang_on_shutdown: bool = False

    def to_json(self) -> str:
        """Return only what differs from the defaults."""
        default = Behaviour()
        values = dataclasses.asdict(self)
        return json.dumps({key: value for key, value in values.items() if value != getattr(default, key)})

    def updated(self, text: str) -> Behaviour:
        """Return this with the fields of a JSON object put over it. An unknown name is an error."""
        values: dict[str, Any] = json.loads(text)
        for name in ("stderr_lines", "pieces"):
            if name in values:
                values[name] = tuple(values[name])
        if values.get("fault") not in (None, *get_args(Fault)):
            message = f"there is no fault named {values['fault']!r}"
            raise ValueError(message)
        return dataclasses.replace(self, **values)


def behaviour_of_environment() -> Behaviour:
    """Return what the environment says."""
    return Behaviour().updated(os.environ.get(ENV_NAME, "{}"))


def sidecar_of(model_path: Path) -> Path:
    """Return the file that tells the fake worker how to behave with one model."""
    return model_path.with_name(model_path.name + ".fake.json")
