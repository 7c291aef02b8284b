from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from google.protobuf import json_format

from paddock.v1 import generation_pb2
from paddock_server.worker.errors import WorkerError
from paddock_server.worker.sampling import check_sampling, make_sampler, seed_of_choice

if TYPE_CHECKING:
    from paddock_server.worker import llama

SIZE = 100
VOCAB = cast("llama.Vocab", SimpleNamespace(size=SIZE))


def params(**fields: Any) -> generation_pb2.SamplingParams:
    message = generation_pb2.SamplingParams()
    json_format.ParseDict(fields, message)
    return message


def chain(banned: tuple[int, ...] = (), **fields: Any) -> list[str]:
    """Return the names of the samplers that parameters become."""
    sampler = make_sampler(
        check_sampling(params(**fields), SIZE),
        VOCAB,
        choice=0,
        banned=banned,
        prompt=[1, 2, 3],
        sequence_limit=512,
    )
    names = sampler.names
    sampler.close()
    return names


def test_unset_parameters_take_llama_cpps_defaults_in_llama_cpps_order() -> None:
    sampling = check_sampling(params(), SIZE)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert (sampling.repetition_penalty, sampling.penalty_last_tokens) == (1, 64)
    assert chain() == ["top-k", "top-p", "min-p", "temp", "dist"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"temperature": 0}, ["greedy"]),
        ({"temperature": 0, "frequencyPenalty": 0.1}, ["penalties", "greedy"]),
        ({"temperature": 1, "topK": 0, "topP": 1, "minP": 0}, ["dist"]),
        ({"topK": 100}, ["top-p", "min-p", "temp", "dist"]),
        ({"temperature": 1e-9}, ["greedy"]),
        ({"presencePenalty": 1, "penaltyLastTokens": 0}, ["top-k", "top-p", "min-p", "temp", "dist"]),
        ({"repetitionPenalty": 1.1}, ["penalties", "top-k", "top-p", "min-p", "temp", "dist"]),
        ({"temperature": 0, "logitBias": {"5": 1}}, ["logit-bias", "greedy"]),
    ],
)
def test_only_samplers_that_do_something_are_in_the_chain(fields: dict[str, Any], names: list[str]) -> None:
    assert chain(**fields) == names


def test_banned_tokens_come_first_in_the_chain() -> None:
    assert chain(banned=(1, 2), temperature=0) == ["logit-bias", "greedy"]


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 1, 100], [-0.1, 100.5, math.nan, math.inf]),
        ("topP", [0.01, 1], [0, -1, 1.01, math.nan]),
        ("topK", [0, 1, 2**31 - 1], [-1]),
        ("minP", [0, 1], [-0.1, 1.1, math.nan]),
        ("presencePenalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("frequencyPenalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("repetitionPenalty", [0.1, 1, 100], [0, -1, 101, math.nan]),
        ("penaltyLastTokens", [-1, 0, 64], [-2]),
    ],
)
def test_every_number_has_a_range_and_the_error_names_the_field(
    field: str, good: list[float], bad: list[float]
) -> None:
    name = "".join("_" + character.lower() if character.isupper() else character for character in field)
    for value in good:
        check_sampling(params(**{field: value}), SIZE)
    for value in bad:
        message = generation_pb2.SamplingParams()
        setattr(message, name, value)
        with pytest.raises(WorkerError, match="must be") as caught:
            check_sampling(message, SIZE)
        assert caught.value.reason == "INVALID_FIELD"
        assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize("token", [-1, SIZE, 2**31 - 1])
def test_a_logit_bias_outside_the_vocabulary_is_refused_by_its_id(token: int) -> None:
    with pytest.raises(WorkerError, match="not a token") as caught:
        check_sampling(generation_pb2.SamplingParams(logit_bias={token: 1.0}), SIZE)
    assert caught.value.field == f"sampling.logit_bias[{token}]"


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_a_logit_bias_that_is_no_number_is_refused(bias: float) -> None:
    with pytest.raises(WorkerError) as caught:
        check_sampling(generation_pb2.SamplingParams(logit_bias={3: bias}), SIZE)
    assert caught.value.field == "sampling.logit_bias[3]"


def test_a_bias_of_minus_100_or_less_bans_the_token() -> None:
    biases = {1: -100.0, 2: -99.0, 3: -1e9, 4: -math.inf}
    checked = check_sampling(generation_pb2.SamplingParams(logit_bias=biases), SIZE).logit_bias
    assert checked == {1: -math.inf, 2: -99.0, 3: -math.inf, 4: -math.inf}


def test_banning_every_token_is_refused() -> None:
    biases = dict.fromkeys(range(SIZE), -100.0)
    with pytest.raises(WorkerError, match="at least one"):
        check_sampling(generation_pb2.SamplingParams(logit_bias=biases), SIZE)


def test_seeds_are_reduced_and_each_choice_has_its_own() -> None:
    assert check_sampling(generation_pb2.SamplingParams(seed=2**32 + 7), SIZE).seed == 7
    assert check_sampling(generation_pb2.SamplingParams(seed=-1), SIZE).seed == 2**32 - 1
    assert [seed_of_choice(7, choice) for choice in range(3)] == [7, 8, 9]
    assert seed_of_choice(2**32 - 1, 1) == 0


def test_the_seed_that_llama_cpp_takes_for_random_is_never_passed_on() -> None:
    assert seed_of_choice(2**32 - 1, 0) == 2**32 - 2


def test_an_unset_seed_is_drawn() -> None:
    seeds = {check_sampling(params(), SIZE).seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)
