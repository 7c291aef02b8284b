"""What became of a worker process, and whether the kernel's out-of-memory killer had a hand in it."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG_TAIL_LINES: Final = 20
"""Lines of a worker's log kept with its exit."""

_OOM_SAMPLES: Final = 3
_CGROUP_FILE: Final = Path("/proc/self/cgroup")
_VMSTAT_FILE: Final = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended. With neither an exit code nor a signal it had not ended when it was given up."""

    exit_code: int | None
    """Exit code; None when a signal ended the worker."""

    signal: str
    """Signal that ended the worker, for example `SIGSEGV`; empty when none did."""

    intended: bool
    """Whether the server wanted the worker gone, recorded before any signal was sent."""

    log_tail: tuple[str, ...]
    """Last lines the worker wrote, oldest first, at most `LOG_TAIL_LINES`."""

    cause: str = ""
    """Why the server killed it, when it did so because of a fault, for example `it sent nothing for 20 s`."""

    oom_killed: bool = False
    """Whether the kernel's out-of-memory killer was at work when the worker died of SIGKILL."""

    def describe(self) -> str:
        """Say what happened, to go after the name of the worker: `was ended by SIGSEGV`."""
        if self.cause:
            return f"was killed because {self.cause}"
        if self.oom_killed:
            return f"was ended by {self.signal}, most likely by the kernel's out-of-memory killer"
        if self.signal:
            return f"was ended by {self.signal}"
        if self.exit_code is not None:
            return f"exited with code {self.exit_code}"
        return "has not exited"

    def metadata(self) -> dict[str, str]:
        """Return the same for programs: `exit_code` or `signal`, and `cause` and `oom_killed` where they
        apply."""
        values = {"signal": self.signal, "cause": self.cause}
        if self.exit_code is not None:
            values["exit_code"] = str(self.exit_code)
        if self.oom_killed:
            values["oom_killed"] = "true"
        return {key: value for key, value in values.items() if value}


def split_return_code(return_code: int) -> tuple[int | None, str]:
    """Return the exit code, or None and the name of the signal, of a `subprocess` return code."""
    if return_code >= 0:
        return return_code, ""
    try:
        return None, signal.Signals(-return_code).name
    except ValueError:  # a real-time signal has no name
        return None, f"signal {-return_code}"


class OomWatch:
    """Tells whether the kernel's out-of-memory killer has been at work lately.

    The kernel counts its kills per control group, not per process. Compared over a short window, so that the
    death of one worker is not laid on a kill that another one died of long before.
    """

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        self._files = oom_counter_files() if files is None else files
        self._samples: deque[int] = deque(maxlen=_OOM_SAMPLES)
        self.sample()

    def sample(self) -> None:
        """Note the counter. To be called every few seconds; the window is the last few calls."""
        self._samples.append(self._count())

    def has_struck(self) -> bool:
        """Say whether a process of this control group was killed within the window."""
        return self._count() > self._samples[0]

    def _count(self) -> int:
        for file in self._files:
            try:
                text = file.read_text()
            except OSError:  # not this kind of control group; another file may do
                continue
            for line in text.splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return 0


def oom_counter_files() -> tuple[Path, ...]:
    """Return where the kernel may count its kills, best first: this control group, version 2 or 1, or the
    machine."""
    try:
        groups = _CGROUP_FILE.read_text().splitlines()
    except OSError:  # not Linux
        return ()
    files: list[Path] = []
    root = Path("/sys/fs/cgroup")
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(root / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return (*files, _VMSTAT_FILE)
