from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paddock_server.worker.scheduler import FIRST_CHUNK_TOKENS, PROBE_STEPS, Limits, Plan, Scheduler
from paddock_server.worker.sequence import NO_SLOT, Sequence

LIMITS = Limits(slots=4, cells=1000, batch_tokens=64, queue=2, target_step_milliseconds=50)


def sequences(group: int, prompt: int, *, choices: int = 1) -> list[Sequence]:
    return [
        Sequence(group=group, order=group * 8 + index, tokens=array("i", range(prompt)), prompt_length=prompt)
        for index in range(choices)
    ]


def run_step(scheduler: Scheduler[Sequence], milliseconds: float = 10) -> Plan[Sequence]:
    """Carry out a step: evaluate what is planned and add a token where a prompt or token was completed."""
    plan = scheduler.plan()
    scheduler.commit(plan)
    for work in plan.work:
        if work.sequence.pending == 0:
            work.sequence.tokens.append(0)
    scheduler.observe(plan, milliseconds)
    return plan


def counts(plan: Plan[Sequence]) -> list[tuple[int, int]]:
    return [(work.sequence.group, work.count) for work in plan.work]


def test_a_prompt_takes_the_whole_batch_while_nobody_streams() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 150))
    assert [counts(run_step(scheduler)) for _ in range(4)] == [[(1, 64)], [(1, 64)], [(1, 22)], [(1, 1)]]


def test_streams_come_first_and_the_prompt_keeps_the_step_near_its_target() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 10))
    run_step(scheduler)
    scheduler.submit(sequences(2, 600))
    plan = scheduler.plan()
    for _ in range(20):  # a step costs 2.5 ms per token
        assert counts(plan)[0] == (1, 1)
        scheduler.observe(plan, 2.5 * plan.tokens)
        plan = scheduler.plan()
        if not plan.prompt_tokens:  # a probe
            scheduler.observe(plan, 2.5)
            plan = scheduler.plan()
    assert plan.tokens * 2.5 == pytest.approx(LIMITS.target_step_milliseconds, abs=2.5)


def test_every_eighth_step_beside_streams_goes_without_prompt() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 1))
    run_step(scheduler)
    scheduler.submit(sequences(2, 900))
    prompts = [bool(run_step(scheduler, milliseconds=100).prompt_tokens) for _ in range(17)]
    assert prompts == [True] * 7 + [False] + [True] * 7 + [False] + [True]


def test_beside_many_streams_a_further_prompt_stretches_the_step_by_its_share() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(12, 20_000, 512, 12, 50))
    for group in range(1, 5):
        scheduler.submit(sequences(group, 1))
    run_step(scheduler, milliseconds=2.5)
    run_step(scheduler, milliseconds=2.5)
    for group in range(5, 8):
        scheduler.submit(sequences(group, 900))
    for _ in range(PROBE_STEPS - 2):  # a step costs 2.5 ms per token
        plan = scheduler.plan()
        scheduler.observe(plan, 2.5 * plan.tokens)
    assert scheduler.plan().tokens * 2.5 == pytest.approx(1.5 * LIMITS.target_step_milliseconds, abs=2.5)


def test_twice_the_streams_have_their_step_measured_at_once() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(8, 10_000, 64, 8, 50))
    scheduler.submit(sequences(1, 1))
    run_step(scheduler, milliseconds=100)
    run_step(scheduler, milliseconds=1)
    scheduler.submit(sequences(2, 2))
    run_step(scheduler, milliseconds=100)
    scheduler.submit(sequences(3, 900))
    assert [run_step(scheduler, milliseconds=100).prompt_tokens > 0 for _ in range(2)] == [False, True]


def test_before_anything_was_measured_a_prompt_beside_streams_goes_in_small_chunks() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 1))
    run_step(scheduler)
    scheduler.submit(sequences(2, 60))
    assert counts(scheduler.plan()) == [(1, 1), (2, FIRST_CHUNK_TOKENS)]


