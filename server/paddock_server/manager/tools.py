"""What actors, and the sets of a model's replicas, work with and belong to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogEntry
from paddock_server.manager.actor import Actor
from paddock_server.manager.admission import Admission
from paddock_server.manager.config import ManagerConfig
from paddock_server.manager.events import ChangeLog
from paddock_server.manager.failure import Failure
from paddock_server.manager.messages import NextLoad
from paddock_server.manager.options import Terms, Wish
from paddock_server.manager.prediction import Predictor
from paddock_server.manager.residency import Holding
from paddock_server.manager.run import WorkerLauncher
from paddock_server.manager.state import ActorState, Limits

if TYPE_CHECKING:
    from paddock_server.manager.loop import LoopMessage


class Home(Protocol):
    """What an actor belongs to: one model, of which it is one replica."""

    number: int
    """Number of the replica, from 0."""

    def show(self) -> None:
        """Tell the watchers: what they see of the replica has changed."""
        ...

    def completed(self, model: model_pb2.Model, entry: CatalogEntry) -> model_pb2.Model:
        """Add to a model as it is shown what is known of a download of it."""
        ...

    def stepped(self, old: ActorState, new: ActorState) -> None:
        """Learn of a step, once it has been carried out."""
        ...

    def expect(self, wish: Wish) -> None:
        """Keep over a restart that an operator's load is on its way."""
        ...

    def remember(self, wish: Wish | None) -> None:
        """Keep an operator's load over a restart, or forget it."""
        ...

    def vanished(self) -> None:
        """Learn that the replica is gone for good."""
        ...


class Loop(Protocol):
    """What an actor needs of the manager loop."""

    def tell(self, message: LoopMessage) -> None:
        """Put a message into its inbox."""
        ...


@dataclass(slots=True)
class Rules:
    """What loads go by. Shared by all actors; written by the manager, when settings change."""

    config: ManagerConfig
    limits: Limits
    admission: Admission


def limits_of(config: ManagerConfig) -> Limits:
    """Return what of the settings the transitions of a model go by."""
    return Limits(
        waiters_max=config.queue_limit,
        drain_seconds=config.drain_seconds,
        admission_timeout_seconds=config.admission_timeout_seconds,
        restart=config.restart,
        load_restart=config.load_restart,
    )


@dataclass(frozen=True, slots=True)
class Tools:
    """What an actor works with."""

    launcher: WorkerLauncher
    rules: Rules
    predictor: Predictor
    loop: Loop
    held: Callable[[], Holding | None]
    """What it holds of the memory, by the books of the manager loop."""


@dataclass(frozen=True, slots=True)
class SetTools:
    """What a set works with. Shared by all of them."""

    tools_of: Callable[[str], Tools]
    """Makes the tools of a replica's actor, by the id of the replica."""

    changes: ChangeLog
    new_state: Callable[[CatalogEntry], ActorState]
    """Makes the state of a new replica."""

    started: Callable[[str, Actor], None]
    """Runs a new actor, under the id of its replica."""

    ended: Callable[[str], None]
    """Called when a replica is gone for good."""

    vanished: Callable[[str], None]
    """Called when a model is gone for good, all replicas of it."""

    expect: Callable[[str, Wish], None]
    """Keeps over a restart that an operator's load is on its way."""

    remember: Callable[[str, Wish | None], None]
    """Keeps an operator's load over a restart, or forgets it."""

    never_fits: Callable[[CatalogEntry, NextLoad, Terms], Awaitable[Failure | None]]
    """Returns why a load does not fit even when nothing else is loaded."""

    completed: Callable[[model_pb2.Model, CatalogEntry], model_pb2.Model]
    """Adds to a model as it is shown what is known of a download of it."""

    task: Callable[[Coroutine[Any, Any, None], str], object]
    """Runs something to its end beside the caller."""
