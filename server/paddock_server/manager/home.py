"""What a replica's actor sees of the set it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddock.v1 import model_pb2
    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.options import Wish
    from paddock_server.manager.replica_set import ReplicaSet
    from paddock_server.manager.state import ActorState
    from paddock_server.manager.tools import SetTools


class Home:
    """What a replica's actor sees of its set: see `tools.Home`."""

    def __init__(self, replicas: ReplicaSet, tools: SetTools, replica: str, number: int) -> None:
        self._replicas = replicas
        self._tools = tools
        self._replica = replica
        self.number = number

    def show(self) -> None:
        """See `tools.Home`."""
        self._replicas.show()

    def stepped(self, old: ActorState, new: ActorState) -> None:
        """See `tools.Home`."""
        self._replicas.stepped(old, new)

    def completed(self, model: model_pb2.Model, entry: CatalogEntry) -> model_pb2.Model:
        """See `tools.Home`."""
        return self._tools.completed(model, entry)

    def expect(self, wish: Wish) -> None:
        """See `tools.Home`."""
        self._tools.expect(self._replicas.model, wish)

    def remember(self, wish: Wish | None) -> None:
        """See `tools.Home`."""
        self._tools.remember(self._replicas.model, wish)

    def vanished(self) -> None:
        """See `tools.Home`."""
        self._replicas.forget(self._replica)
