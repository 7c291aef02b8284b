"""What the generations of one request have said so far: the part both ways of answering share. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paddock.errors import Reason, make_error
from paddock.v1 import generation_pb2 as gen
from paddock_gateway.parameters import Dialect
from paddock_gateway.schema import PromptTokensDetails, Timings, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.duration_pb2 import Duration

    from paddock.v1 import model_manager_pb2 as pb
    from paddock_gateway.translate import Plan

ID_PREFIXES: Final = {Dialect.CHAT: "chatcmpl-", Dialect.COMPLETION: "cmpl-"}


@dataclass(slots=True)
class Output:
    """Successive deltas of one choice put together."""

    texts: list[str] = field(default_factory=list[str])
    reasonings: list[str] = field(default_factory=list[str])
    tool_calls: list[gen.ToolCallDelta] = field(default_factory=list[gen.ToolCallDelta])
    logprobs: list[gen.TokenLogprob] = field(default_factory=list[gen.TokenLogprob])
    finish_reason: str = ""
    """Empty while the choice goes on."""

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """The reasoning text."""
        return "".join(self.reasonings)

    def add(self, delta: gen.Delta) -> None:
        """Append one delta."""
        self.texts.append(delta.text)
        self.reasonings.append(delta.reasoning_text)
        self.tool_calls.extend(delta.tool_calls)
        self.logprobs.extend(delta.logprobs)
        if delta.finish_reason:
            self.finish_reason = finish_reason_name(delta.finish_reason)


class Answer:
    """Follows the streams of a request's generations: `started prompt_progress* deltas* generated`, each."""

    def __init__(self, plan: Plan, created: int) -> None:
        self._plan = plan
        self._unfinished = len(plan.requests)
        self._usage = gen.Usage()
        self._timings: gen.Timings | None = None
        self.created = created
        self.id = ""
        self.model = ""
        """Identifier of the model that serves; empty until the first generation has started."""
        self.load_id = ""
        self.prompt_tokens = 0
        """Tokens of the prompts that have started."""
        self.generated_tokens: int = 0
        """Tokens generated so far, over all choices."""
        self.finished_choices = 0
        """Choices that have given their finish reason."""

    @property
    def started(self) -> bool:
        """Whether a generation has a slot: from here on the request is being served."""
        return bool(self.model)

    @property
    def complete(self) -> bool:
        """Whether every generation has ended well."""
        return self._unfinished == 0

    def on_started(self, started: pb.Started) -> None:
        """Take the first event of a generation."""
        self.prompt_tokens += started.prompt_tokens
        if not self.started:
            self.id = ID_PREFIXES[self._plan.dialect] + started.generation_id
            self.model = started.model or self._plan.model
            self.load_id = started.load_id

    def on_generated(self, generated: pb.Generated) -> None:
        """Take the last event of a generation; INTERNAL when a choice has not said why it ended."""
        self._unfinished -= 1
        self._usage.prompt_tokens += generated.usage.prompt_tokens
        self._usage.cached_prompt_tokens += generated.usage.cached_prompt_tokens
        self._usage.completion_tokens += generated.usage.completion_tokens
        # Durations of generations beside each other do not add up to anything.
        self._timings = generated.timings if len(self._plan.requests) == 1 else None
        if self.complete and self.finished_choices != self._plan.choice_count * len(self._plan.requests):
            raise make_error(Reason.INTERNAL, "A choice ended without a finish reason. This is a bug.")

    def check_complete(self) -> None:
        """Raise INTERNAL when a generation ended with neither a result nor an error."""
        if not self.complete:
            raise make_error(Reason.INTERNAL, "The generation ended without a result. This is a bug.")

    def usage(self) -> Usage:
        """Return the tokens of every generation that has ended."""
        usage = self._usage
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(usage.cached_prompt_tokens),
        )

    def timings(self) -> Timings | None:
        """Return where the time went; None while the generation runs, and when there were several prompts."""
        return None if self._timings is None else timings_of(self._timings, self._usage)


def merge(deltas: Iterable[gen.Delta]) -> dict[int, Output]:
    """Put deltas that came together into one output per choice, choices in the order they came in."""
    outputs: dict[int, Output] = {}
    for delta in deltas:
        output = outputs.get(delta.choice_index)
        if output is None:
            output = outputs[delta.choice_index] = Output()
        output.add(delta)
    return outputs


def finish_reason_name(reason: gen.FinishReason.ValueType) -> str:
    """Return OpenAI's word; a reason newer than this gateway counts as a plain end."""
    match reason:
        case gen.FINISH_REASON_LENGTH:
            return "length"
        case gen.FINISH_REASON_TOOL_CALLS:
            return "tool_calls"
        case _:
            return "stop"


def timings_of(timings: gen.Timings, usage: gen.Usage) -> Timings:
    """Return durations as llama-server reports them: every figure finite, rates without the first token."""
    prompt_n = usage.prompt_tokens - usage.cached_prompt_tokens
    prompt_ms = _milliseconds(timings.prompt_duration)
    predicted_ms = _milliseconds(timings.generation_duration)
    after_first = usage.completion_tokens - 1
    return Timings(
        cache_n=usage.cached_prompt_tokens,
        prompt_n=prompt_n,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=_ratio(prompt_ms, prompt_n),
        prompt_per_second=_ratio(prompt_n * 1000, prompt_ms),
        predicted_n=usage.completion_tokens,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=_ratio(predicted_ms, after_first),
        predicted_per_second=_ratio(after_first * 1000, predicted_ms),
    )


def _milliseconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e6


def _ratio(amount: float, by: float) -> float:
    return amount / by if by > 0 else 0.0
