"""Whatever happens in whatever order, the rules of DESIGN.md section 3 hold. `World` checks them."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paddock.errors import Reason
from paddock_server.manager import messages as m
from paddock_server.manager.admission import Footprint, device_bytes
from paddock_server.manager.options import Wish
from paddock_server.manager.replicas import replica_id
from paddock_server.manager.state import Phase
from paddock_server.memory import RAM
from tests.unit.manager_world import DEFAULTS, NO_WISH, Worker, World

NAMES = ("a", "b", "c", replica_id("a", 1))
SIZES = (2, 4, 5, 2)
names = st.sampled_from(NAMES)
wishes = st.sampled_from(
    [
        NO_WISH,
        Wish({"slot_count": 8}),
        Wish({"slot_count": 4}),
        Wish({}, {"idle_timeout_seconds": 5.0}),
        Wish({}, {"sleep_timeout_seconds": 3.0}),
    ]
)
reasons = st.sampled_from([Reason.WORKER_CRASHED, Reason.MODEL_CORRUPT, Reason.LOAD_STALLED])
choice = st.integers(0, 1000)


class ManagerMachine(RuleBasedStateMachine):
    """Callers, workers, the clock and the deliveries are all at the mercy of the search."""

    world: World
    closing = False

    @initialize(
        models_max=st.sampled_from([1, 1, 2, 0]),
        waiting_max=st.sampled_from([8, 1]),
        budget=st.sampled_from([0, 5, 8, 8, 12]),
    )
    def begin(self, models_max: int, waiting_max: int, budget: int) -> None:
        self.world = World(NAMES, models_max, waiting_max, SIZES, budget)

    def _known(self, name: str) -> bool:
        return name in self.world.models

    @rule(
        name=names, wish=wishes, conflict=st.sampled_from(m.Conflict), timeout=st.sampled_from([None, 20.0])
    )
    def load(self, name: str, wish: Wish, conflict: m.Conflict, timeout: float | None) -> None:
        if self._known(name):
            self.world.load(name, wish, conflict, timeout)

    @rule(name=names, autoload=st.sampled_from([True, True, True, False]))
    def acquire(self, name: str, autoload: bool) -> None:
        if self._known(name):
            self.world.acquire(name, autoload=autoload)

    @rule()
    def dust_settles(self) -> None:
        self.world.calm()
        self.world.assert_within_limits()

    @rule(models_max=st.sampled_from([1, 2, 3, 0]), budget=st.sampled_from([0, 4, 5, 8, 12]))
    def a_reload_changes_the_limits(self, models_max: int, budget: int) -> None:
        self.world.limit(models_max, budget)

    @rule(name=names, group=st.sampled_from(["g", "g", ""]))
    def a_reload_changes_the_group(self, name: str, group: str) -> None:
        self.world.group(name, group)

    @rule(names=st.tuples(names, names))
    def one_is_used_while_another_is_wanted(self, names: tuple[str, str]) -> None:
        """The commonest race of all, found too seldom by chance."""
        used, wanted = names
        self.world.calm()
        if self._known(used) and self._known(wanted):
            self.world.acquire(wanted)
            while self._known(wanted) and self.world.models[wanted].inbox:
                self.world.deliver(wanted)
            if self._known(used):
                self.world.acquire(used)
            while self.world.loop_inbox:
                self.world.deliver_to_loop()

    @rule(name=names, force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        if self._known(name):
            self.world.unload(name, force=force)

    @rule(name=names)
    def sleep(self, name: str) -> None:
        if self._known(name):
            self.world.sleep(name)

    @rule(name=names, pinned=st.sampled_from([True, False, False]))
    def pin(self, name: str, pinned: bool) -> None:
        if self._known(name):
            self.world.pin(name, pinned=pinned)

    @rule(name=names, more=st.sampled_from([0, 0, 3]))
    def loads_of_it_take_more_than_predicted(self, name: str, more: int) -> None:
        if self._known(name):
            self.world.models[name].taken = self.world.models[name].size + more

    @rule(name=names, pick=choice)
    def caller_leaves(self, name: str, pick: int) -> None:
        if self._known(name) and self.world.models[name].arrived:
            arrived = self.world.models[name].arrived
            caller = arrived[pick % len(arrived)]
            if caller in self.world.pending:
                self.world.abandon(name, caller)

    @rule(name=names)
    def nobody_waits_for_the_other_replicas_either(self, name: str) -> None:
        if self._known(name):
            self.world.tell(name, m.DemandGone())

    @rule(name=names, pick=choice)
    def lease_is_returned(self, name: str, pick: int) -> None:
        if self._known(name) and self.world.models[name].holders:
            holders = list(self.world.models[name].holders)
            self.world.give_back(name, holders[pick % len(holders)])

    @rule(name=names)
    def worker_gets_on(self, name: str) -> None:
        if not self._known(name):
            return
        for number, at in list(self.world.models[name].workers.items()):
            if at is Worker.STARTING:
                self.world.worker_ready(name, number)
            elif at in {Worker.STOPPING, Worker.ENDING}:
                self.world.worker_fails(name, number, "")
            elif at is Worker.SUSPENDING:
                self.world.worker_sleeps(name, number)

    @rule(name=names, reason=reasons)
    def worker_fails(self, name: str, reason: str) -> None:
        if self._known(name):
            for number in list(self.world.models[name].workers):
                self.world.worker_fails(name, number, reason)

    @rule(name=names, count=st.integers(1, 4))
    def actor_reads(self, name: str, count: int) -> None:
        for _ in range(count):
            if self._known(name) and self.world.models[name].inbox:
                self.world.deliver(name)

    @rule(count=st.integers(1, 4))
    def loop_reads(self, count: int) -> None:
        for _ in range(count):
            if self.world.loop_inbox:
                self.world.deliver_to_loop()

    @rule(seconds=st.sampled_from([0.0, 0.5, 6.0, 11.0, 11.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(name=names)
    def file_goes_or_comes(self, name: str) -> None:
        if not self._known(name):
            self.world.add(name)
        elif self.world.models[name].state.gone:
            self.world.tell(name, m.FileFound(DEFAULTS, None))
        else:
            self.world.tell(name, m.FileGone())

    @rule(
        name=names, slot_count=st.sampled_from([4, 8]), idle=st.sampled_from([0.0, 5.0]), other=st.booleans()
    )
    def configuration_is_reloaded(self, name: str, slot_count: int, idle: float, other: bool) -> None:
        if self._known(name):
            defaults = replace(DEFAULTS, slot_count=slot_count, idle_timeout_seconds=idle)
            self.world.tell(name, m.FileFound(defaults, None, reloading=True, other_file=other))

    @rule(name=names)
    def a_reload_does_not_find_the_model(self, name: str) -> None:
        if self._known(name):
            self.world.tell(name, m.FileGone(reloading=True))

    @precondition(lambda self: not self.closing)
    @rule(seldom=st.integers(0, 9))
    def server_stops(self, seldom: int) -> None:
        if seldom == 0:
            self.closing = True
            for name in self.world.models:
                self.world.tell(name, m.CloseAsked(30.0))

    @invariant()
    def reservations_never_pass_the_limits(self) -> None:
        world = self.world
        if world.shrunk:
            return  # Who was there before is in nobody's hands; `World` sees to who is let in.
        costs = {model: held.cost for model, held in world.residency.held.items()}
        awake = [cost for cost in costs.values() if isinstance(cost, Footprint) and cost.places]
        assert not world.models_max or len(awake) <= world.models_max
        # What took more than it was to take is in nobody's hands; the rest must leave that much less.
        predicted = sum(min(device_bytes(cost)[RAM], world.sizes[model]) for model, cost in costs.items())
        assert not world.budget or predicted <= world.budget

    @invariant()
    def a_worker_has_a_reservation(self) -> None:
        for name, model in self.world.models.items():
            if model.workers:
                assert name in self.world.residency.held

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.settle()
        assert not world.pending, "everyone is answered in the end"
        for model in world.models.values():
            assert not model.view
            assert not model.arrived
            assert model.state.phase in {Phase.UNLOADED, Phase.FAILED, Phase.READY, Phase.SLEEPING}
            if self.closing and model.state.closing:
                assert model.closed
                assert not model.workers
        assert not world.residency.waiting
        world.assert_within_limits()


EXAMPLES = int(os.environ.get("PADDOCK_MACHINE_EXAMPLES", "200"))
"""Of 50 steps each at most, 10,000 together. `make machine` runs a hundred times as many."""

ManagerMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestManagerMachine = ManagerMachine.TestCase
