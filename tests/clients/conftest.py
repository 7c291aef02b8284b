from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.fake_server import FakeServer, running_server
from tests.clients.invoke import Paddock, paddock_on


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server with a small `ModelManager` in memory."""
    with running_server() as running:
        yield running


@pytest.fixture
def paddock(server: FakeServer) -> Paddock:
    """The command line, on that server."""
    return paddock_on(server.target)
