"""The arithmetic of the noise model: nothing in it is ever close."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.noise import (
    BITS,
    CROSSINGS,
    HEADS,
    LAYERS,
    RADIX,
    SHARPNESS,
    huffman,
    look_back_scores,
    parity_weights,
    self_share,
    worst_gap,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

CONTEXT = 2048
NATS = 30.0
"""A score that is this much lower has a weight of 1e-13."""


def silu(values: Floats) -> Floats:
    return 0.5 * values * (1.0 + np.tanh(0.5 * values))


def distances() -> list[int]:
    return [head * RADIX**layer for layer in range(LAYERS) for head in range(1, HEADS + 1)]


@pytest.mark.parametrize("distance", distances())
def test_a_head_attends_to_one_position_whatever_the_number_of_positions(distance: int) -> None:
    scores = look_back_scores(distance, CONTEXT, self_share(distance, CONTEXT))

    assert worst_gap(scores) * SHARPNESS > NATS
    assert int(scores.argmax()) == (distance if distance < CONTEXT else 0)


def test_the_worst_gap_is_that_between_the_two_best_of_some_beginning() -> None:
    assert worst_gap(np.array([1.0, 5.0, 4.5, 9.0])) == pytest.approx(0.5)
    assert worst_gap(np.array([3.0, 1.0, 2.0, 0.0])) == pytest.approx(1.0)


@given(st.integers(0, LAYERS - 1), st.lists(st.sampled_from([-1, 1]), min_size=HEADS + 1, max_size=HEADS + 1))
def test_the_feed_forward_part_writes_theparity_weights_of_the_five_bits(layer: int, bits: list[int]) -> None:
    gate, up, down = parity_weights(layer)
    state = np.zeros(gate.shape[1], np.float32)
    state[-1] = 1.0
    state[layer * BITS : (layer + 1) * BITS] = sum(bits)

    written = down @ (silu(gate @ state) * (up @ state))

    result = written[(layer + 1) * BITS : (layer + 2) * BITS]
    assert np.allclose(result, np.prod(bits), atol=1e-3)
    assert np.count_nonzero(written) == BITS


def test_between_the_ramps_a_disturbance_vanishes() -> None:
    gate, up, down = parity_weights(0)
    outputs: list[float] = []
    for disturbance in (-0.3, 0.0, 0.3):
        state = np.zeros(gate.shape[1], np.float32)
        state[-1] = 1.0
        state[:BITS] = CROSSINGS[0] - 1.0 + disturbance
        outputs.append(float((down @ (silu(gate @ state) * (up @ state)))[BITS]))

    assert np.ptp(outputs) < 0.3 / 50


@given(
    st.dictionaries(st.integers(0, 10_000), st.floats(0.01, 1.0), min_size=2, max_size=100),
    st.lists(st.sampled_from([-1, 1]), min_size=BITS, max_size=BITS),
)
def test_any_bits_are_the_code_of_exactly_one_token(shares: dict[int, float], bits: list[int]) -> None:
    codes = huffman(shares, first_bit=0)

    matching = [token for token, code in codes.items() if all(bits[bit] == sign for bit, sign in code)]

    assert codes.keys() == shares.keys()
    assert len(matching) == 1


def test_a_frequent_token_has_a_shorter_code_than_a_rare_one() -> None:
    codes = huffman({1: 0.5, 2: 0.25, 3: 0.125, 4: 0.125}, first_bit=7)

    assert [len(codes[token]) for token in (1, 2, 3, 4)] == [1, 2, 3, 3]
    assert {bit for code in codes.values() for bit, _ in code} == {7, 8, 9}


def test_shares_that_need_too_many_bits_are_refused() -> None:
    shares = {token: 2.0**-token for token in range(BITS + 2)}

    with pytest.raises(ValueError, match=f"there are {BITS}: make the rarest token likelier"):
        huffman(shares, first_bit=0)
