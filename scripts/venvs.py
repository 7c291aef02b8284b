"""Virtual environments whose packages come from a lock, each hash checked. Standard library only."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steps import StepError, run


def _package_at_hand(line: str) -> str | None:
    match = re.match(r"\s*(?:Collecting|Downloading|Building wheel for|Installing collected)\s+(\S+)", line)
    return match.group(0).strip()[:80] if match else None


class Environment:
    """One virtual environment and the stamps that say which steps of its set-up are done."""

    def __init__(self, path: Path, logs: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.logs = logs
        self._stamp_file = path / "paddock-setup.json"

    def is_done(self, step: str, key: str) -> bool:
        """Whether the step was finished with inputs of this fingerprint."""
        return self.stamps().get(step) == key

    def stamps(self) -> dict[str, str]:
        """Fingerprints of the finished steps; none when the file is absent or was cut off by a crash."""
        try:
            return json.loads(self._stamp_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def mark_done(self, **stamps: str) -> None:
        """Notes the steps as finished."""
        partial = self._stamp_file.with_suffix(".partial")
        partial.write_text(json.dumps({**self.stamps(), **stamps}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._stamp_file)

    def works(self) -> bool:
        """Whether its interpreter starts and is of the running version; updating Python can break it."""
        version = "import sys; print(sys.version_info[:2])"
        try:
            found = subprocess.run(
                [self.python, "-c", version], capture_output=True, text=True, timeout=60, check=False
            )
        except OSError:
            return False
        return found.stdout.strip() == str(sys.version_info[:2]) and (self.path / "bin" / "pip").exists()

    def create(self) -> None:
        """Makes the environment, over whatever lies at its path."""
        # Debian ships Python without them.
        if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
            package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
            msg = (
                f"{sys.executable} cannot make environments. On Debian and Ubuntu: sudo apt install {package}"
            )
            raise StepError(msg)
        run(
            "making the virtual environment",
            [sys.executable, "-m", "venv", "--clear", self.path],
            log=self.logs / "venv.log",
        )

    def pip(
        self,
        what: str,
        arguments: Sequence[str | Path],
        *,
        log: str,
        env: Mapping[str, str] | None = None,
        progress: Callable[[str], str | None] = _package_at_hand,
    ) -> None:
        """Runs its pip, with its programs first on PATH and `env` laid over the environment."""
        run(
            what,
            [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
            log=self.logs / log,
            env={"PATH": bin_path(self), **(env or {})},
            progress=progress,
        )

    def install_locked(self, what: str, lock: Path, *, log: str) -> None:
        """Installs exactly what the lock names; pip refuses a file whose hash is not in it."""
        self.pip(
            what,
            ["install", "--require-hashes", "--no-deps", "--progress-bar=off", "--requirement", lock],
            log=log,
        )


def split_lock(text: str, package: str) -> tuple[str, str]:
    """The entry of one package, hashes and all, and the lock without it."""
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    found = [entry for entry in entries if entry.startswith(f"{package}==")]
    if len(found) != 1:
        msg = (
            f"the lock names {package} {len(found)} times; it must name it once. `make lock` writes it anew."
        )
        raise StepError(msg)
    return found[0], "".join(entry for entry in entries if entry != found[0])


def bin_path(environment: Environment) -> str:
    """A PATH with the environment's programs first."""
    return os.pathsep.join([str(environment.path / "bin"), os.environ.get("PATH", os.defpath)])
