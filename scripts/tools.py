"""Installs the tools that tests use and no Python package holds, where their toolchain is on the machine."""

from __future__ import annotations

import re
import shutil
import subprocess

from steps import CACHE, ROOT, StepError, run, say

GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl"
GRPCURL_VERSION = "v1.9.4"


GO_MODULE = ROOT / "clients" / "go"
GO_OLDEST = (1, 24)
"""The first with `tool` directives, which pin the generators; also what clients/go/go.mod asks for."""


def lacking_go() -> str | None:
    """Why Go cannot be used here, in a few words; None when it can."""
    if not shutil.which("go"):
        return "Go is not installed"
    # Asked inside the module, where a Go that may fetch newer toolchains answers with the one it would use.
    said = subprocess.run(
        ["go", "-C", GO_MODULE, "env", "GOVERSION"], capture_output=True, text=True, timeout=300, check=False
    )
    version = re.match(r"go(\d+)\.(\d+)", said.stdout)
    if version is None or (int(version[1]), int(version[2])) < GO_OLDEST:
        return f"Go is older than {GO_OLDEST[0]}.{GO_OLDEST[1]}"
    return None


def main() -> None:
    folder = CACHE / "bin"
    stamp = folder / ".grpcurl"
    where = (folder / "grpcurl").relative_to(ROOT)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == GRPCURL_VERSION:
        say(f"grpcurl is {where}")
        return
    if found := shutil.which("grpcurl"):
        say(f"grpcurl is {found}")
        return
    if lacking := lacking_go():
        say(f"{lacking}: the tests of the Go client and of grpcurl are skipped")
        return
    say("building grpcurl for the tests, once")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run(
            "building grpcurl",
            ["go", "install", f"{GRPCURL}@{GRPCURL_VERSION}"],
            log=CACHE / "logs" / "grpcurl.log",
            env={"GOBIN": str(folder), "CGO_ENABLED": "0"},
        )
    except StepError as err:
        say(f"grpcurl could not be built, so the tests that use it are skipped.\n{err}")
        return
    stamp.write_text(GRPCURL_VERSION, encoding="utf-8")
    say(f"grpcurl is {where}")


if __name__ == "__main__":
    main()
