"""Running the long steps of the repository's scripts so that a person watching knows what goes on.

Standard library only: `scripts/bootstrap.py` runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"

_ERROR_LINES = 5
_TAIL_LINES = 20
_TERMINAL_PERIOD_S = 1.0
_LOG_PERIOD_S = 15.0
_STOP_S = 10.0

DISK_FULL = "The disk is full. Free about 2 GiB and run the same command again; it goes on where it stopped."
_NO_NETWORK = (
    "The package registry could not be reached. Check the network (and HTTPS_PROXY, PIP_INDEX_URL or GOPROXY "
    "where you need them), then run the same command again; it goes on where it stopped."
)
_WRONG_HASH = (
    "A downloaded package is not the one the lock names. Try once more; if it stays, the registry or a proxy "
    "serves another file than the one that was locked."
)
_OUT_OF_MEMORY = (
    "The machine ran out of memory. Run again with fewer compilers at once: "
    "CMAKE_BUILD_PARALLEL_LEVEL=1 make setup."
)

# What tools print, in the order it is looked for, and what it means for the person at the terminal.
_CAUSES = {
    r"No space left on device|Disk quota exceeded": DISK_FULL,
    r"THESE PACKAGES DO NOT MATCH THE HASHES": _WRONG_HASH,
    r"Killed signal terminated program|out of memory|Cannot allocate memory|std::bad_alloc": _OUT_OF_MEMORY,
    r"name resolution|Name or service not known|nodename nor servname|no such host": _NO_NETWORK,
    r"Network is unreachable|NewConnectionError|ConnectTimeout|Read timed out": _NO_NETWORK,
    r"ProxyError|dial tcp|Connection refused": _NO_NETWORK,
}


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


def fingerprint(*parts: str | Path) -> str:
    """A short hash of texts and of the contents of files; it changes when any of them does."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:20]


class _Heartbeat:
    """Says that a step is alive: one line rewritten on a terminal, a new line now and then elsewhere."""

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
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
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
    progress: Callable[[str], str | None] = lambda _: None,
) -> None:
    """Runs a command in the repository root, its output going to `log`, and shows that it is alive.

    Args:
        what: The step in a few words, shown on the heartbeat line and in an error.
        command: Program and arguments.
        log: The file that takes everything the command prints; earlier content is replaced.
        env: Variables laid over the environment.
        progress: Gives for a line of output the text to show beside the time, or None to keep the last.

    Raises:
        StepError: The command is missing or failed; the message ends with its last lines.
    """
    heartbeat = _Heartbeat(what)
    shown = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink, log.open(encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as err:
            msg = f"{what}: there is no program {command[0]}."
            raise StepError(msg) from err
        try:
            while _still_running(process):
                for line in output:
                    shown = progress(line) or shown
                heartbeat.beat(shown)
        finally:
            heartbeat.clear()
            _stop(process)
    if process.returncode != 0:
        raise StepError(_failure(what, process.returncode, log))


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.25)
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends what an interrupt left running, with its whole session: compilers are grandchildren."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_S)


def _failure(what: str, status: int, log: Path) -> str:
    """What went wrong, as far as the output tells: a known cause, the first errors, and the last lines."""
    lines = [line[:400] for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if re.search(r"\berror:", line, re.IGNORECASE)][:_ERROR_LINES]
    tail = lines[-_TAIL_LINES:]
    told = "\n".join([*errors, *tail])
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return "\n".join(
        [
            f"{what} {ended}.",
            *dict.fromkeys(sentence for pattern, sentence in _CAUSES.items() if re.search(pattern, told)),
            *(["The first errors it printed:", *(f"    {line}" for line in errors)] if errors else []),
            f"Its last lines, of {log}:",
            *(f"    {line}" for line in tail),
        ]
    )
