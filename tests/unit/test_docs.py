"""What the documentation states as a table is the table of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paddock.errors import TABLE, Reason

ROOT = Path(__file__).parents[2]
ERRORS_PAGE = ROOT / "docs" / "errors.md"
TEST_NAME = re.compile(r"`(test_\w+)`")


@pytest.mark.parametrize("reason", list(Reason))
def test_the_page_on_errors_states_the_row_of_the_code(reason: Reason) -> None:
    row = TABLE[reason]
    code = row.openai_code or reason.lower()
    retry = "yes" if row.retryable else "no"
    expected = f"| `{reason}` | {row.code} | {row.http_status} | `{row.openai_type}`, `{code}` | {retry} |"

    assert any(line.startswith(expected) for line in ERRORS_PAGE.read_text().splitlines()), expected


@pytest.mark.parametrize("page", ["lifecycle.md", "router-semantics.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    # A row may begin with a test of llama-server, whose rule it is about.
    named = set(TEST_NAME.findall(re.sub(r"^\| `test_\w+`", "", text, flags=re.MULTILINE)))

    assert named
    assert named - defined == set()
