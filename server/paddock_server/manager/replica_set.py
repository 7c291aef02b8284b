"""A model as the rest of the manager knows it: one actor for each replica, and what they do together.

What to do is decided in `replicas` (pure); the state of a replica is its actor's alone. With one replica
everything is told to its actor and nothing else happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import structlog

from paddock.errors import PaddockError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.manager import failure as failures
from paddock_server.manager.actor import Acquiring, Actor, EntryFound
from paddock_server.manager.asking import autoload as autoload_of
from paddock_server.manager.home import Home
from paddock_server.manager.messages import (
    AcquireAsked,
    CallerLeft,
    CloseAsked,
    DemandGone,
    FileGone,
    LoadAsked,
    NextLoad,
    SleepAsked,
    TermsSet,
    UnloadAsked,
)
from paddock_server.manager.progress import Subscription, nobody
from paddock_server.manager.replicas import (
    ReplicaView,
    is_about_one,
    is_held_off,
    left_waiting,
    may_try_another,
    merged,
    plan_load,
    replica_id,
    route,
    state_of,
    to_be_checked,
)
from paddock_server.manager.snapshot import public_state
from paddock_server.manager.sources import other_file
from paddock_server.manager.state import AT_REST, NEVER, UNUSED, ActorState, Phase
from paddock_server.supervisor import LogRing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager.lease import Lease
    from paddock_server.manager.messages import Event
    from paddock_server.manager.options import Options, Terms, Wish
    from paddock_server.manager.tools import SetTools

    Response = TypeVar("Response")

log: FilteringBoundLogger = structlog.get_logger()


class ReplicaSet:
    """One model. Every method is to be called in the manager's event loop."""

    def __init__(self, entry: CatalogEntry, tools: SetTools) -> None:
        self.model = entry.id
        self.log_ring = LogRing()
        """What the workers of all replicas wrote."""

        self._tools = tools
        self._actors: dict[str, Actor] = {}
        self._retiring: set[Actor] = set()
        self._seats: dict[Acquiring, Actor] = {}
        self._shown_state: model_pb2.ModelState.ValueType = model_pb2.MODEL_STATE_UNSPECIFIED
        self._last = model_pb2.Model(id=entry.id)
        self._closing: CloseAsked | None = None
        first = self._add(entry)
        self._resize(first.state.defaults.replica_count)
        self.show()

    # What others look at

    @property
    def actors(self) -> Sequence[Actor]:
        """All replicas, those on their way out too."""
        return tuple(self._actors.values())

    @property
    def _staying(self) -> list[Actor]:
        """Those that are not one too many; when the others have vanished with the file, all who are left."""
        staying = [actor for actor in self._actors.values() if actor not in self._retiring]
        return staying or list(self._actors.values())

    @property
    def _first(self) -> Actor:
        return self._staying[0]

    @property
    def entry(self) -> CatalogEntry:
        """The model's entry in the catalog."""
        return self._first.entry

    @property
    def terms(self) -> Terms:
        """The terms on which it stays in memory."""
        return self._first.state.terms

    @property
    def is_gone(self) -> bool:
        """Whether its file has gone."""
        return self._first.state.gone

    @property
    def is_at_rest(self) -> bool:
        """Whether it has no worker and waits for none."""
        return all(actor.state.phase in AT_REST for actor in self._actors.values())

    @property
    def is_unused(self) -> bool:
        """Whether no replica is in memory or on its way there or out."""
        return all(actor.state.phase in UNUSED for actor in self._actors.values())

    @property
    def wish(self) -> Wish:
        """Which options somebody has set for the current or latest load."""
        return self._first.state.wish

    def would_load_anew(self, entry: CatalogEntry, options: Options) -> bool:
        """Whether it is in memory, or on its way there or out, with other files or options than these."""
        differs = other_file(self.entry, entry) or self._first.state.options != options
        return differs and not self.is_unused

    @property
    def serves(self) -> bool:
        """Whether a request would get a lease at once."""
        return any(actor.state.phase is Phase.READY for actor in self._actors.values())

    @property
    def is_given_up(self) -> bool:
        """Whether nothing loads the model again until its file changes."""
        return self._first.state.held_until == NEVER

    @property
    def state(self) -> model_pb2.ModelState.ValueType:
        """The state the world sees."""
        return state_of([public_state(actor.state) for actor in self._actors.values()])

    def snapshot(self) -> model_pb2.Model:
        """Return the model as the world sees it now; once it is gone, as it was last."""
        if not self._actors:
            return self._last
        in_order = sorted(self._actors.values(), key=lambda actor: actor in self._retiring)
        return merged([actor.snapshot() for actor in in_order])

    # What actors tell

    def show(self) -> None:
        """Tell the watchers."""
        before, self._shown_state = self._shown_state, self.state
        self._tools.changes.changed(self.snapshot(), before)

    def stepped(self, old: ActorState, new: ActorState) -> None:
        """Follow a replica: to another number of them, and with the requests that wait where none serves."""
        if old.options.replica_count != new.options.replica_count and new.phase not in AT_REST:
            for added in self._resize(new.options.replica_count):
                load = NextLoad(new.options, explicit=False, wish=new.wish)
                added.tell(LoadAsked(nobody(), new.wish, explicit=False, planned=load))
        if len(self._actors) > 1:
            self._move_requests()

    def forget(self, replica: str) -> None:
        """A replica is gone for good; with the last one, the model is."""
        self._last = self.snapshot()
        self._retiring.discard(self._actors.pop(replica))
        self._tools.ended(replica)
        if self._actors:
            self.show()
        else:
            self.log_ring.close()
            self._tools.vanished(self.model)

    # How many there are

    def _add(self, entry: CatalogEntry) -> Actor:
        ids = [replica_id(self.model, number) for number in range(len(self._actors) + 1)]
        number, replica = next(item for item in enumerate(ids) if item[1] not in self._actors)
        home = Home(self, self._tools, replica, number)
        actor = Actor(entry, self._tools.new_state(entry), self._tools.tools_of(replica), home, self.log_ring)
        self._actors[replica] = actor
        self._tools.started(replica, actor)
        if self._closing is not None:
            actor.tell(self._closing)
        return actor

    def _resize(self, count: int) -> list[Actor]:
        """Add replicas, or have the last ones go once their requests have ended; return the added ones."""
        staying = self._staying
        for actor in staying[count:]:
            self._retiring.add(actor)
            actor.tell(FileGone(reloading=True))
        return [self._add(staying[0].entry) for _ in range(count - len(staying))]

    # Requests

    async def acquire(self, keep_alive_seconds: float, *, autoload: bool) -> Lease:
        """Make sure that a replica is loaded, and take a lease on it, in one step.

        Raises:
            PaddockError: it may not or cannot be loaded, or too many wait for it.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        tried: set[Actor] = set()
        while True:
            caller = Acquiring(loop.create_future(), since, keep_alive_seconds)
            seat = self._seat(caller, tried, autoload=autoload)
            try:
                return await caller.reply
            except PaddockError:
                if self._seats[caller] is seat:  # Else its seat had been given up already.
                    tried.add(seat)
                if not self._may_try_another(tried):
                    raise
            except asyncio.CancelledError:
                self._leave(caller)
                raise
            finally:
                del self._seats[caller]

    def _seat(self, caller: Acquiring, tried: set[Actor], *, autoload: bool) -> Actor:
        """Send a request to a replica, and load more of them when there is demand."""
        actors = self.actors
        chosen = route(self._views(actors), _places(actors, tried))
        actor = actors[chosen.replica]
        self._seats[caller] = actor
        actor.tell(AcquireAsked(caller, autoload))
        if autoload:
            state = actor.state
            serving = NextLoad(state.options, explicit=False, wish=state.wish)
            like = serving if actor.serves else autoload_of(state)
            for place in chosen.load:
                actors[place].tell(LoadAsked(nobody(), like.wish, explicit=False, planned=like))
        return actor

    def _may_try_another(self, tried: set[Actor]) -> bool:
        actors = self.actors
        return may_try_another(self._views(actors), _places(actors, tried))

    def _leave(self, caller: Acquiring) -> None:
        reply = caller.reply
        if reply.done() and not reply.cancelled() and reply.exception() is None:
            reply.result().release()
            return
        seat = self._seats[caller]
        seat.tell(CallerLeft(caller))
        if len(self._seats) == 1 and not self.serves:
            for actor in self.actors:
                if actor is not seat:
                    actor.tell(DemandGone())

    def _move_requests(self) -> None:
        """Have a replica that serves take over the requests of those that cannot."""
        actors = self.actors
        for place in left_waiting(self._views(actors)):
            for caller in actors[place].state.waiters:
                if not isinstance(caller, Acquiring) or self._seats.get(caller) is not actors[place]:
                    continue  # It has been moved already, or has just gone.
                views = self._views(actors)
                if place not in left_waiting(views):
                    break  # The last free slot has been taken.
                target = actors[route(views).replica]
                self._seats[caller] = target
                actors[place].tell(CallerLeft(caller, moved=True))
                target.tell(AcquireAsked(caller, autoload=True))

    def _views(self, actors: Sequence[Actor]) -> list[ReplicaView]:
        if len(actors) == 1:
            return [ReplicaView(actors[0].state.phase)]
        now = asyncio.get_running_loop().time()
        return [
            ReplicaView(
                actor.state.phase,
                actor.serves,
                actor.demand,
                (actor.state.effective or actor.state.options).slot_count,
                is_held_off(actor.state, now),
                len(actor.state.waiters),
                actor in self._retiring,
            )
            for actor in actors
        ]

    # What operators ask for

    def load(self, asked: LoadAsked) -> None:
        """Load all replicas. `asked.caller` is a `Subscription`, and is told when all have ended.

        Those that come up stay when another does not.
        """
        subscription = asked.caller
        if not isinstance(subscription, Subscription):
            message = f"{subscription!r} cannot follow a load"
            raise TypeError(message)
        checked = to_be_checked([actor.state for actor in self._staying], asked)
        if checked is None:
            self._begin(asked, subscription)
        else:
            self._tools.task(self._begin_if_it_fits(asked, subscription, checked), f"check-{self.model}")

    async def _begin_if_it_fits(
        self, asked: LoadAsked, subscription: Subscription, checked: NextLoad
    ) -> None:
        """Begin a load, or refuse what can never fit: then what is loaded serves on, untouched."""
        failure: failures.Failure | None = failures.internal(self.model)
        try:
            failure = await self._tools.never_fits(self.entry, checked, self.terms)
            if not self._actors:
                failure = failures.model_not_found(self.model)
        except asyncio.CancelledError:
            failure = failures.shutting_down()
            raise
        finally:
            if failure is None:
                self._begin(asked, subscription)
            else:
                log.warning("load_refused", model=self.model, reason=failure.reason, failure=failure.message)
                subscription.fail(failure)

    def _begin(self, asked: LoadAsked, subscription: Subscription) -> None:
        states = [actor.state for actor in self._staying]
        if is_about_one(states, asked.wish):
            self._first.tell(asked)
            return
        planned = plan_load(states, asked)
        if isinstance(planned, failures.Failure):
            subscription.fail(planned)
            return
        self._resize(planned.replica_count)
        actors = self._staying
        followers: dict[Actor, Subscription] = {}
        for actor in actors:
            followers[actor] = Subscription()
            actor.tell(replace(asked, caller=followers[actor], planned=planned.begun))
        self._tools.task(self._follow(followers, subscription), f"loads-{self.model}")

    async def _follow(self, followers: Mapping[Actor, Subscription], subscription: Subscription) -> None:
        """Show the caller the load of the first replica, and how those of all have ended."""
        failure: failures.Failure | None = failures.shutting_down()
        response = pb.LoadResponse(loaded=pb.Loaded(already_loaded=True))
        try:
            met: list[failures.Failure] = []
            first = next(iter(followers))
            for actor, follower in followers.items():
                try:
                    while (event := await follower.next()) is not None:
                        if event.HasField("loaded"):
                            _add_loaded(response.loaded, event.loaded)
                        elif actor is first and not subscription.closed:
                            subscription.push(event)
                except PaddockError as error:
                    if actor is first or actor in self._staying:  # Else it is not wanted any more.
                        met.append(failures.failure_of(error))
            failure = met[0] if met else None
        finally:
            if failure is None:
                response.loaded.model.CopyFrom(self.snapshot())
                subscription.finish(response)
            else:
                subscription.fail(failure)

    async def unload(self, request: pb.UnloadRequest, drain_seconds: float) -> pb.UnloadResponse:
        """Unload all replicas; returns when their workers are gone.

        Raises:
            PaddockError: LOAD_ID_MISMATCH.
        """
        actors = self.actors
        load_ids = {actor.state.load_id for actor in actors} - {""}
        alone = len(actors) == 1
        if not alone and request.load_id and load_ids and request.load_id not in load_ids:
            raise failures.load_id_mismatch(self.model, request.load_id, self.snapshot().load_id).error()

        def asked(reply: asyncio.Future[pb.UnloadResponse]) -> UnloadAsked:
            force = request.mode == pb.UNLOAD_MODE_FORCE
            return UnloadAsked(reply, force, drain_seconds, request.load_id if alone else "")

        responses = await _answers(actors, asked)
        if alone:
            return responses[0]
        aborted = sum(response.aborted_request_count for response in responses)
        return pb.UnloadResponse(model=self.snapshot(), aborted_request_count=aborted)

    async def sleep(self) -> pb.SleepResponse:
        """Have all replicas give their memory back; returns when they have.

        Raises:
            PaddockError: MODEL_NOT_LOADED, MODEL_IN_USE.
        """
        actors = self.actors
        leases = sum(actor.state.leases for actor in actors)
        if leases:
            raise failures.model_in_use(self.model, leases).error()
        awake = [actor for actor in actors if actor.state.phase in _MAY_SLEEP] or [self._first]
        responses: list[pb.SleepResponse] = await _answers(awake, SleepAsked)
        if len(actors) == 1:
            return responses[0]
        return pb.SleepResponse(model=self.snapshot())

    async def set_terms(self, terms: Terms) -> None:
        """Change the terms on which the model stays in memory; returns when all replicas have taken note."""
        self.tell(TermsSet(terms))
        await self.caught_up()

    async def caught_up(self) -> None:
        """Wait until all replicas have read what they were told so far."""
        await asyncio.gather(*(actor.caught_up() for actor in self.actors))

    def tell(self, message: Event | EntryFound) -> None:
        """Tell all replicas but those that are on their way out anyway."""
        for actor in self._staying:
            actor.tell(message)

    def close(self, drain_seconds: float) -> None:
        """Have all replicas end, as the server stops. Once more with 0 ends what still runs."""
        self._closing = CloseAsked(drain_seconds)
        for actor in self.actors:
            actor.tell(self._closing)

    async def closed(self) -> None:
        """Wait until no replica has anything left to do."""
        await asyncio.gather(*(actor.closed.wait() for actor in self.actors))


async def _answers(
    actors: Sequence[Actor], asked: Callable[[asyncio.Future[Response]], Event]
) -> list[Response]:
    """Ask all, and wait for every answer.

    Raises:
        PaddockError: the first refusal.
    """
    loop = asyncio.get_running_loop()
    replies: list[asyncio.Future[Response]] = [loop.create_future() for _ in actors]
    for actor, reply in zip(actors, replies, strict=True):
        actor.tell(asked(reply))
    try:
        await asyncio.wait(replies)
    finally:
        for reply in replies:
            reply.cancel()
    refusals = [error for reply in replies if (error := reply.exception()) is not None]
    if refusals:
        raise refusals[0]
    return [reply.result() for reply in replies]


def _places(actors: Sequence[Actor], some: set[Actor]) -> set[int]:
    return {place for place, actor in enumerate(actors) if actor in some}


def _add_loaded(total: pb.Loaded, loaded: pb.Loaded) -> None:
    total.already_loaded &= loaded.already_loaded
    if loaded.load_duration.ToNanoseconds() > total.load_duration.ToNanoseconds():
        total.load_duration.CopyFrom(loaded.load_duration)


_MAY_SLEEP = frozenset({Phase.READY, Phase.SUSPENDING, Phase.SLEEPING})
