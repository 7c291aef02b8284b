"""The engine: `schedule -> decode -> sample -> publish`, in that order, in one thread.

`Engine.run` is that thread. Whoever wants the loop with nothing around it (a benchmark, a test) drives it
itself:

    with load_model(Load(model_path=path), log=NativeLog()) as loaded:  # loading.py
        preparer = Preparer(loaded)                                   # requests.py
        engine = Engine(loaded, send=print)
        engine.submit(preparer.generation(1, request))
        while not engine.idle:
            engine.step()

What a step makes leaves in one `WorkerFrame`, of many sequences in several, of short steps together
(news.py), through `send`. Commands come from other threads through `post` and take effect between two steps.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

from paddock.v1 import generation_pb2
from paddock_server.worker import llama
from paddock_server.worker.embed import Embedder, EmbedJob
from paddock_server.worker.errors import Reason, WorkerError, context_length_exceeded
from paddock_server.worker.generation import MOST_CHOICES, Choice, Generation, PreparedGeneration
from paddock_server.worker.logprobs import token_logprob
from paddock_server.worker.news import LONGEST_GAP_SECONDS, News
from paddock_server.worker.scheduler import Limits, Plan, Scheduler, Share
from paddock_server.worker.sequence import NO_SLOT
from paddock_server.worker.stopwatch import Stopwatch
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from paddock_server.worker.loading import LoadedModel

SEQUENCES_PER_FRAME: Final = 16
"""Sequences whose tokens leave together. A larger step, unless its tokens wait for the next, sends several
frames, so that the server hands on the first ones while the others are still sampled: one core samples, the
others are idle then (ADR 0010)."""

_STATS_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class CancelCommand:
    """Stop a generation. An unknown number is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class CancelCallCommand:
    """Drop an embedding job, between two of its batches if it is being computed. An unknown number is
    ignored."""

    call: int


@dataclass(frozen=True, slots=True)
class SleepCommand:
    """Have `Engine.run` return."""


Command = PreparedGeneration | CancelCommand | EmbedJob | CancelCallCommand | SleepCommand


@dataclass(frozen=True, slots=True)
class Stats:
    """What the engine is doing, as of at most half a second ago."""

    active_sequences: int = 0
    queued_requests: int = 0
    used_cells: int = 0
    steps: int = 0
    preemptions: int = 0


