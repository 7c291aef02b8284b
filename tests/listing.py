"""What a manager lists, for tests that ask it directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddock.v1 import model_pb2
    from paddock_server.manager import ModelManager


def models_of(manager: ModelManager) -> list[model_pb2.Model]:
    """Return the models that List shows, ordered by id."""
    listing = manager.listing()
    return [listing.model_of(model) for model in listing.ids]
