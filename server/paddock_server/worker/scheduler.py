"""Which tokens of which sequences go into the next batch. Pure: no clock, no I/O, no llama.cpp.

Rules:

1. A running sequence claims as many cells of the KV cache as it has tokens; sequences of one group claim the
   prompt they share once. The claims of all running sequences never exceed the cells, so a planned batch
   always fits.
2. When output has grown past the cells, the youngest sequence is preempted: it loses its cells, goes back to
   the head of the queue and is computed again later. The oldest one therefore always gets on. Where the cache
   turns out to hold less than was thought, fewer cells are planned with until the sequences of then are gone.
3. The queue is first come, first served, and bounded in requests.
4. Every sequence with one token to evaluate gets it into the batch. Prompts fill the rest: all of it when
   nobody streams, otherwise as many tokens as keep the step near its target, by the measured time per token.
   Every further prompt stretches the target by its share of the streams: a long step that delays few and
   helps many is worth it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from paddock_server.worker.sequence import NO_SLOT, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

S = TypeVar("S", bound=Sequence)

FIRST_CHUNK_TOKENS: Final = 32
"""Prompt tokens in a step beside streams before any step with prompt tokens was measured."""

HEADROOM_TOKENS: Final = 16
"""Cells per running sequence left free when another one is let in, lest it be preempted at once."""

LONGEST_STEP: Final = 2.0
"""A step with prompt tokens may take this many times a step without, when that is over the target."""

LONGEST_STRETCH: Final = 8.0
"""A step may take this many targets when many prompts wait. Bounds the pause of a single stream on whose
model many requests descend."""

PROBE_STEPS: Final = 8
"""While prompts come in beside streams, one step in this many goes without, to see what streams take.

Else that figure would grow stale during a long prompt, and with it the chunks wrong: small for ever on a
machine that has become slower, too large on one that has become faster. Twice the streams are reason enough
to look again at once.
"""

_SMOOTHING: Final = 0.4


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine has to give."""

    slots: int
    cells: int
    batch_tokens: int
    """Most tokens of one step; at least `slots`."""

    queue: int
    """Requests that may wait for a slot."""

    target_step_milliseconds: float
    shares_prompts: bool = True
    """Whether sequences can share cells; recurrent models cannot."""


@dataclass(frozen=True, slots=True)
class Work(Generic[S]):
    """Evaluate the next `count` tokens of a sequence."""

    sequence: S
    count: int


@dataclass(frozen=True, slots=True)
class Share(Generic[S]):
    """Let `target` begin with the first `count` tokens of `source`, in the same cells."""

    source: S
    target: S
    count: int


@dataclass(slots=True)
class Plan(Generic[S]):
    """One step. To be carried out in the order of the fields."""

    freed_slots: list[int] = field(default_factory=list[int])
    """Slots whose cells are to be dropped: their sequences were preempted."""

    started: list[S] = field(default_factory=list)
    """Sequences that have a slot for the first time."""

    shares: list[Share[S]] = field(default_factory=list)
    work: list[Work[S]] = field(default_factory=list)
    """Rows of the batch, in order."""

    prompt_tokens: int = 0
    """Tokens of `work` beyond one per sequence that streams."""

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return sum(work.count for work in self.work)


