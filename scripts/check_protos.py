"""Checks protos/: style, format, stubs up to date, and nothing broken since the last release."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from steps import ROOT, VENV, StepError, fail, say

BUF = VENV / "bin" / "buf"
PUBLIC_PROTOS = "protos/paddock"
TIMEOUT_S = 300


def main() -> None:
    say("checking the protos: style and format")
    passed = [
        succeeds([BUF, "lint"]),
        succeeds([BUF, "format", "--diff", "--exit-code"]),
        succeeds([sys.executable, ROOT / "scripts" / "gen_protos.py", "--check"]),
        compatible_with_last_release(),
    ]
    if not all(passed):
        fail(StepError("the protos do not pass; see above"))


def compatible_with_last_release() -> bool:
    """Whether clients made for the last release still work with these protos; true before the first."""
    described = git("describe", "--tags", "--abbrev=0", "--match", "v[0-9]*")
    if described is None or described.returncode != 0:
        say("the protos are not compared with the last release: git knows of no tag like v1.2.3 here")
        return True
    tag = described.stdout.strip()
    say(f"checking that the protos break nothing since {tag}")
    with tempfile.TemporaryDirectory(prefix="paddock-protos-") as folder:
        released = Path(folder) / "released.tar"
        archived = git("archive", "--output", str(released), tag, "buf.yaml", "protos")
        if archived is None or archived.returncode != 0:
            say(f"the protos are not compared with {tag}: that release has none")
            return True
        return succeeds([BUF, "breaking", "--path", PUBLIC_PROTOS, "--against", released])


def git(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    """Runs git in this repository; None where there is no git."""
    if not shutil.which("git"):
        return None
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def succeeds(command: Sequence[str | Path]) -> bool:
    """Runs a check in the terminal; whether it passed."""
    return subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode == 0


if __name__ == "__main__":
    main()
