"""Processes under measurement: talking to them, their CPU time, their memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class LineProcess:
    """A process that answers a line of JSON with a line of JSON."""

    def __init__(self, *module_and_arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> Any:
        """Send one question and return its answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            message = f"{self.process.args} ended with exit code {self.process.wait()}"
            raise RuntimeError(message)
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time the threads of a process have used; those that have ended are not counted."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@dataclass(frozen=True, slots=True)
class Memory:
    """Proportional memory of a process, in bytes."""

    pss: int
    """All of it."""

    file_pss: int
    """Of that, pages of the model file."""


def memory(pid: int, model: Path | None = None) -> Memory:
    """Read a process's proportional memory, and how much of it is the mapped model file."""
    total = file_total = 0
    current_is_model = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            current_is_model = model is not None and line.endswith(str(model))
        elif first == "Pss:":
            kib = int(line.split()[1])
            total += kib * 1024
            file_total += kib * 1024 if current_is_model else 0
    return Memory(total, file_total)
