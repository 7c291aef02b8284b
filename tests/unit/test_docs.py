"""What the documentation states as a table is the table of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddock.errors import TABLE, Reason

ERRORS_PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.mark.parametrize("reason", list(Reason))
def test_the_page_on_errors_states_the_row_of_the_code(reason: Reason) -> None:
    row = TABLE[reason]
    code = row.openai_code or reason.lower()
    retry = "yes" if row.retryable else "no"
    expected = f"| `{reason}` | {row.code} | {row.http_status} | `{row.openai_type}`, `{code}` | {retry} |"

    assert any(line.startswith(expected) for line in ERRORS_PAGE.read_text().splitlines()), expected
