"""Fixtures shared by all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with every model of tests.models that loads. Tests read it and never change it."""
    # Not everybody who runs tests wants numpy and gguf imported.
    from tests.models import make_all

    folder = tmp_path_factory.mktemp("models")
    make_all(folder)
    return folder
