from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.fake_server import FakeServer, running_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server with a small `ModelManager` in memory."""
    with running_server() as running:
        yield running