class Engine:
    """Continuous batching of generations over one context."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        send: Callable[[worker_pb2.WorkerFrame], None],
        cells: int | None = None,
        longest_gap_seconds: float = LONGEST_GAP_SECONDS,
    ) -> None:
        """Make an engine; it computes nothing before `step` or `run`.

        Args:
            loaded: The model. The engine is the only user of its contexts.
            send: Takes the news of each step and the answers to embedding jobs, in the engine's thread.
            cells: Cells of the KV cache to plan with, for tests; what the context has by default.
            longest_gap_seconds: How long tokens may wait for those of the next step (news.py).
        """
        self._loaded = loaded
        self._vocab = loaded.model.vocab
        self._send = send
        self._scheduler: Scheduler[Choice] = Scheduler(
            Limits(
                slots=loaded.slot_count,
                cells=loaded.context_size if cells is None else cells,
                batch_tokens=loaded.batch_size,
                queue=loaded.queue_limit,
                target_step_milliseconds=loaded.target_step_milliseconds,
                shares_prompts=_can_share_prompts(loaded),
            )
        )
        self._batch = llama.Batch(loaded.batch_size)
        self._rows: list[int] = []
        self._generations: dict[int, Generation] = {}
        self._next_order = 0
        self._embedder = Embedder(loaded)
        self._embed_jobs: deque[EmbedJob] = deque()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._news = News(send, longest_gap_seconds=longest_gap_seconds)
        self._flight_lock = threading.Lock()
        self._in_flight: set[int] = set()
        self._step_watch = Stopwatch()
        self._step_seconds = 0.0
        self._put_to_sleep = False
        self._steps = 0
        self._stats = Stats()
        self._stats_at = 0.0

    # Any thread.

    def post(self, command: Command) -> None:
        """Hand the engine something to do before its next step. It owns a request once posted."""
        self._inbox.put(command)

    def cancel(self, number: int) -> None:
        """Stop a generation before the next step; stop the step too when nobody else is in its batch."""
        self._inbox.put(CancelCommand(number))
        with self._flight_lock:
            if number in self._in_flight:
                self._in_flight.discard(number)
                if not self._in_flight:
                    self._loaded.generation_context.abort_flag.set()

    @property
    def stats(self) -> Stats:
        """What the engine is doing."""
        return self._stats

    @property
    def step_milliseconds(self) -> int:
        """How long the step in progress has been running; 0 between steps."""
        return self._step_watch.milliseconds

    # The engine's thread.

    def run(self) -> None:
        """Serve until a `SleepCommand`."""
        while not self._put_to_sleep:
            self._take_commands(wait=self.idle)
            self.step()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do but wait for a command."""
        return self._scheduler.idle and not self._embed_jobs and self._news.empty

    def submit(self, request: PreparedGeneration) -> None:
        """Queue a generation, or say that the queue is full."""
        generation = Generation(request, self._next_order)
        self._next_order += MOST_CHOICES
        if self._scheduler.submit(generation.choices):
            self._generations[request.number] = generation
            return
        request.close()
        slots, waiting = self._loaded.slot_count, self._loaded.queue_limit
        text = f"All {slots} slots are busy and {waiting} requests wait already."
        error = WorkerError(Reason.QUEUE_FULL, text)
        self._news.of(request.number).failed.CopyFrom(error.to_failure())

    def step(self) -> None:
        """Make one step: a token of every sequence that streams, and what fits of the prompts."""
        self._take_commands(wait=False)
        started_at = self._step_watch.start()
        self._embed()
        plan = self._schedule()
        waits = False
        if self._decode(plan):
            waits = self._can_wait(plan, perf_counter() - started_at)
            self._sample(plan, in_parts=not waits)
            self._step_seconds = perf_counter() - started_at
            self._scheduler.observe(plan, self._step_seconds * 1000)
        if not waits or self._news.urgent:
            self._news.send()
        if perf_counter() - self._stats_at > _STATS_SECONDS:
            self._refresh_stats()
        self._step_watch.stop()

    def close(self) -> None:
        """Free what the engine made. The model stays the caller's."""
        for generation in list(self._generations.values()):
            self._drop(generation)
        self._embedder.close()

    def _take_commands(self, *, wait: bool) -> None:
        if wait:
            self._refresh_stats()
            self._apply(self._inbox.get())
        while not self._inbox.empty():
            self._apply(self._inbox.get())

    def _apply(self, command: Command) -> None:
        if isinstance(command, PreparedGeneration):
            self.submit(command)
        elif isinstance(command, EmbedJob):
            self._queue_embedding(command)
        elif isinstance(command, SleepCommand):
            self._put_to_sleep = True
        elif isinstance(command, CancelCallCommand):
            self._embed_jobs = deque(job for job in self._embed_jobs if job.call != command.call)
        else:
            generation = self._generations.get(command.number)
            if generation is not None:
                self._drop(generation)

    def _queue_embedding(self, job: EmbedJob) -> None:
        """Queue an embedding job, or say that the queue is full. The first one does not wait."""
        waiting = self._loaded.queue_limit
        if len(self._embed_jobs) <= waiting:
            self._embed_jobs.append(job)
            return
        text = f"Embeddings are being computed and {waiting} requests for them wait already."
        failure = WorkerError(Reason.QUEUE_FULL, text).to_failure()
        self._send(worker_pb2.WorkerFrame(reply=worker_pb2.Reply(call=job.call, failed=failure)))

    def _embed(self) -> None:
        """Compute one batch of the first embedding job."""
        if not self._embed_jobs:
            return
        self._news.send()  # what was made before does not wait for this
        job = self._embed_jobs[0]
        try:
            self._embedder.advance(job, beside_generations=not self._scheduler.idle)
        except WorkerError as error:
            reply = worker_pb2.Reply(call=job.call, failed=error.to_failure())
        else:
            if not job.done:
                return
            reply = job.to_reply()
        self._embed_jobs.popleft()
        self._send(worker_pb2.WorkerFrame(reply=reply))

    def _schedule(self) -> Plan[Choice]:
        plan = self._scheduler.plan()
        if plan.prompt_tokens:
            self._news.send()  # as above
        for slot in plan.freed_slots:
            self._forget(slot)
        for choice in plan.started:
            generation = choice.generation
            if generation.slot_at is None:
                generation.slot_at = perf_counter()
                self._news.of(generation.number).started.prompt_tokens = generation.prompt_length
        self._share(plan.shares)
        return plan

    def _decode(self, plan: Plan[Choice]) -> bool:
        """Compute the plan; False when there is nothing to sample from."""
        if not plan.work:
            return False
        batch = self._batch
        batch.clear()
        self._rows.clear()
        for work in plan.work:
            choice = work.sequence
            start = choice.evaluated
            tokens = choice.tokens[start : start + work.count]
            row = batch.add(choice.slot, tokens, start, output_last=work.count == choice.pending)
            self._rows.append(row)
        context = self._loaded.generation_context
        with self._flight_lock:
            self._in_flight.update(work.sequence.group for work in plan.work)
        result = context.decode(batch)
        with self._flight_lock:
            self._in_flight.clear()
            context.abort_flag.clear()
        if result == llama.DECODE_OK:
            self._steps += 1
            self._share(self._scheduler.commit(plan))
            return True
        if result == llama.DECODE_NO_CELLS:
            self._make_room(plan)
        return False

    def _make_room(self, plan: Plan[Choice]) -> None:
        """Plan with fewer cells for now, since these were not there; end a sequence that is alone."""
        self._scheduler.shrink(plan)
        running = self._scheduler.running
        if len(running) > 1:
            return
        choice = running[0]
        if choice.generated:
            delta = self._news.of(choice.group).deltas.deltas.add(choice_index=choice.index)
            self._finish(choice, delta, generation_pb2.FINISH_REASON_LENGTH, perf_counter())
        else:
            limit = self._scheduler.cells
            self._fail(choice.generation, context_length_exceeded("", choice.prompt_length, limit))

    def _can_wait(self, plan: Plan[Choice], decode_seconds: float) -> bool:
        """Whether further tokens of this step may leave with the next. That should take as long as this one,
        unless it has to look for a token that a grammar allows."""
        if any(work.sequence.generation.request.constrained for work in plan.work):
            return False
        return self._news.can_wait(max(self._step_seconds, decode_seconds))

    def _sample(self, plan: Plan[Choice], *, in_parts: bool) -> None:
        """Pick the next token of every sequence that the plan brought to its end."""
        now = perf_counter()
        for work in plan.work:
            generation = work.sequence.generation
            if generation.request.reports_progress and generation.first_token_at is None:
                self._report_progress(generation)
        sampled = 0
        for work, row in zip(plan.work, self._rows, strict=True):
            choice = work.sequence
            if choice.pending == 0 and choice.slot != NO_SLOT:
                self._advance(choice, row, now)
                sampled += 1
                if in_parts and sampled % SEQUENCES_PER_FRAME == 0:
                    self._news.send()

    def _advance(self, choice: Choice, row: int, now: float) -> None:
        """Add a token to a choice, and end the choice where it ends."""
        generation = choice.generation
        request = generation.request
        context = self._loaded.generation_context
        try:
            token = choice.sampler.sample(context, row)
        except WorkerError as error:
            self._fail(generation, error)
            return
        choice.tokens.append(token)
        if generation.first_token_at is None:
            generation.first_token_at = now
        generation.last_token_at = now
        generation.completion_tokens += 1
        update = self._news.of(generation.number, urgent=choice.generated == 1)
        delta = update.deltas.deltas.add(choice_index=choice.index, token_count=1)
        if request.logprob_count is not None:
            delta.logprobs.append(token_logprob(context, row, self._vocab, token, request.logprob_count))
        if not request.ignores_end and self._vocab.ends_generation(token):
            self._finish(choice, delta, generation_pb2.FINISH_REASON_STOP, now)
            return
        emitted = choice.text.push(self._vocab.piece(token, special=False))
        delta.text = emitted.text
        if emitted.stop_sequence:
            delta.stop_sequence = emitted.stop_sequence
            self._finish(choice, delta, generation_pb2.FINISH_REASON_STOP, now)
        elif choice.generated == request.max_tokens or len(choice.tokens) >= self._loaded.sequence_limit:
            self._finish(choice, delta, generation_pb2.FINISH_REASON_LENGTH, now)

    def _finish(
        self,
        choice: Choice,
        delta: generation_pb2.Delta,
        reason: generation_pb2.FinishReason.ValueType,
        now: float,
    ) -> None:
        """End a choice with `delta` as its last one, and the generation with its last choice."""
        if not delta.stop_sequence:
            rest = choice.text.finish()
            delta.text += rest.text
            if rest.stop_sequence:
                delta.stop_sequence = rest.stop_sequence
                reason = generation_pb2.FINISH_REASON_STOP
        delta.finish_reason = reason
        self._forget(self._scheduler.remove(choice))
        choice.sampler.close()
        generation = choice.generation
        generation.open_choices -= 1
        update = self._news.of(generation.number)  # urgent: the end of a choice does not wait
        if generation.open_choices == 0:
            del self._generations[generation.number]
            update.finished.CopyFrom(generation.summary(now))

    def _fail(self, generation: Generation, error: WorkerError) -> None:
        self._drop(generation)
        self._news.of(generation.number).failed.CopyFrom(error.to_failure())

    def _drop(self, generation: Generation) -> None:
        """Take a generation out and free everything it holds."""
        for choice in generation.choices:
            self._forget(self._scheduler.remove(choice))
        generation.request.close()
        del self._generations[generation.number]

    def _report_progress(self, generation: Generation) -> None:
        evaluated = generation.evaluated_prompt_tokens
        if evaluated > generation.progress:
            generation.progress = evaluated
            progress = self._news.of(generation.number).prompt_progress
            progress.evaluated_tokens = evaluated
            progress.total_tokens = generation.prompt_length * len(generation.choices)

    def _share(self, shares: list[Share[Choice]]) -> None:
        for share in shares:
            self._loaded.generation_context.share(share.source.slot, share.target.slot, share.count)

    def _forget(self, slot: int) -> None:
        if slot != NO_SLOT:
            self._loaded.generation_context.forget(slot)

    def _refresh_stats(self) -> None:
        scheduler = self._scheduler
        self._stats_at = perf_counter()
        self._stats = Stats(
            active_sequences=len(scheduler.running),
            queued_requests=scheduler.waiting_requests,
            used_cells=scheduler.used_cells,
            steps=self._steps,
            preemptions=scheduler.preemption_count,
        )


def _can_share_prompts(loaded: LoadedModel) -> bool:
    """Whether a sequence may begin in the cells of another one that has gone on generating.

    Recurrent state is one per sequence; under a sliding window llama.cpp gives cells that fell out of the
    window of the one sequence that holds them to others.
    """
    return not loaded.model.has_state_per_sequence and loaded.model.sliding_window_tokens == 0
