"""Records what `make run` shows in a terminal as docs/first-run.svg, the picture in the README.

Run from the repository's environment: `.venv/bin/python scripts/record_first_run.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from steps import ROOT

OUTPUT = ROOT / "docs" / "first-run.svg"
COLUMNS = 110
ROWS = 50
LAST_LINE = "up --models-dir FOLDER"
TIMEOUT_S = 120.0

_WEB_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""A picture that fetches something from elsewhere when it is looked at is none we want in a README."""

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])")


def main() -> None:
    """Run it, stop it once it has said everything, and write the picture."""
    text = record(["make", "run"])
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text("$ make run", style="bold"))
    for line in screen(text):
        console.print(Text.from_ansi(line))
    svg = console.export_svg(title="Paddock", theme=MONOKAI)
    OUTPUT.write_text(_WEB_FONT.sub("", svg), encoding="utf-8")
    sys.stdout.write(f"{OUTPUT.relative_to(ROOT)}\n")


def record(command: list[str]) -> str:
    """Return what a command writes to its terminal until its last line, then end it."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True
    )
    os.close(theirs)
    data = b""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while LAST_LINE.encode() not in data:
            if time.monotonic() > deadline:
                message = f"{LAST_LINE!r} did not come within {TIMEOUT_S:g} s:\n{data.decode()}"
                raise TimeoutError(message)
            data += os.read(ours, 65536)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(TIMEOUT_S)
        os.close(ours)
    return data.decode()


def screen(text: str) -> list[str]:
    """Return the lines a terminal shows in the end: what was drawn over is gone, colours stay."""
    lines = [""]
    row = at = 0
    returned = False
    for found in [*_CONTROL.finditer(text), None]:
        piece = text[at : found.start()] if found else text[at:]
        if piece:
            lines[row] = piece if returned else lines[row] + piece
            returned = False
        if found is None:
            break
        at = found.end()
        arguments, command, control = found.groups()
        if control == "\r":
            returned = True
        elif control == "\n":
            row += 1
            returned = False
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(0, row - int(arguments or 1))
        elif command == "K":
            lines[row] = ""
        elif command == "m":
            lines[row] = found.group() if returned else lines[row] + found.group()
            returned = False
    return [line for index, line in enumerate(lines) if line.strip() or index + 1 < len(lines)]


if __name__ == "__main__":
    main()