def test_where_streams_alone_are_over_the_target_prompts_still_get_as_much_time_as_they() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 1))
    for _ in range(30):
        run_step(scheduler, milliseconds=200)
    scheduler.submit(sequences(2, 600))
    for _ in range(40):  # a step costs 200 ms and 10 more per token
        plan = scheduler.plan()
        scheduler.observe(plan, 200 + 10 * plan.prompt_tokens)
    assert max(scheduler.plan().prompt_tokens for _ in range(2)) == pytest.approx(20, abs=2)


@pytest.mark.parametrize(("prompts", "targets"), [(1, 1), (2, 2), (5, 5), (8, 8), (11, 8)])
def test_beside_one_stream_a_step_may_take_a_target_for_every_prompt_up_to_eight(
    prompts: int, targets: int
) -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(12, 20_000, 512, 12, 50))
    scheduler.submit(sequences(1, 1))
    run_step(scheduler, milliseconds=2.5)
    for group in range(2, 2 + prompts):
        scheduler.submit(sequences(group, 900))
    plan = scheduler.plan()
    for _ in range(PROBE_STEPS - 3):  # a step costs 2.5 ms per token
        scheduler.observe(plan, 2.5 * plan.tokens)
        plan = scheduler.plan()
    assert plan.tokens * 2.5 == pytest.approx(targets * LIMITS.target_step_milliseconds, abs=2.5)


def test_chunks_recover_when_the_machine_has_become_slower() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 1))
    for _ in range(30):
        run_step(scheduler, milliseconds=1)
    scheduler.submit(sequences(2, 900))
    for _ in range(60):  # suddenly a step costs 300 ms and 1 more per token
        plan = scheduler.plan()
        scheduler.observe(plan, 300 + plan.prompt_tokens)
    assert max(scheduler.plan().prompt_tokens for _ in range(2)) > 40


def test_the_queue_is_first_come_first_served() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(1, 1000, 64, 8, 50))
    for group in (3, 1, 2):
        scheduler.submit(sequences(group, 2))
    started: list[int] = []
    while not scheduler.idle:
        plan = run_step(scheduler)
        started += [sequence.group for sequence in plan.started]
        scheduler.remove(scheduler.running[0])
    assert started == [3, 1, 2]


def test_the_queue_holds_its_limit_beyond_free_slots_and_refuses_one_more() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(2, 1000, 64, 3, 50))
    accepted = [scheduler.submit(sequences(group, 5)) for group in range(6)]
    assert accepted == [True] * 5 + [False]
    run_step(scheduler)
    assert scheduler.waiting_requests == 3
    assert not scheduler.submit(sequences(7, 5))
    scheduler.remove(scheduler.running[0])
    assert scheduler.submit(sequences(8, 5))


def test_choices_of_a_started_request_are_not_counted_as_waiting() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(2, 1000, 64, 1, 50))
    scheduler.submit(sequences(1, 5, choices=4))
    run_step(scheduler)
    assert scheduler.waiting_requests == 0
    assert scheduler.submit(sequences(2, 5))
    assert not scheduler.submit(sequences(3, 5))


def test_choices_share_the_prompt_once_the_first_has_evaluated_it() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    group = sequences(1, 100, choices=3)
    scheduler.submit(group)
    first = scheduler.plan()
    assert counts(first) == [(1, 64)]
    assert scheduler.commit(first) == []
    second = scheduler.plan()
    shares = scheduler.commit(second)
    assert [(share.source, share.target, share.count) for share in shares] == [
        (group[0], group[1], 99),
        (group[0], group[2], 99),
    ]
    assert scheduler.used_cells == 100
    assert [(work.sequence, work.count) for work in scheduler.plan().work] == [(group[1], 1), (group[2], 1)]


