"""The control groups this process is in, of version 1 and 2. Reads files; call it from a thread."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")

_MAX_FILE_BYTES: Final = 64 * 1024


class Level(NamedTuple):
    """A control group."""

    directory: Path
    version: int


def levels(controller: str, root: Path = ROOT, own: Path = OWN) -> list[Level]:
    """Return the control groups that limit this process for a controller, from its own up to the root:
    every level limits. Empty where there are none. `own` names them as /proc/self/cgroup does."""
    found: list[Level] = []
    for line in read(own).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
        # Inside a container the path may be that of the host, and the files those of the root alone.
        found += [Level(top.joinpath(*parts[:depth]), version) for depth in range(len(parts), -1, -1)]
    return found


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Return how many processors' worth of time this process may use; None without a limit."""
    quotas: list[float] = []
    for directory, version in levels("cpu", root, own):
        if version == 1:
            texts = [read(directory / "cpu.cfs_quota_us"), read(directory / "cpu.cfs_period_us")]
        else:
            texts = read(directory / "cpu.max").split()
        match [_number(text) for text in texts]:
            case [int(quota), int(period)] if period > 0:
                quotas.append(quota / period)
            case _:  # "max", -1, or a level without the files
                pass
    return min(quotas, default=None)


def read_number(path: Path) -> int | None:
    """Return the number a file holds; None where there is none, or `max`."""
    return _number(read(path))


def read(path: Path) -> str:
    """Return what a file holds; nothing where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:  # not every kernel, nor every level of a hierarchy, has every file
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None
