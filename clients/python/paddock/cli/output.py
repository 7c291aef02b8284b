"""What commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, cast

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from paddock.types import Download, ModelState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_STATE_STYLES: Final[Mapping[ModelState, str]] = {
    ModelState.LOADED: "green",
    ModelState.LOADING: "yellow",
    ModelState.UNLOADING: "yellow",
    ModelState.SLEEPING: "cyan",
    ModelState.FAILED: "red",
}


_LEAST_COLUMNS: Final = 2
"""Columns of a table that are shown however narrow the terminal is: a name, and how it is."""

_GAP: Final = 2
"""Between the columns of a table."""

_GRID_GAP: Final = 3
"""Between the names of a grid and their values."""


def results() -> Console:
    """Return the console for results. Plain text unless it is a terminal."""
    return Console(highlight=False, soft_wrap=True)


def notes() -> Console:
    """Return the console for progress, warnings and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str, *, style: str = "") -> None:
    """Tell the person at the keyboard something that is not a result."""
    notes().print(Text(text, style=style))


def error(text: str) -> None:
    """Tell what went wrong."""
    notes().print(Text.assemble(("Error: ", "bold red"), text))


def write(text: str) -> None:
    """Write generated text as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: object, *, indent: int | None = None) -> None:
    """Write a value as JSON: in one line, unless indented."""
    write(json.dumps(plain(value), ensure_ascii=False, indent=indent) + "\n")


def plain(value: object) -> object:
    """Turn dataclasses, times and bytes into what JSON knows. Enumerations are strings already."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_object(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return {str(key): plain(item) for key, item in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("Sequence[object]", value)]
    return value


def as_object(value: DataclassInstance) -> dict[str, object]:
    """Turn a dataclass into an object of JSON."""
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def show_table(header: Sequence[str], rows: Iterable[Sequence[str | Text]], *, wide: bool = False) -> None:
    """Write a table: on a terminal the columns it has room for, unless told to write all; all elsewhere."""
    cells = [list(row) for row in rows]
    count = len(header) if wide else fitting(header, cells, _terminal_width())
    results().print(table(header[:count], [row[:count] for row in cells]))
    if count < len(header):
        note(f"Left out: {', '.join(header[count:])}. `--wide` shows every column.", style="dim")


def show_grid(rows: Iterable[tuple[str, str | Text]]) -> None:
    """Write names with their values: folded at the width of the terminal, whole where there is none."""
    results().print(grid(rows, width=_terminal_width()))


def _terminal_width() -> int | None:
    """Return the columns of the terminal; None when results go elsewhere."""
    return Console().width if sys.stdout.isatty() else None


def fitting(header: Sequence[str], rows: Sequence[Sequence[str | Text]], width: int | None) -> int:
    """Return how many columns a table of at most `width` has; the last are left out first.

    Names are never cut, since they are what one types next: where even the least columns have no room, the
    lines are longer than `width`.
    """
    widths = _widths(header, rows)
    count = len(header)
    while width is not None and count > _LEAST_COLUMNS and sum(widths[:count]) + _GAP * (count - 1) > width:
        count -= 1
    return count


def table(header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Text:
    """Return a table without lines, as `docker ps` has it; nothing in it is cut."""
    widths = _widths(header, rows)
    lines = [_line(row, widths) for row in ([Text(name, style="bold") for name in header], *rows)]
    return Text("\n").join(lines)


def _widths(header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> list[int]:
    return [
        max(cell_len(str(cell)) for cell in (name, *(row[index] for row in rows)))
        for index, name in enumerate(header)
    ]


def _line(cells: Sequence[str | Text], widths: Sequence[int]) -> Text:
    """Return cells beside each other, with nothing behind the last."""
    line = Text()
    for cell, width in zip(cells, widths, strict=False):
        line.append(cell)
        line.append(" " * (width - cell_len(str(cell)) + _GAP))
    line.rstrip()
    return line


def grid(rows: Iterable[tuple[str, str | Text]], *, width: int | None = None) -> Text:
    """Return names with their values, one a line; longer values go on below, at `width` at the latest."""
    facts = [(name, Text(value) if isinstance(value, str) else value) for name, value in rows]
    indent = max(cell_len(name) for name, _ in facts) + _GRID_GAP
    lines: list[Text] = []
    for name, value in facts:
        parts = value.split(allow_blank=True)
        if width is not None:
            console = Console(width=max(width - indent, 1))
            parts = [line for part in parts for line in part.wrap(console, console.width, overflow="fold")]
        for start, part in zip_longest((name,), parts, fillvalue=""):
            line = Text.assemble((start, "bold"), " " * (indent - cell_len(start)), part)
            line.rstrip()
            lines.append(line)
    return Text("\n").join(lines)


def state_text(state: ModelState, reason: str = "") -> Text:
    """Return a state in its colour, with the reason of a failure."""
    return Text(f"{state} ({reason})" if reason else str(state), style=_STATE_STYLES.get(state, ""))


def download_text(download: Download) -> Text:
    """Return how a download is, in its colour: `downloading 45%`, `paused`, `download failed (REASON)`."""
    if download.failure is not None:
        return Text(f"download failed ({download.failure.reason})", style="red")
    share = f" {download.completed_bytes / download.total_bytes:.0%}" if download.total_bytes else ""
    return Text(f"paused{share}" if download.paused else f"downloading{share}", style="yellow")


def count_text(count: int) -> str:
    """Return a number of parameters as model cards write it: 7.6B, 124M."""
    value = float(count)
    for unit in ("", "K", "M", "B"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def seconds_text(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"


def seconds_since(time: datetime, now: datetime | None = None) -> float:
    """Return how long ago something was; below zero when it is to come."""
    return ((now or datetime.now(UTC)) - time).total_seconds()


def ago_text(time: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago something was; "-" when it never was."""
    if time is None:
        return "-"
    return f"{seconds_text(max(seconds_since(time, now), 0))} ago"


def brief_text(seconds: float) -> str:
    """Return a duration in one unit, for a column: 45s, 4m, 3h, 2d. What has passed is 0s."""
    for unit, length, most in (("s", 1, 60), ("m", 60, 60), ("h", 3600, 48)):
        count = round(max(seconds, 0) / length)
        if count < most:
            return f"{count}{unit}"
    return f"{round(seconds / 86_400)}d"
