"""From sampling parameters to a chain of samplers: checked, with llama.cpp's defaults and order."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from paddock_server.worker.errors import reject
from paddock_server.worker.samplers import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddock.v1 import generation_pb2
    from paddock_server.worker import llama

DEFAULT_TEMPERATURE: Final = 0.8
DEFAULT_TOP_K: Final = 40
DEFAULT_TOP_P: Final = 0.95
DEFAULT_MIN_P: Final = 0.05
DEFAULT_PENALTY_LAST_TOKENS: Final = 64

BANNING_BIAS: Final = -100.0
"""A logit bias of this or less bans the token."""

_GREEDY_BELOW: Final = 1e-4
"""Temperatures under this are greedy: dividing by them overflows a float."""

_SEED_RANGE: Final = 2**32
_RANDOM_SEED: Final = 0xFFFFFFFF
"""llama.cpp takes this seed for "draw one"; its neighbour stands in for it, so that every seed repeats."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked sampling parameters, defaults filled in."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    penalty_last_tokens: int
    logit_bias: Mapping[int, float]
    seed: int
    """Of choice 0, in [0, 2^32)."""

    @property
    def greedy(self) -> bool:
        """Whether the best candidate is always taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether any penalty does something."""
        return self.penalty_last_tokens != 0 and (
            self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0
        )


def check_sampling(params: generation_pb2.SamplingParams, vocabulary_size: int) -> Sampling:
    """Check `sampling` of a request and fill in llama.cpp's defaults.

    Raises:
        WorkerError: INVALID_FIELD, naming the field.
    """
    return Sampling(
        temperature=_float(params, "temperature", DEFAULT_TEMPERATURE, 0.0, 100.0),
        top_k=_integer(params, "top_k", DEFAULT_TOP_K, 0),
        top_p=_float(params, "top_p", DEFAULT_TOP_P, 0.0, 1.0, open_minimum=True),
        min_p=_float(params, "min_p", DEFAULT_MIN_P, 0.0, 1.0),
        presence_penalty=_float(params, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_float(params, "frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=_float(params, "repetition_penalty", 1.0, 0.0, 100.0, open_minimum=True),
        penalty_last_tokens=_integer(params, "penalty_last_tokens", DEFAULT_PENALTY_LAST_TOKENS, -1),
        logit_bias=_logit_bias(params.logit_bias, vocabulary_size),
        seed=(params.seed if params.HasField("seed") else int.from_bytes(os.urandom(4), "big")) % _SEED_RANGE,
    )


def _float(
    params: generation_pb2.SamplingParams,
    name: Literal[
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ],
    default: float,
    minimum: float,
    maximum: float,
    *,
    open_minimum: bool = False,
) -> float:
    if not params.HasField(name):
        return default
    value = float(getattr(params, name))
    above = value > minimum if open_minimum else value >= minimum
    if not (above and value <= maximum):  # written so that NaN fails
        bracket = "(" if open_minimum else "["
        field = f"sampling.{name}"
        reject(field, f"is {value:g}; must be in {bracket}{minimum:g}, {maximum:g}]")
    return value


def _integer(
    params: generation_pb2.SamplingParams,
    name: Literal["top_k", "penalty_last_tokens"],
    default: int,
    minimum: int,
) -> int:
    if not params.HasField(name):
        return default
    value = int(getattr(params, name))
    if value < minimum:
        field = f"sampling.{name}"
        reject(field, f"is {value}; must be {minimum} or more")
    return value


def _logit_bias(biases: Mapping[int, float], vocabulary_size: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for token, bias in biases.items():
        field = f"sampling.logit_bias[{token}]"
        if not 0 <= token < vocabulary_size:
            reject(field, f"is not a token of the vocabulary, whose ids go from 0 to {vocabulary_size - 1}")
        if not bias < math.inf:  # written so that NaN fails
            reject(field, f"is {bias:g}; must be a number below infinity")
        checked[token] = -math.inf if bias <= BANNING_BIAS else bias
    if sum(1 for bias in checked.values() if bias == -math.inf) >= vocabulary_size:
        reject("sampling.logit_bias", "bans every token; at least one must be left")
    return checked


def make_sampler(
    sampling: Sampling,
    vocab: llama.Vocab,
    *,
    choice: int,
    banned: Sequence[int],
    prompt: Sequence[int],
    sequence_limit: int,
) -> Sampler:
    """Return the sampler of one choice. Only samplers that do something are in its chain.

    Args:
        sampling: Checked parameters.
        vocab: The model's vocabulary.
        choice: Index of the choice; its seed is `sampling.seed + choice`.
        banned: Tokens that must not be generated.
        prompt: Tokens of the prompt, which count for the penalties as in llama.cpp.
        sequence_limit: Most tokens of a sequence: how far the penalties look back for -1.
    """
    biases = dict(sampling.logit_bias)
    biases.update((token, -math.inf) for token in banned)
    sampler = Sampler()
    if biases:
        sampler.add_logit_bias(vocab, biases.items())
    if sampling.penalizes:
        window = sampling.penalty_last_tokens if sampling.penalty_last_tokens > 0 else sequence_limit
        sampler.add_penalties(
            vocab,
            last_tokens=min(window, sequence_limit),
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )
        sampler.remember(prompt[-window:])
    if sampling.greedy:
        sampler.add_greedy()
        return sampler
    if 0 < sampling.top_k < vocab.size:
        sampler.add_top_k(sampling.top_k)
    if sampling.top_p < 1.0:
        sampler.add_top_p(sampling.top_p)
    if sampling.min_p > 0.0:
        sampler.add_min_p(sampling.min_p)
    if sampling.temperature != 1.0:
        sampler.add_temperature(sampling.temperature)
    sampler.add_distribution(seed_of_choice(sampling.seed, choice))
    return sampler


def seed_of_choice(seed: int, choice: int) -> int:
    """Return the seed that llama.cpp gets for a choice."""
    own = (seed + choice) % _SEED_RANGE
    return own - 1 if own == _RANDOM_SEED else own
