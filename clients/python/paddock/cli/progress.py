"""Progress of a load on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from paddock.cli.output import notes, seconds_text
from paddock.sizes import size_text
from paddock.types import LoadProgress, ProgressKind, Stage

if TYPE_CHECKING:
    from rich.console import Console

LABELS: Final[Mapping[Stage, str]] = {
    Stage.RESOLVE: "Finding files",
    Stage.DOWNLOAD: "Downloading",
    Stage.VERIFY: "Checking files",
    Stage.ADMIT: "Waiting for memory",
    Stage.SPAWN: "Starting worker",
    Stage.WEIGHTS: "Reading weights",
    Stage.WARMUP: "Warming up",
    Stage.UNKNOWN: "Working",
}

_LINE_STEP: Final = 0.1
"""Part of a stage after which a plain line is due."""


class Meter:
    """What is known of the running stage: bytes, rate, fraction. Takes its time from the events alone."""

    def __init__(self) -> None:
        self._began: datetime | None = None
        self._before: int | None = None
        self.fraction: float | None = None
        self.completed_bytes = 0
        self.total_bytes = 0
        self.bytes_per_second: float | None = None

    def start(self, progress: LoadProgress) -> None:
        """Begin a stage."""
        self._began, self._before = progress.event_time, None
        self.fraction = self.bytes_per_second = None
        self.completed_bytes = self.total_bytes = 0

    def advance(self, progress: LoadProgress) -> None:
        """Take in how far the stage is."""
        self.fraction = progress.fraction
        self.completed_bytes = progress.completed_bytes
        self.total_bytes = progress.total_bytes
        if self._before is None:
            # A download that goes on has bytes before its first: they did not arrive now.
            self._before = progress.completed_bytes if progress.stage is Stage.DOWNLOAD else 0
        if self._began is not None and progress.event_time is not None:
            seconds = (progress.event_time - self._began).total_seconds()
            arrived = progress.completed_bytes - self._before
            self.bytes_per_second = arrived / seconds if seconds > 0 and arrived > 0 else None

    def text(self) -> str:
        """Say bytes and rate: `500 MiB of 1.0 GiB, 250 MiB/s`; empty in stages that move none."""
        if not self.completed_bytes and not self.total_bytes:
            return ""
        done = size_text(self.completed_bytes)
        if self.total_bytes:
            done = f"{done} of {size_text(self.total_bytes)}"
        return f"{done}, {size_text(round(self.bytes_per_second))}/s" if self.bytes_per_second else done


class LoadView(Protocol):
    """Shows a load."""

    def show(self, progress: LoadProgress) -> None:
        """Show one event."""
        ...


@contextmanager
def load_view(console: Console | None = None) -> Generator[LoadView]:
    """Show a load for as long as the block runs."""
    console = console or notes()
    if not console.is_terminal or console.is_dumb_terminal:
        yield LineView(console)
        return
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
    )
    with bars:
        yield BarView(bars)


class LineView:
    """One line when a stage begins, at every tenth of it, and when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = Meter()
        self._next_fraction = 0.0

    def show(self, progress: LoadProgress) -> None:
        """Show one event."""
        label = LABELS[progress.stage]
        match progress.kind:
            case ProgressKind.STARTED:
                self._meter.start(progress)
                self._next_fraction = _LINE_STEP
                self._print(f"{label}: {progress.message}" if progress.message else f"{label} ...")
            case ProgressKind.ADVANCED:
                self._meter.advance(progress)
                self._advance(label, progress.fraction)
            case ProgressKind.FINISHED:
                self._print(f"{label}: {finished_text(progress, self._meter)}")
            case ProgressKind.WARNING:
                self._print(f"{label}: {warning_text(progress)}")

    def _advance(self, label: str, fraction: float | None) -> None:
        if fraction is None or fraction + 1e-9 < self._next_fraction or fraction >= 1:
            return
        self._next_fraction = fraction + _LINE_STEP
        detail = self._meter.text()
        self._print(f"{label}: {fraction:.0%}" + (f" ({detail})" if detail else ""))

    def _print(self, line: str) -> None:
        self._console.print(Text(line))


class BarView:
    """A bar for the running stage, and a line for each that has ended."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._meter = Meter()
        self._task: TaskID | None = None

    def show(self, progress: LoadProgress) -> None:
        """Show one event."""
        label = LABELS[progress.stage]
        match progress.kind:
            case ProgressKind.STARTED:
                self._meter.start(progress)
                self._remove()
                self._task = self._bars.add_task(label, total=None, detail=progress.message)
            case ProgressKind.ADVANCED:
                self._meter.advance(progress)
                if self._task is None:  # joined in the middle of the stage
                    self._task = self._bars.add_task(label, total=None, detail="")
                self._advance(self._task, progress.fraction)
            case ProgressKind.FINISHED:
                self._remove()
                self._print("✓", "green", label, finished_text(progress, self._meter))
            case ProgressKind.WARNING:
                self._print("!", "yellow", label, warning_text(progress))

    def _advance(self, task: TaskID, fraction: float | None) -> None:
        if fraction is None:
            self._bars.update(task, total=None, detail=self._meter.text())
        else:
            detail = f"{fraction:4.0%}  {self._meter.text()}"
            self._bars.update(task, total=1.0, completed=fraction, detail=detail)

    def _remove(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _print(self, mark: str, style: str, label: str, text: str) -> None:
        self._bars.console.print(Text.assemble((mark, style), f" {label:<18} {text}"))


def finished_text(progress: LoadProgress, meter: Meter) -> str:
    """Say how a stage ended: `1.0 GiB in 2.5 s`."""
    if progress.cached:
        return "nothing to do"
    parts = [size_text(meter.total_bytes)] if meter.total_bytes else []
    if progress.stage_seconds is not None:
        parts.append(
            f"in {seconds_text(progress.stage_seconds)}" if parts else seconds_text(progress.stage_seconds)
        )
    return " ".join(parts) or "done"


def warning_text(progress: LoadProgress) -> str:
    """Say what went wrong without ending the stage."""
    return f"warning: {progress.warning.message}" if progress.warning else "warning"
