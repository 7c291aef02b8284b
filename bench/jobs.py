"""What is measured: some generations at once, and what became of them."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Literal

from paddock.v1 import generation_pb2, model_manager_pb2

VOCABULARY = 20_000
"""Token ids of prompts stay below: the bench model has more tokens than that."""


@dataclass(frozen=True, slots=True)
class Job:
    """Generations to run at once."""

    path: Literal["engine", "grpc", "grpc.aio", "gateway", "gateway alone"]
    address: str
    model: str
    streams: int
    prompt_tokens: int
    max_tokens: int
    seed: int = 0
    delay: float = 0
    """Seconds to wait before the first request."""


@dataclass(slots=True)
class Result:
    """What became of a job."""

    wall_seconds: float
    cpu_seconds: float
    completion_tokens: int
    gaps_seconds: list[float] = field(default_factory=list[float])
    """Time between two messages with text, of all streams. A message may carry several tokens when steps are
    short (ADR 0017)."""


def prompt(job: Job, stream: int) -> list[int]:
    """Return a prompt no other stream has."""
    start = 1 + 977 * (stream + 64 * job.seed)
    return [1 + (start + 31 * index) % VOCABULARY for index in range(job.prompt_tokens)]


def grpc_request(job: Job, stream: int) -> model_manager_pb2.GenerateRequest:
    """Return the request of a stream: greedy, to its last token."""
    return model_manager_pb2.GenerateRequest(
        model=job.model,
        tokens=generation_pb2.TokenInput(token_ids=prompt(job, stream)),
        sampling=generation_pb2.SamplingParams(temperature=0),
        stop=generation_pb2.StopParams(max_tokens=job.max_tokens, ignore_eos=True),
    )


def check_last_message(job: Job, message: bytes) -> None:
    """Make sure a gRPC stream made all of its tokens. Raises RuntimeError."""
    made = model_manager_pb2.GenerateResponse.FromString(message).generated.usage.completion_tokens
    if made != job.max_tokens:
        text = f"the stream ended with {made} of {job.max_tokens} tokens"
        raise RuntimeError(text)


def own_cpu_seconds() -> float:
    """Return the CPU time this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
