"""The fake worker's engine: deterministic text, slots, a queue and byte-level tokens, without a model."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.fakes.behaviour import Behaviour

DEFAULT_CONTEXT_TOKENS: Final = 4096
DEFAULT_SLOT_COUNT: Final = 4
DEFAULT_TOKEN_COUNT: Final = 16
EMBEDDING_DIMENSION_COUNT: Final = 8
BOS_TOKEN: Final = 256
VOCABULARY_SIZE: Final = 257


@dataclass
class RunningGeneration:
    """A generation with or without a slot. All its choices say the same, in step."""

    number: int
    request: model_manager_pb2.GenerateRequest
    prompt_tokens: int
    limit: int
    end: int | None
    has_slot: bool = False
    made: int = 0
    text: str = field(default="")

    @property
    def choice_count(self) -> int:
        """Sequences it takes."""
        return max(1, self.request.choice_count)


class FakeEngine:
    """Runs generations one token per step, as many as there are slots; the rest waits."""

    def __init__(self, behaviour: Behaviour, load: worker_pb2.Load) -> None:
        self.behaviour = behaviour
        self.step_count = 0
        self._slot_count = behaviour.slot_count or load.slot_count or DEFAULT_SLOT_COUNT
        self._queue_limit = behaviour.queue_limit if behaviour.queue_limit is not None else load.queue_limit
        self._context = behaviour.context_size_tokens or load.context_size_tokens or DEFAULT_CONTEXT_TOKENS
        self._load = load
        self._generations: dict[int, RunningGeneration] = {}
        self._queue: deque[RunningGeneration] = deque()
        self._refused: list[worker_pb2.GenerationUpdate] = []

    def ready(self) -> worker_pb2.Ready:
        """Describe the model that is not there."""
        return worker_pb2.Ready(
            context_size_tokens=self._context,
            sequence_limit_tokens=self._context,
            slot_count=self._slot_count,
            vocabulary_size=VOCABULARY_SIZE,
            trained_context_tokens=DEFAULT_CONTEXT_TOKENS,
            embedding_dimension_count=EMBEDDING_DIMENSION_COUNT,
            parameter_count=1_000_000,
            weight_bytes=1_000_000,
            has_chat_template=True,
            can_generate=True,
            gpu_layer_count=0,
            thread_count=self._load.thread_count or 1,
            batch_size_tokens=self._load.batch_size_tokens or 512,
        )

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """Say what it is doing."""
        running = list(self._generations.values())
        return worker_pb2.Heartbeat(
            active_sequence_count=sum(one.choice_count for one in running),
            queued_request_count=len(self._queue),
            kv_cache_used_tokens=sum(one.prompt_tokens + one.made * one.choice_count for one in running),
            step_count=self.step_count,
            step_milliseconds=self.behaviour.step_milliseconds if running else 0,
            preparation_milliseconds=self.behaviour.preparation_milliseconds if running else 0,
        )

    @property
    def has_work(self) -> bool:
        """Whether the next step has something to say."""
        return bool(self._generations or self._refused)

    def start(self, start: worker_pb2.Start) -> None:
        """Take a request in, into a slot, into the queue, or refuse it in the next step."""
        request = start.request
        prompt_tokens = count_prompt_tokens(request)
        room = self._context - prompt_tokens
        if self.behaviour.fail_generate_reason:
            failure = worker_pb2.Failure(
                reason=self.behaviour.fail_generate_reason,
                message=self.behaviour.fail_generate_message,
                field=self.behaviour.fail_generate_field,
            )
        elif room <= 0:
            failure = worker_pb2.Failure(
                reason="CONTEXT_LENGTH_EXCEEDED",
                message=f"The prompt has {prompt_tokens} tokens; the context holds {self._context}.",
                metadata={"prompt_tokens": str(prompt_tokens), "context_tokens": str(self._context)},
            )
        elif request.choice_count > self._slot_count:
            failure = worker_pb2.Failure(
                reason="INVALID_FIELD",
                message=f"choice_count: at most {self._slot_count}, the slots of this model",
                field="choice_count",
            )
        elif not self._fits(max(1, request.choice_count)) and len(self._queue) >= self._queue_limit:
            failure = worker_pb2.Failure(reason="QUEUE_FULL", message="Every slot and the queue are taken.")
        else:
            limit, end = self._lengths(request, room)
            self._queue.append(RunningGeneration(start.generation, request, prompt_tokens, limit, end))
            self._admit()
            return
        self._refused.append(worker_pb2.GenerationUpdate(generation=start.generation, failed=failure))

    def cancel(self, number: int) -> None:
        """Stop a generation; an unknown number is ignored."""
        self._generations.pop(number, None)
        self._queue = deque(one for one in self._queue if one.number != number)
        self._admit()

    def step(self) -> worker_pb2.Step:
        """Make one token of every running sequence."""
        self.step_count += 1
        updates, self._refused = self._refused, []
        updates += [self._advance(one) for one in list(self._generations.values())]
        for one in updates:
            if one.HasField("finished"):
                del self._generations[one.generation]
        self._admit()
        return worker_pb2.Step(updates=updates)

    def most_tokens(self) -> int:
        """Return how many tokens the longest running generation has made."""
        return max((one.made for one in self._generations.values()), default=0)

    def _fits(self, choice_count: int) -> bool:
        return sum(one.choice_count for one in self._generations.values()) + choice_count <= self._slot_count

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0].choice_count):
            one = self._queue.popleft()
            self._generations[one.number] = one

    def _lengths(self, request: model_manager_pb2.GenerateRequest, room: int) -> tuple[int, int | None]:
        """Return the most tokens, and after how many the model itself ends, if it does."""
        has_limit = request.stop.HasField("max_tokens")
        end = self.behaviour.token_count
        if end is None and not has_limit:
            end = DEFAULT_TOKEN_COUNT
        if request.stop.ignore_eos:
            end = None
        return min(request.stop.max_tokens, room) if has_limit else room, end

    def _piece(self, index: int) -> str:
        pieces = self.behaviour.pieces
        if pieces:
            return pieces[index % len(pieces)]
        return f" tok{index}" if index else "tok0"

    def _advance(self, one: RunningGeneration) -> worker_pb2.GenerationUpdate:
        update = worker_pb2.GenerationUpdate(generation=one.number)
        if not one.has_slot:
            one.has_slot = True
            update.started.prompt_tokens = one.prompt_tokens
            if one.request.report_prompt_progress:
                update.prompt_progress.evaluated_tokens = one.prompt_tokens
                update.prompt_progress.total_tokens = one.prompt_tokens
        piece, finish, stopped_by = self._next(one)
        for choice in range(one.choice_count):
            delta = update.deltas.deltas.add(choice_index=choice, text=piece, finish_reason=finish)
            if piece:
                delta.token_count = 1
                if one.request.HasField("logprobs"):
                    delta.logprobs.add(token_id=0, token=piece.encode(), logprob=-0.5)
            if stopped_by:
                delta.stop_sequence = stopped_by
        if finish:
            self._finish(one, update)
        return update

    def _next(self, one: RunningGeneration) -> tuple[str, generation_pb2.FinishReason.ValueType, str]:
        """Return the next text, whether it is the last one, and the stop sequence that made it so."""
        if one.end is not None and one.made >= one.end:
            return "", generation_pb2.FINISH_REASON_STOP, ""
        if one.made >= one.limit:
            return "", generation_pb2.FINISH_REASON_LENGTH, ""
        piece = self._piece(one.made)
        one.made += 1
        for stop in one.request.stop.stop_sequences:
            where = (one.text + piece).find(stop)
            if where >= 0:  # never across pieces in what the tests ask for, so nothing is held back
                return piece[: max(0, where - len(one.text))], generation_pb2.FINISH_REASON_STOP, stop
        one.text += piece
        is_last = one.made >= one.limit and (one.end is None or one.made < one.end)
        finish = generation_pb2.FINISH_REASON_LENGTH if is_last else generation_pb2.FINISH_REASON_UNSPECIFIED
        return piece, finish, ""

    def _finish(self, one: RunningGeneration, update: worker_pb2.GenerationUpdate) -> None:
        update.finished.usage.prompt_tokens = one.prompt_tokens
        update.finished.usage.completion_tokens = one.made * one.choice_count
        update.finished.timings.queue_duration.FromMilliseconds(1)
        update.finished.timings.prompt_duration.FromMilliseconds(2)
        update.finished.timings.generation_duration.FromMilliseconds(max(1, one.made))
        update.finished.seed = one.request.sampling.seed or 1234


def count_prompt_tokens(request: model_manager_pb2.GenerateRequest) -> int:
    """Count a prompt: its bytes, or the tokens it consists of."""
    match request.WhichOneof("input"):
        case "tokens":
            return len(request.tokens.token_ids)
        case "chat":
            texts: Iterable[str] = (part.text for one in request.chat.messages for part in one.content)
            return sum(len(text.encode()) for text in texts)
        case _:
            return len(request.prompt.encode())


def answer(call: worker_pb2.Call) -> worker_pb2.Reply:
    """Answer a call. Tokens are the bytes of the text, and `BOS_TOKEN`."""
    reply = worker_pb2.Reply(call=call.call)
    match call.WhichOneof("request"):
        case "tokenize":
            tokens = [BOS_TOKEN] * call.tokenize.add_special_tokens + list(call.tokenize.text.encode())
            reply.tokenize.token_ids.extend(tokens)
            if call.tokenize.include_pieces:
                reply.tokenize.pieces.extend(_piece_bytes(token) for token in tokens)
        case "detokenize":
            ids = list(call.detokenize.token_ids)
            wrong = [index for index, token in enumerate(ids) if not 0 <= token < VOCABULARY_SIZE]
            if wrong:
                path = f"token_ids[{wrong[0]}]"
                reply.failed.reason, reply.failed.field = "INVALID_FIELD", path
                reply.failed.message = (
                    f"{path}: not a token of this model; they are 0 to {VOCABULARY_SIZE - 1}"
                )
            else:
                keep = call.detokenize.include_special_tokens
                text = b"".join(_piece_bytes(token) for token in ids if keep or token != BOS_TOKEN)
                reply.detokenize.text = text.decode("utf-8", "replace")
        case "embed":
            for text in call.embed.texts:
                reply.embed.embeddings.add(values=_embedding(text.encode(), normalize=call.embed.normalize))
            reply.embed.usage.prompt_tokens = sum(len(text.encode()) for text in call.embed.texts)
        case None:
            reply.failed.reason, reply.failed.message = "NOT_IMPLEMENTED", "The fake does not know this call."
    return reply


def _piece_bytes(token: int) -> bytes:
    return b"<s>" if token == BOS_TOKEN else bytes([token])


def _embedding(text: bytes, *, normalize: bool) -> list[float]:
    values = [0.0] * EMBEDDING_DIMENSION_COUNT
    for byte in text or b"\0":
        values[byte % EMBEDDING_DIMENSION_COUNT] += 1.0
    length = math.sqrt(sum(value * value for value in values)) if normalize else 1.0
    return [value / length for value in values]
