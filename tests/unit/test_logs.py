"""Which form log lines take."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