def test_a_choice_that_gets_its_slot_late_shares_at_once() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(2, 1000, 64, 8, 50))
    group = sequences(1, 10, choices=3)
    scheduler.submit(group)
    for _ in range(3):
        run_step(scheduler)
    scheduler.remove(group[1])
    plan = scheduler.plan()
    assert [(share.source, share.target, share.count) for share in plan.shares] == [(group[0], group[2], 9)]


def test_models_that_cannot_share_evaluate_the_prompt_for_each_choice() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(4, 1000, 64, 8, 50, shares_prompts=False))
    scheduler.submit(sequences(1, 10, choices=2))
    assert counts(run_step(scheduler)) == [(1, 10), (1, 10)]
    assert scheduler.used_cells == 20


def test_when_cells_run_out_the_youngest_is_preempted_and_the_oldest_gets_on() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(4, 100, 64, 8, 50))
    old, young = sequences(1, 30)[0], sequences(2, 30)[0]
    scheduler.submit([old])
    scheduler.submit([young])
    slot = NO_SLOT
    for _ in range(60):
        plan = run_step(scheduler)
        if plan.freed_slots:
            slot = plan.freed_slots[0]
            break
    assert slot == 1
    assert (old.slot, young.slot, young.evaluated) == (0, NO_SLOT, 0)
    assert len(young.tokens) == 51
    length = len(young.tokens)
    scheduler.remove(old)
    assert counts(run_step(scheduler)) == [(2, length)]


def test_a_preempted_sequence_is_let_in_again_before_younger_ones_and_is_not_started_twice() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(2, 100, 64, 8, 50))
    for group in (1, 2, 3):
        scheduler.submit(sequences(group, 20))
    run_step(scheduler)
    scheduler.preempt_youngest()
    scheduler.remove(scheduler.running[0])
    plan = scheduler.plan()
    assert [sequence.group for sequence in scheduler.running] == [2, 3]
    assert [sequence.group for sequence in plan.started] == [3]


def test_a_request_waits_until_its_prompt_has_cells() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(Limits(4, 100, 64, 8, 50))
    scheduler.submit(sequences(1, 60))
    run_step(scheduler)
    scheduler.submit(sequences(2, 50))
    assert counts(run_step(scheduler)) == [(1, 1)]
    scheduler.remove(scheduler.running[0])
    assert counts(run_step(scheduler)) == [(2, 50)]


def test_a_cache_that_holds_less_than_thought_is_planned_with_what_it_holds() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    scheduler.submit(sequences(1, 30))
    scheduler.submit(sequences(2, 30))
    plan = scheduler.plan()
    scheduler.shrink(plan)
    assert scheduler.cells == 59
    assert scheduler.plan().freed_slots == [1]


def test_all_cells_are_planned_with_again_once_the_sequences_that_lacked_some_are_gone() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    old, young, later = (sequences(group, 30)[0] for group in (1, 2, 3))
    scheduler.submit([old])
    scheduler.submit([young])
    scheduler.shrink(scheduler.plan())
    scheduler.plan()
    assert young.slot == NO_SLOT
    scheduler.submit([later])
    scheduler.remove(old)
    scheduler.plan()
    assert scheduler.cells == 59  # the preempted one still counts
    scheduler.remove(young)
    assert scheduler.cells == LIMITS.cells
    scheduler.plan()
    assert scheduler.running == [later]


def test_a_second_shortage_waits_for_those_that_met_it() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    old, young = sequences(1, 30)[0], sequences(2, 30)[0]
    scheduler.submit([old])
    scheduler.submit([young])
    scheduler.shrink(scheduler.plan())
    scheduler.shrink(scheduler.plan())  # only the old one runs
    assert scheduler.cells == 29
    scheduler.remove(old)
    assert scheduler.cells == LIMITS.cells


