"""Running the long steps of the repository's scripts so that a person watching knows what goes on.

Standard library only: `scripts/bootstrap.py` runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"

_TAIL_LINES = 25
_TERMINAL_PERIOD_S = 1.0
_LOG_PERIOD_S = 15.0
_STOP_S = 10.0

_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"No space left on device|Disk quota exceeded"),
        "The disk is full. Free about 2 GB and run the same command again; it goes on where it stopped.",
    ),
    (
        re.compile(
            r"name resolution|Name or service not known|nodename nor servname|Network is unreachable"
            r"|Connection refused|Failed to establish a new connection|NewConnectionError|ConnectTimeout"
            r"|Read timed out|ProxyError|dial tcp|no such host|from versions: none"
        ),
        "The package registry could not be reached. Check the network (and HTTPS_PROXY, PIP_INDEX_URL or GOPROXY "
        "where you need them), then run the same command again; it goes on where it stopped.",
    ),
    (
        re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES"),
        "A downloaded package is not the one the lock names. Try once more; if it stays, the registry or a "
        "proxy serves another file than the one that was locked.",
    ),
    (
        re.compile(r"Killed signal terminated program|out of memory|Cannot allocate memory|std::bad_alloc"),
        "The machine ran out of memory. Run again with fewer compilers at once: "
        "CMAKE_BUILD_PARALLEL_LEVEL=1 make setup.",
    ),
)


class StepError(Exception):
    """A step that cannot go on; the text is the whole message for the person at the terminal."""


def say(text: str) -> None:
    """Tells the person at the terminal what is going on."""
    print(f"paddock: {text}", flush=True)


def fail(error: StepError) -> NoReturn:
    """Prints the error and ends the program with status 1."""
    print(f"paddock: error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def elapsed(seconds: float) -> str:
    """Minutes and seconds, as in `2:07`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def fingerprint(*parts: str | bytes | Path) -> str:
    """A short hash of texts and of the contents of files; it changes when any of them does."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part if isinstance(part, bytes) else part.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:20]


class _Heartbeat:
    """One line that says a step is alive: rewritten in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._in_place = sys.stdout.isatty()
        self._next = self._started + (0.0 if self._in_place else _LOG_PERIOD_S)

    def beat(self, progress: str) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_TERMINAL_PERIOD_S if self._in_place else _LOG_PERIOD_S)
        line = f"paddock:   {self._what}: {elapsed(now - self._started)}{' ' if progress else ''}{progress}"
        if self._in_place:
            print(f"\r\033[K{line[: _terminal_width() - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def clear(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", flush=True)


def run(
    what: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    progress: Callable[[str], str | None] = lambda _: None,
) -> None:
    """Runs a command with its output in `log`, showing a heartbeat until it ends.

    Args:
        what: The step in a few words, shown on the heartbeat line and in an error.
        command: Program and arguments.
        log: The file that takes everything the command prints; earlier content is replaced.
        env: Variables laid over the environment.
        cwd: Where the command runs.
        progress: Gives for a line of output the text to show beside the elapsed time, or None to keep the last.

    Raises:
        StepError: The command is missing or failed; the message ends with its last lines.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    shown = ""

    def drain(output: Iterator[str]) -> None:
        nonlocal shown
        with log.open("w", encoding="utf-8") as sink:
            for line in output:
                sink.write(line)
                tail.append(line.rstrip()[:400])
                shown = progress(line) or shown

    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError as err:
        msg = f"{what}: there is no program {command[0]}."
        raise StepError(msg) from err
    assert process.stdout is not None
    reader = threading.Thread(target=drain, args=(process.stdout,), daemon=True)
    reader.start()
    heartbeat = _Heartbeat(what)
    try:
        while _still_running(process):
            heartbeat.beat(shown)
    finally:
        heartbeat.clear()
        _stop(process)
        reader.join(timeout=_STOP_S)
    if process.returncode != 0:
        raise StepError(_failure(what, process.returncode, list(tail), log))


def _still_running(process: subprocess.Popen[str]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.25)
        return False
    return True


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends what an interrupt left running, so that no compiler outlives the command that started it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=_STOP_S)


def _failure(what: str, status: int, tail: Sequence[str], log: Path) -> str:
    text = "\n".join(tail)
    cause = next((f"{sentence}\n" for pattern, sentence in _CAUSES if pattern.search(text)), "")
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = "\n".join(f"    {line}" for line in tail)
    return f"{what} {ended}.\n{cause}Its last lines ({log} has them all):\n{lines}"


def _terminal_width() -> int:
    with contextlib.suppress(OSError):
        return max(20, os.get_terminal_size().columns)
    return 100
