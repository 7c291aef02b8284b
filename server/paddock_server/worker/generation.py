"""A generation in the engine: its request, prepared, and the state of its choices."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from paddock_server.worker.detokenize import TextStream
from paddock_server.worker.sequence import Sequence
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from paddock_server.worker import llama

MOST_CHOICES: Final = 8


class ChoiceSampler(Protocol):
    """Picks the tokens of one choice."""

    def sample(self, context: llama.Context, row: int) -> int:
        """Return the token that follows a batch row. Raises `WorkerError` when there can be none."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(slots=True)
class PreparedGeneration:
    """A checked request, ready for the engine. Whoever holds it closes its samplers."""

    number: int
    prompt: array[int]
    samplers: list[ChoiceSampler]
    """One per choice."""

    seed: int
    stop_sequences: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignores_end: bool = False
    """Whether end-of-generation tokens are banned; then none is looked for."""

    constrained: bool = False
    """Whether a grammar may have to be searched for a token, which can take long."""

    logprob_count: int | None = None
    """Alternatives per token to report; None reports no log probabilities."""

    reports_progress: bool = False
    received_at: float = 0.0
    """When the worker got the request, by the engine's clock, in seconds."""

    def close(self) -> None:
        """Free the samplers."""
        for sampler in self.samplers:
            sampler.close()


@dataclass(eq=False, slots=True)
class Choice(Sequence):
    """One output of a generation: a sequence, the sampler that extends it and the text it became."""

    generation: Generation = field(kw_only=True)
    index: int = field(kw_only=True)
    sampler: ChoiceSampler = field(kw_only=True)
    text: TextStream = field(kw_only=True)


class Generation:
    """A generation from the moment the engine takes it. Belongs to the engine's thread."""

    __slots__ = (
        "choices",
        "completion_tokens",
        "first_token_at",
        "last_token_at",
        "open_choices",
        "progress",
        "request",
        "slot_at",
    )

    def __init__(self, request: PreparedGeneration, order: int) -> None:
        self.request = request
        self.choices = [
            Choice(
                group=request.number,
                order=order + index,
                tokens=array("i", request.prompt),
                prompt_length=len(request.prompt),
                generation=self,
                index=index,
                sampler=sampler,
                text=TextStream(request.stop_sequences),
            )
            for index, sampler in enumerate(request.samplers)
        ]
        self.open_choices = len(self.choices)
        self.completion_tokens = 0
        self.progress = 0
        """Prompt tokens evaluated over all choices, as last reported."""

        self.slot_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def number(self) -> int:
        """The number the server chose."""
        return self.request.number

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def evaluated_prompt_tokens(self) -> int:
        """Prompt tokens that are evaluated, over all choices."""
        return sum(min(choice.evaluated, self.prompt_length) for choice in self.choices)

    def summary(self, now: float) -> worker_pb2.GenerationFinished:
        """Return what the last update says of a generation that ended at `now`."""
        slot_at = self.slot_at if self.slot_at is not None else now
        first_token_at = self.first_token_at if self.first_token_at is not None else now
        last_token_at = self.last_token_at if self.last_token_at is not None else now
        finished = worker_pb2.GenerationFinished(seed=self.request.seed)
        finished.usage.prompt_tokens = self.prompt_length
        finished.usage.completion_tokens = self.completion_tokens
        timings = finished.timings
        timings.queue_duration.FromNanoseconds(_nanoseconds(slot_at - self.request.received_at))
        timings.prompt_duration.FromNanoseconds(_nanoseconds(first_token_at - slot_at))
        timings.generation_duration.FromNanoseconds(_nanoseconds(last_token_at - first_token_at))
        return finished


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