def test_a_sequence_cancelled_while_it_waits_does_not_keep_the_cells_few() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(LIMITS)
    old, young = sequences(1, 30)[0], sequences(2, 30)[0]
    scheduler.submit([old])
    scheduler.submit([young])
    scheduler.shrink(scheduler.plan())
    scheduler.plan()
    assert scheduler.remove(young) == NO_SLOT
    scheduler.remove(old)
    assert scheduler.cells == LIMITS.cells


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of any size come, go and grow; the rules of the module hold at every step."""

    @initialize(slots=st.integers(1, 5), cells=st.integers(64, 300), shares=st.booleans())
    def start(self, slots: int, cells: int, shares: bool) -> None:
        self.limits = Limits(slots, cells, max(slots, 32), 50, 50, shares)
        self.scheduler: Scheduler[Sequence] = Scheduler(self.limits)
        self.requests: dict[int, list[Sequence]] = {}
        self.cache: dict[int, int] = {}
        self.next_group = 0

    @rule(prompt=st.integers(1, 60), choices=st.integers(1, 3))
    def submit(self, prompt: int, choices: int) -> None:
        self.next_group += 1
        group = sequences(self.next_group, prompt, choices=choices)
        if self.scheduler.submit(group):
            self.requests[self.next_group] = group

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.requests)))
        for sequence in self.requests.pop(group):
            self.forget(self.scheduler.remove(sequence))

    @rule(steps=st.integers(1, 20), milliseconds=st.floats(1, 500))
    def step(self, steps: int, milliseconds: float) -> None:
        for _ in range(steps):
            plan = self.plan()
            oldest = self.scheduler.running[0] if self.scheduler.running else None
            assert bool(plan.work) == (not self.scheduler.idle)
            assert oldest is None or not plan.prompt_tokens or any(w.sequence is oldest for w in plan.work)
            assert plan.tokens <= self.limits.batch_tokens
            for work in plan.work:
                assert self.cache.get(work.sequence.slot, 0) == work.sequence.evaluated
                self.cache[work.sequence.slot] = work.sequence.evaluated + work.count
            for share in self.scheduler.commit(plan):
                assert self.cache[share.source.slot] >= share.count
                self.cache[share.target.slot] = share.count
            self.scheduler.observe(plan, milliseconds)
            self.grow(plan)

    @rule()
    def lack_cells(self) -> None:
        plan = self.plan()
        if len(self.scheduler.running) > 1:  # the engine ends one that is alone
            self.scheduler.shrink(plan)
            assert self.plan().freed_slots

    def plan(self) -> Plan[Sequence]:
        plan = self.scheduler.plan()
        for slot in plan.freed_slots:
            self.forget(slot)
        for share in plan.shares:
            self.cache[share.target.slot] = share.count
        return plan

    def grow(self, plan: Plan[Sequence]) -> None:
        for work in plan.work:
            sequence = work.sequence
            if sequence.pending == 0:
                sequence.tokens.append(0)
                if len(sequence.tokens) >= min(self.limits.cells, sequence.prompt_length + 40):
                    self.forget(self.scheduler.remove(sequence))
                    self.requests[sequence.group].remove(sequence)

    def forget(self, slot: int) -> None:
        if slot != NO_SLOT:
            self.cache.pop(slot, None)

    @invariant()
    def cells_suffice(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.used_cells <= self.limits.cells

    @invariant()
    def few_cells_are_planned_with_no_longer_than_those_they_were_too_few_for(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.cells <= self.limits.cells
            if self.scheduler.idle:
                assert self.scheduler.cells == self.limits.cells

    @invariant()
    def slots_belong_to_one_sequence_each(self) -> None:
        if hasattr(self, "scheduler"):
            slots = [sequence.slot for sequence in self.scheduler.running]
            assert len(set(slots)) == len(slots)
            assert all(0 <= slot < self.limits.slots for slot in slots)
            orders = [sequence.order for sequence in self.scheduler.running]
            assert orders == sorted(orders)

    def teardown(self) -> None:
        """Without new requests everything comes to its end: nothing is starved, nothing hangs."""
        if hasattr(self, "scheduler"):
            for _ in range(20_000):
                if self.scheduler.idle:
                    break
                self.step(1, 10.0)
            assert self.scheduler.idle


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