class Scheduler(Generic[S]):
    """Owns the queue, the slots and the account of cells. Used from one thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.preemption_count = 0
        self._cells = limits.cells
        self._shrunk_beside: list[S] = []
        self._queue: deque[S] = deque()
        self._running: list[S] = []  # by age
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._milliseconds_per_token = 0.0
        self._milliseconds_without_prompt = 0.0
        self._streams_without_prompt = 0
        self._steps_to_probe = PROBE_STEPS

    @property
    def running(self) -> list[S]:
        """Sequences that have a slot, oldest first."""
        return self._running

    @property
    def cells(self) -> int:
        """Cells planned with: those of the limits, or fewer for a while after `shrink`."""
        return self._cells

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._queue

    @property
    def waiting_requests(self) -> int:
        """Requests that never had a slot."""
        started = {sequence.group for sequence in self._running}
        groups = {sequence.group for sequence in self._queue if not sequence.started}
        return len(groups - started)

    @property
    def used_cells(self) -> int:
        """Cells that hold state, those shared counted once."""
        shared: dict[int, int] = {}
        used = 0
        for sequence in self._running:
            common = min(sequence.evaluated, self._shareable(sequence))
            used += sequence.evaluated - common
            shared[sequence.group] = max(shared.get(sequence.group, 0), common)
        return used + sum(shared.values())

    def submit(self, sequences: Iterable[S]) -> bool:
        """Queue the sequences of one request; False when the queue is full, and nothing was queued."""
        if self.waiting_requests >= self.limits.queue + len(self._free_slots):
            return False
        self._queue.extend(sequences)
        return True

    def remove(self, sequence: S) -> int:
        """Take a sequence out, wherever it is; returns the slot to drop, or `NO_SLOT`."""
        if sequence in self._shrunk_beside:
            self._shrunk_beside.remove(sequence)
            if not self._shrunk_beside:
                self._cells = self.limits.cells
        if sequence.slot == NO_SLOT:
            if sequence in self._queue:
                self._queue.remove(sequence)
            return NO_SLOT
        return self._release(sequence)

    def plan(self) -> Plan[S]:
        """Decide the next step; changes who has a slot, and nothing else."""
        plan: Plan[S] = Plan()
        while len(self._running) > 1 and self._claims() > self._cells:
            plan.freed_slots.append(self.preempt_youngest())
        self._admit(plan)
        self._fill(plan)
        return plan

    def preempt_youngest(self) -> int:
        """Put the youngest running sequence back at the head of the queue; returns the slot to drop."""
        youngest = self._running[-1]
        slot = self._release(youngest)
        youngest.evaluated = 0
        self._queue.appendleft(youngest)
        self.preemption_count += 1
        return slot

    def commit(self, plan: Plan[S]) -> list[Share[S]]:
        """Count the plan's tokens as evaluated; returns prompts to share with others at once."""
        for work in plan.work:
            work.sequence.evaluated += work.count
        shares: list[Share[S]] = []
        for sequence in self._running:
            if sequence.evaluated == 0:
                self._share(sequence, shares)
        return shares

    def shrink(self, plan: Plan[S]) -> None:
        """Learn that the cache had no room for a plan: what it really holds is less than was thought.

        What was missing depends on what is running now, so all cells are planned with again once every one
        of these sequences has been removed; one that was preempted meanwhile still counts.
        """
        self._cells = min(self._cells, self.used_cells + plan.tokens) - 1
        self._shrunk_beside = list(self._running)

    def observe(self, plan: Plan[S], milliseconds: float) -> None:
        """Learn from how long a step took."""
        if plan.prompt_tokens:
            self._milliseconds_per_token = _smooth(self._milliseconds_per_token, milliseconds / plan.tokens)
        elif plan.work:
            old = self._milliseconds_without_prompt
            if len(plan.work) >= 2 * self._streams_without_prompt:
                old = 0.0  # of another time
            self._milliseconds_without_prompt = _smooth(old, milliseconds)
            self._streams_without_prompt = len(plan.work)

    def _release(self, sequence: S) -> int:
        slot = sequence.slot
        sequence.slot = NO_SLOT
        self._running.remove(sequence)
        self._free_slots.append(slot)
        self._free_slots.sort(reverse=True)
        return slot

    def _shareable(self, sequence: S) -> int:
        """Tokens a group shares: the prompt without its last one, whose logits each sequence needs."""
        return sequence.prompt_length - 1 if self.limits.shares_prompts else 0

    def _claims(self, joining: S | None = None) -> int:
        sequences = self._running if joining is None else [*self._running, joining]
        shared = {sequence.group: self._shareable(sequence) for sequence in sequences}
        own = sum(len(sequence.tokens) - self._shareable(sequence) for sequence in sequences)
        return own + sum(shared.values())

    def _admit(self, plan: Plan[S]) -> None:
        while self._queue and self._free_slots:
            first = self._queue[0]
            headroom = HEADROOM_TOKENS * (len(self._running) + 1)
            if self._running and self._claims(first) + headroom > self._cells:
                return
            self._queue.popleft()
            first.slot = self._free_slots.pop()
            if not first.started:
                first.started = True
                plan.started.append(first)
            insort(self._running, first, key=_age)
            self._share(first, plan.shares)

    def _share(self, sequence: S, shares: list[Share[S]]) -> None:
        """Let a sequence without cells begin with those of a sibling, if one has the whole prompt."""
        count = self._shareable(sequence)
        for sibling in self._running:
            if sibling.group == sequence.group and sibling is not sequence and sibling.evaluated >= count > 0:
                shares.append(Share(sibling, sequence, count))
                sequence.evaluated = count
                return

    def _waits_for_sibling(self, sequence: S) -> bool:
        """Whether an older sibling is evaluating the prompt that this one will share."""
        return (
            sequence.evaluated == 0
            and self._shareable(sequence) > 0
            and any(
                sibling.group == sequence.group and sibling.order < sequence.order
                for sibling in self._running
            )
        )

    def _fill(self, plan: Plan[S]) -> None:
        prompts: list[S] = []
        streams = 0
        for sequence in self._running:
            if sequence.pending == 1:
                plan.work.append(Work(sequence, 1))
                streams += sequence.generated > 0
            elif not self._waits_for_sibling(sequence):
                prompts.append(sequence)
        if not prompts:
            return
        room = self.limits.batch_tokens - len(plan.work)
        if streams:
            self._steps_to_probe -= 1
            if self._steps_to_probe <= 0 or streams >= 2 * self._streams_without_prompt > 0:
                self._steps_to_probe = PROBE_STEPS
                return
            room = min(room, self._prompt_budget(len(plan.work), 1 + (len(prompts) - 1) / streams))
        for sequence in prompts:
            count = min(room, sequence.pending)
            if count <= 0:
                return
            plan.work.append(Work(sequence, count))
            plan.prompt_tokens += count
            room -= count

    def _prompt_budget(self, others: int, stretch: float) -> int:
        """Prompt tokens that keep the step near `stretch` targets beside `others`; at least one."""
        if not self._milliseconds_per_token:
            return FIRST_CHUNK_TOKENS
        goal = max(self.limits.target_step_milliseconds, LONGEST_STEP * self._milliseconds_without_prompt)
        goal *= min(stretch, LONGEST_STRETCH)
        return max(1, int(goal / self._milliseconds_per_token) - others)


def _age(sequence: Sequence) -> int:
    return sequence.order


def _smooth(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old) if old else new
