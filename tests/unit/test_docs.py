"""What the documentation states as a table is the table of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paddock.errors import TABLE, Reason
from paddock_server.catalog import Catalog
from paddock_server.checking import problems
from paddock_server.config import ServerConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ERRORS_PAGE = DOCS / "errors.md"
EXAMPLE = DOCS / "paddock.example.toml"
TEST_NAME = re.compile(r"`(test_\w+)`")


@pytest.mark.parametrize("reason", list(Reason))
def test_the_page_on_errors_states_the_row_of_the_code(reason: Reason) -> None:
    row = TABLE[reason]
    code = row.openai_code or reason.lower()
    retry = "yes" if row.retryable else "no"
    expected = f"| `{reason}` | {row.code} | {row.http_status} | `{row.openai_type}`, `{code}` | {retry} |"

    assert any(line.startswith(expected) for line in ERRORS_PAGE.read_text().splitlines()), expected


def test_the_example_of_a_configuration_file_is_sound_and_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    config = ServerConfig.load({}, EXAMPLE)
    catalog = Catalog(config.model_directories, config_file=EXAMPLE, hub_cache=config.hub_cache)
    served = catalog.scan()

    assert problems({}, EXAMPLE) == []
    assert not config.autoload_downloads
    assert list(served) == ["foal", "helper"]
    assert served["foal"].setup.load_on_startup
    assert served["helper"].absent is not None
    assert served["helper"].setup.aliases == ("gpt-4o-mini", "poet")
    assert served["helper"].setup.names["poet"].sampling == {"temperature": 1.2, "top_p": 0.95}


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
