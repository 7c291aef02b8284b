"""Which form log lines take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import structlog
from paddock_server.logs import configure_logging

configure_logging("info", "auto")
structlog.get_logger().info("something_happened", model="m")
"""


def test_auto_is_json_when_standard_error_is_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, check=True, timeout=30)

    line = json.loads(done.stderr)
    assert (line["event"], line["model"], line["level"]) == ("something_happened", "m", "info")


def test_auto_is_for_people_when_standard_error_is_a_terminal() -> None:
    reading, terminal = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=terminal, check=True, timeout=30)
        # The line is in the terminal's buffer; with both ends open, one read takes it and does not wait.
        text = os.read(reading, 65536).decode()
    finally:
        os.close(terminal)
        os.close(reading)

    assert "something_happened" in text
    assert not text.lstrip().startswith("{")


SIZES = """
import sys
from paddock_server.logs import configure_logging
import structlog

configure_logging("info", sys.argv[1])
structlog.get_logger().info("memory_budget", RAM=21703130726)
structlog.get_logger().info("other", free_bytes=2048, count=21703130726)
"""


@pytest.mark.parametrize(
    ("log_format", "texts"),
    [
        ("console", ["RAM=20.2 GiB", "free_bytes=2.0 KiB", "count=21703130726"]),
        ("json", ['"RAM": 21703130726', '"free_bytes": 2048']),
    ],
)
def test_sizes_are_for_people_in_a_terminal_and_bytes_for_programs(log_format: str, texts: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIZES, log_format], capture_output=True, text=True, check=True, timeout=30
    )

    said = done.stderr.replace("'", "")
    assert [text for text in texts if text not in said] == []


SECRET = """
import sys
{configure}
import structlog, logging

def fail(prompt):
    answer = "secret " + prompt
    raise RuntimeError("it failed")

for log in (structlog.get_logger(), logging.getLogger("other")):
    try:
        fail("-".join(["three", "blind", "mice"]))
    except RuntimeError:
        log.exception("something_failed")
"""
CONFIGURE = "from paddock_server.logs import configure_logging; configure_logging('info', sys.argv[1])"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_logged_exception_shows_no_local_variable(log_format: str) -> None:
    """A newcomer saw prompts and generated tokens in his terminal."""
    code = SECRET.format(configure=CONFIGURE)
    done = subprocess.run(
        [sys.executable, "-c", code, log_format], capture_output=True, text=True, check=True, timeout=30
    )

    assert done.stderr.count("RuntimeError: it failed") == 2
    assert "three-blind-mice" not in done.stderr + done.stdout


FULL = """
import resource, sys
from paddock_server.logs import configure_logging
import structlog, logging

configure_logging("info", sys.argv[1])
log = structlog.get_logger()
log.info("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for _ in range(200):
    log.info("into nothing", text="x" * 100)
    logging.getLogger("other").warning("into nothing")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("after")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_log_that_cannot_be_written_costs_lines_and_says_so_and_nothing_else(
    tmp_path: Path, log_format: str
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        subprocess.run([sys.executable, "-c", FULL, log_format], stderr=output, check=True, timeout=30)

    lines = log.read_text().splitlines()
    assert "before" in lines[0]
    assert "after" in lines[-1]
    assert any("log_lines_lost" in line and "400" in line for line in lines)
    if log_format == "json":
        assert all(json.loads(line) for line in lines)
