"""Installs the tools that tests use and no Python package holds, where their toolchain is on the machine."""

from __future__ import annotations

import shutil

from steps import CACHE, StepError, run, say

GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl"
GRPCURL_VERSION = "v1.9.4"


def main() -> None:
    folder = CACHE / "bin"
    stamp = folder / ".grpcurl"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == GRPCURL_VERSION:
        return
    if shutil.which("grpcurl"):
        return
    if not shutil.which("go"):
        say("Go is not installed: the tests of the Go client and of grpcurl are skipped")
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


if __name__ == "__main__":
    main()
