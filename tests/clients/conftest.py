from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.clients.fake_server import FakeServer, running_server
from tests.servers import ServerProcess, paddock_up

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server with a small `ModelManager` in memory."""
    with running_server() as running:
        yield running


@pytest.fixture(scope="session")
def real_server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`paddock up` with real models."""
    with paddock_up(models_dir, tmp_path_factory.mktemp("clients") / "log.jsonl") as running:
        yield running
