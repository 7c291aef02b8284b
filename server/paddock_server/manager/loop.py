"""The manager loop: the one task that decides which models have room. Nothing slow happens in it.

Actors put messages in; the loop enters them in its books (`Residency`), makes a plan and tells the actors.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog

from paddock_server.manager.admission import Admission, Cost
from paddock_server.manager.messages import AdmissionRefused, Admitted, EvictAsked, EvictionRelented
from paddock_server.manager.replicas import shown_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from paddock_server.manager.residency import Look, Order, Residency

log: FilteringBoundLogger = structlog.get_logger()


class Peer(Protocol):
    """What the loop needs of an actor."""

    @property
    def look(self) -> Look:
        """What the actor shows of itself."""
        ...

    def tell(self, message: Admitted | AdmissionRefused | EvictAsked | EvictionRelented) -> None:
        """Put a message into its inbox."""
        ...


@dataclass(frozen=True, slots=True)
class Entered:
    """A model wants room."""

    model: str
    ticket: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Committed:
    """A model is loaded."""

    model: str
    ticket: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Slept:
    """A model's worker has given its memory back."""

    model: str
    ticket: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """A model's worker is being stopped."""

    model: str
    ticket: int


@dataclass(frozen=True, slots=True)
class Left:
    """A model has given up its room, or its place in the queue."""

    model: str
    ticket: int


@dataclass(frozen=True, slots=True)
class Stayed:
    """A model would not be evicted."""

    model: str
    ticket: int


@dataclass(frozen=True, slots=True)
class Looked:
    """Something changed that a plan may depend on."""


@dataclass(frozen=True, slots=True)
class Limited:
    """The limits have become others."""

    admission: Admission


LoopMessage: TypeAlias = Entered | Committed | Slept | Leaving | Left | Stayed | Looked | Limited


class ReplicaLoop:
    """The manager loop as one replica tells it things: under the id of the replica, not of its model."""

    def __init__(self, loop: ManagerLoop, replica: str) -> None:
        self._loop = loop
        self._replica = replica

    def tell(self, message: LoopMessage) -> None:
        """Put a message into the inbox."""
        named = message if isinstance(message, Looked | Limited) else replace(message, model=self._replica)
        self._loop.tell(named)


class ManagerLoop:
    """Owns admission, eviction and the queue for room."""

    def __init__(self, residency: Residency, peer: Callable[[str], Peer | None]) -> None:
        """`peer` finds an actor by model; None when it has vanished."""
        self._residency = residency
        self._peer = peer
        self._inbox: asyncio.Queue[LoopMessage] = asyncio.Queue()
        self._wake_at: float | None = None
        self._told_of_pins: tuple[str, ...] = ()

    def tell(self, message: LoopMessage) -> None:
        """Put a message into the inbox."""
        self._inbox.put_nowait(message)

    async def run(self) -> None:
        """Read the inbox until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._wake_at):
                    self._enter(await self._inbox.get(), loop.time())
            while not self._inbox.empty():
                self._enter(self._inbox.get_nowait(), loop.time())
            orders, self._wake_at = self._residency.decide(self._look, loop.time())
            for order in orders:
                self._give(order)
            self._tell_of_pins()

    def _tell_of_pins(self) -> None:
        """Say once that pinned models hold more than may be held: they stay, and others find no room."""
        models = self._residency.pinned_over_limits
        if models != self._told_of_pins:
            self._told_of_pins = models
            if models:
                log.warning("pinned_models_pass_limits", models=list(models))

    def _enter(self, message: LoopMessage, now: float) -> None:
        books = self._residency
        match message:
            case Entered():
                refusal = books.enter(message.model, message.ticket, message.cost, now)
                if refusal is not None:
                    self._give(refusal)
            case Committed():
                books.commit(message.model, message.ticket, message.resident_bytes)
            case Slept():
                books.asleep(message.model, message.ticket, message.resident_bytes)
            case Leaving():
                books.releasing(message.model, message.ticket)
            case Left():
                books.leave(message.model, message.ticket)
            case Stayed():
                books.refused(message.model, message.ticket)
            case Limited():
                books.limit(message.admission)
            case Looked():
                pass

    def _look(self, model: str) -> Look | None:
        peer = self._peer(model)
        return None if peer is None else peer.look

    def _give(self, order: Order) -> None:
        peer = self._peer(order.model)
        if peer is None:
            return
        match order.message:
            case EvictAsked():
                log.info(
                    "eviction_asked",
                    model=shown_name(order.model),
                    when_drained=order.message.when_drained,
                    waiting=[shown_name(one) for one in self._residency.waiting],
                )
            case EvictionRelented():
                log.info("eviction_relented", model=shown_name(order.model))
            case _:
                pass
        peer.tell(order.message)
