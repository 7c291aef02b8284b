"""Makes `noise`: a small llama that says random English words, and says them the same way every time.

Random weights would do for text, but not for the test that a batch of generations gives token for token
what each gives alone: the gap between the two best logits of a random network comes as close to zero as
you please, so now and then rounding decides. Here nothing is ever close. The weights are a hash function,
wired at random from a seed, and every value that matters is +1 or -1:

- A token's embedding is a code of random bits. Layer `l` holds bits of its own for every position. Each of
  its four heads looks back at exactly one earlier position (RoPE kernels that peak at one distance, and at
  the position itself when that distance is before the beginning), permutes the bits found there and adds
  them to those of the position. The feed-forward part writes the parity of the five to the next layer's
  bits, by steps with flat plateaus, so noise below a step vanishes.
- Distances are radix-5 digits, so after five layers the bits are a hash of the whole context: changing any
  one earlier token changes what comes.
- The output reads these bits as a Huffman code. The one token whose code matches has the logit 0; another
  pays for each bit that differs, so the best is ahead by the price of a bit, at least 2. Words come as often
  as they do in the passage, punctuation too, and a sentence that ends may end the generation.
"""

from __future__ import annotations

import heapq
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from tests.models.llama_file import About, LlamaShape, write_llama
from tests.models.text import CHATML, PASSAGE
from tests.models.tokenizer import IM_END, WORDS, Vocabulary, learn_merges, vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Code = tuple[tuple[int, int], ...]
    """What a token's logit asks for: dimensions of the last hidden state, each with the sign wanted."""

LAYERS: Final = 5
HEADS: Final = 4
HEADS_KV: Final = 2
HEAD: Final = 32
EMBEDDING: Final = 128
BITS: Final = 20
RADIX: Final = HEADS + 1
ROPE_BASE: Final = 20.0

# Dimensions of the hidden state: BITS for each layer and for the last result, then flags of the token itself,
# then one constant. The constant is so large that it alone makes the RMS norm: bits stay +1 and -1.
ENDS_SENTENCE: Final = 120
FIRST_OF_THREE: Final = 121
FIRST_OF_TWO: Final = 122
CONSTANT: Final = 127
CONSTANT_SIZE: Final = 4096.0

# The parity of five bits changes where their sum crosses one of these, over a ramp of +-RAMP.
CROSSINGS: Final = (-4.0, -2.0, 0.0, 2.0, 4.0)
RAMP: Final = 0.25
# SiLU as a ramp: steep enough that it is flat at the odd sums, 0.75 away from the nearest kink.
STEEPNESS: Final = 16.0
FEED_FORWARD: Final = 224

SHARPNESS: Final = 1000.0
BIT_PRICE: Final = (1.0, 1.8)
FLAG_PRICE: Final = 10.0
UNLIKELY: Final = -40.0
NO_SINK: Final = -1e6
"""Score of an attention sink that takes nothing from the positions."""

ONE_LINE: Final = " " + " ".join(PASSAGE.split())
ROLES: Final = "system\nuser\nassistant\n"
FULL_STOP_SHARE: Final = 0.1
END_BITS: Final = 4

# Bytes of UTF-8 characters. Middle and last bytes are disjoint, so the token alone says what must follow.
LEADS_OF_THREE: Final = (b"\xf0\x9f", b"\xe4", b"\xe5", b"\xe6")
LEADS_OF_TWO: Final = (b"\xc3", b"\xc4")
MIDDLES: Final = tuple(bytes([byte]) for byte in range(0x98, 0xA0))
LASTS: Final = tuple(bytes([byte]) for byte in range(0x80, 0x90))
EMOJI_MERGE: Final = (b"\xf0", b"\x9f")


def make_noise(
    path: Path,
    *,
    seed: int = 1,
    name: str = "Noise: random words, not a language model",
    chat_template: str | None = CHATML,
    context: int = 2048,
    stop_share: float | None = None,
    multibyte_share: float = 0.0,
    shards: int = 1,
    window: int = 0,
) -> list[Path]:
    """Write a noise model and return its files.

    `stop_share` is the share of tokens that end the generation; without it only a full stop can be followed
    by an end, on average after some hundred tokens. `multibyte_share` is the share of characters that take
    two or three tokens, all of them valid UTF-8 when complete. Both lie between 0 and 1. With a `window` the
    layers that never look further back attend to that many positions alone, which changes nothing they say.
    """
    rng = np.random.default_rng(seed)
    vocab = noise_vocabulary()
    codes = _codes(vocab, stop_share=stop_share, multibyte_share=multibyte_share)
    tensors = {
        "token_embd.weight": _embedding(rng, vocab),
        **{key: tensor for layer in range(LAYERS) for key, tensor in _layer(rng, layer, context).items()},
        "output_norm.weight": _norm(),
        "output.weight": _output(rng, len(vocab), codes),
    }
    if window:
        sinks = np.full(HEADS, NO_SINK, np.float32)
        tensors |= {f"blk.{layer}.attn_sinks.weight": sinks for layer in range(LAYERS)}
    sliding = sum(HEADS * RADIX**layer < window for layer in range(LAYERS))
    sizes = (LAYERS, EMBEDDING, FEED_FORWARD, HEADS, HEADS_KV, HEAD, context, ROPE_BASE)
    shape = LlamaShape(*sizes, window=window, sliding_layers=sliding)
    description = f"Hashes its context into random English words (seed {seed}). Made for tests."
    return write_llama(path, shape, vocab, tensors, About(name, description, chat_template), shards=shards)


@cache
def noise_vocabulary() -> Vocabulary:
    """The vocabulary of all noise models: every word of the passage is one token."""
    return vocabulary([*learn_merges(f"{ONE_LINE}\n{ROLES}"), EMOJI_MERGE])


def _bit(layer: int, bit: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
    return layer * BITS + bit


def huffman(shares: dict[int, float], first_bit: int) -> dict[int, Code]:
    """Give every token a prefix code over the dimensions from `first_bit` on; all bits used, none left over.

    Raises ValueError when a code would be longer than there are bits.
    """
    heap = [(share, index, [token]) for index, (token, share) in enumerate(sorted(shares.items()))]
    heapq.heapify(heap)
    signs: dict[int, list[int]] = {token: [] for token in shares}
    while len(heap) > 1:
        low, high = heapq.heappop(heap), heapq.heappop(heap)
        for sign, (_, _, tokens) in ((-1, low), (1, high)):
            for token in tokens:
                signs[token].append(sign)
        heapq.heappush(heap, (low[0] + high[0], low[1], low[2] + high[2]))
    longest = max(map(len, signs.values()))
    if longest > BITS:
        message = f"a Huffman code needs {longest} bits, there are {BITS}: make the rarest token likelier"
        raise ValueError(message)
    return {
        token: tuple((first_bit + depth, sign) for depth, sign in enumerate(reversed(path)))
        for token, path in signs.items()
    }


def _codes(vocab: Vocabulary, *, stop_share: float | None, multibyte_share: float) -> dict[int, Code]:
    """The codes of all tokens that are ever likely."""
    first_bit = LAYERS * BITS
    end = vocab.special(IM_END)
    shares = _word_shares(vocab)
    rest = 1.0 - multibyte_share - (stop_share or 0.0)
    shares = {token: share * rest for token, share in shares.items()}
    if stop_share is not None:
        shares[end] = stop_share
    if multibyte_share:
        leads = [*LEADS_OF_THREE, *LEADS_OF_TWO]
        shares |= {vocab.id_of(lead): multibyte_share / len(leads) for lead in leads}

    codes = huffman(shares, first_bit)
    if stop_share is None:
        codes = _end_after_full_stop(codes, end)
    if multibyte_share:
        middles = huffman(dict.fromkeys(map(vocab.id_of, MIDDLES), 1.0), first_bit)
        lasts = huffman(dict.fromkeys(map(vocab.id_of, LASTS), 1.0), first_bit)
        codes = {
            **_behind(((FIRST_OF_THREE, -1), (FIRST_OF_TWO, -1)), codes),
            **_behind(((FIRST_OF_THREE, 1), (FIRST_OF_TWO, -1)), middles),
            **_behind(((FIRST_OF_THREE, -1), (FIRST_OF_TWO, 1)), lasts),
        }
    return codes


def _end_after_full_stop(codes: dict[int, Code], end: int) -> dict[int, Code]:
    """Let the end take the place of all tokens under one node of the tree, where a full stop precedes."""
    node = codes[max(codes, key=lambda token: len(codes[token]))][:END_BITS]
    under = {token: (*code, (ENDS_SENTENCE, -1)) for token, code in codes.items() if code[:END_BITS] == node}
    return {**codes, **under, end: (*node, (ENDS_SENTENCE, 1))}


def _behind(flags: Code, codes: dict[int, Code]) -> dict[int, Code]:
    return {token: (*flags, *code) for token, code in codes.items()}


def _word_shares(vocab: Vocabulary) -> dict[int, float]:
    """How often each word stands in the passage; full stops are more frequent, to make short sentences."""
    counts = Counter(WORDS.findall(ONE_LINE))
    others = counts.total() - counts["."]
    shares = {vocab.id_of(word): count / others * (1.0 - FULL_STOP_SHARE) for word, count in counts.items()}
    return shares | {vocab.id_of("."): FULL_STOP_SHARE}


def _embedding(rng: np.random.Generator, vocab: Vocabulary) -> Floats:
    table = np.zeros((len(vocab), EMBEDDING), np.float32)
    codes = rng.choice(1 << BITS, size=len(vocab), replace=False)
    table[:, :BITS] = np.where(codes[:, None] >> np.arange(BITS) & 1, 1.0, -1.0)
    flagged: dict[int, Iterable[bytes]] = {
        ENDS_SENTENCE: (b".",),
        FIRST_OF_THREE: LEADS_OF_THREE,
        FIRST_OF_TWO: (*LEADS_OF_TWO, *MIDDLES),
    }
    for flag, pieces in flagged.items():
        table[:, flag] = -1.0
        table[[vocab.id_of(piece) for piece in pieces], flag] = 1.0
    table[:, CONSTANT] = CONSTANT_SIZE
    return table


def _norm() -> Floats:
    """Scales the hidden state so that bits come out as +1 and -1, and the constant as 1."""
    weight = np.full(EMBEDDING, CONSTANT_SIZE / np.sqrt(EMBEDDING), np.float32)
    weight[CONSTANT] = 1.0 / np.sqrt(EMBEDDING)
    return weight


def _layer(rng: np.random.Generator, layer: int, context: int) -> dict[str, Floats]:
    """The tensors of one layer, (outputs, inputs) each."""
    query = np.zeros((HEADS * HEAD, EMBEDDING), np.float32)
    key = np.zeros((HEADS_KV * HEAD, EMBEDDING), np.float32)
    value = np.zeros((HEADS_KV * HEAD, EMBEDDING), np.float32)
    output = np.zeros((EMBEDDING, HEADS * HEAD), np.float32)
    bits = np.arange(BITS)
    for head in range(HEADS):
        distance = (head + 1) * RADIX**layer
        query[head * HEAD : (head + 1) * HEAD, CONSTANT] = look_back_query(distance, context)
        output[_bit(layer, bits), head * HEAD + rng.permutation(BITS)] = 1.0
    for head in range(HEADS_KV):
        key[head * HEAD : (head + 1) * HEAD : 2, CONSTANT] = np.sqrt(_frequency_weights())
        value[head * HEAD + bits, _bit(layer, rng.permutation(BITS))] = 1.0
    gate, up, down = parity_weights(layer)
    prefix = f"blk.{layer}."
    return {
        f"{prefix}attn_norm.weight": _norm(),
        f"{prefix}attn_q.weight": query,
        f"{prefix}attn_k.weight": key,
        f"{prefix}attn_v.weight": value,
        f"{prefix}attn_output.weight": output,
        f"{prefix}ffn_norm.weight": _norm(),
        f"{prefix}ffn_gate.weight": gate,
        f"{prefix}ffn_up.weight": up,
        f"{prefix}ffn_down.weight": down,
    }


def _frequencies() -> NDArray[np.float64]:
    """Radians per position of each RoPE pair."""
    return ROPE_BASE ** (-np.arange(HEAD // 2) / (HEAD // 2))


def _frequency_weights() -> NDArray[np.float64]:
    return _frequencies() / _frequencies().sum()


def look_back_scores(distance: int, context: int, self_share: float) -> NDArray[np.float64]:
    """Attention score, before the sharpness, of the position each number of steps back."""
    steps = np.arange(context)[:, None]
    waves = self_share * np.cos(steps * _frequencies())
    if distance < context:
        waves += np.cos((steps - distance) * _frequencies())
    return waves @ _frequency_weights()


def worst_gap(scores: NDArray[np.float64]) -> float:
    """The smallest lead of the best over the second best score, whatever the number of positions."""
    best = np.maximum.accumulate(scores)
    second = np.maximum.accumulate(np.minimum(scores[1:], best[:-1]))
    return float((best[1:] - second).min())


@cache
def self_share(distance: int, context: int) -> float:
    """The share of attention to the position itself for which no two positions are ever nearly as good."""
    if distance >= context:
        return 1.0

    def gap(share: float) -> float:
        scores = look_back_scores(distance, context, share)
        # Two peaks side by side may add up to one between them.
        return worst_gap(scores) if scores.argmax() == distance else 0.0

    return max(np.arange(0.1, 0.95, 0.02).tolist(), key=gap)


def look_back_query(distance: int, context: int) -> NDArray[np.float64]:
    """The constant query of a head, (HEAD,), that attends to one position: `distance` back, or itself."""
    share = self_share(distance, context)
    angles = distance * _frequencies()
    looks = float(distance < context)
    query = np.empty(HEAD)
    query[0::2] = looks * np.cos(angles) + share
    query[1::2] = looks * -np.sin(angles)
    return SHARPNESS * np.sqrt(HEAD) * np.repeat(np.sqrt(_frequency_weights()), 2) * query


def parity_weights(layer: int) -> tuple[Floats, Floats, Floats]:
    """Gate, up and down: the parity of the sums in this layer's bits becomes the next layer's bits."""
    gate = np.zeros((FEED_FORWARD, EMBEDDING), np.float32)
    up = np.zeros((FEED_FORWARD, EMBEDDING), np.float32)
    down = np.zeros((EMBEDDING, FEED_FORWARD), np.float32)
    up[:, CONSTANT] = 1.0
    neuron = 0
    for bit in range(BITS):
        for index, crossing in enumerate(CROSSINGS):
            rise = 1.0 if index % 2 == 0 else -1.0
            for kink, sign in ((crossing - RAMP, 1.0), (crossing + RAMP, -1.0)):
                gate[neuron, _bit(layer, bit)] = STEEPNESS
                gate[neuron, CONSTANT] = -STEEPNESS * kink
                down[_bit(layer + 1, bit), neuron] = rise * sign / (RAMP * STEEPNESS)
                neuron += 1
    gate[neuron, CONSTANT] = STEEPNESS
    down[(layer + 1) * BITS : (layer + 2) * BITS, neuron] = -1.0 / STEEPNESS
    return gate, up, down


def _output(rng: np.random.Generator, tokens: int, codes: dict[int, Code]) -> Floats:
    weight = np.zeros((tokens, EMBEDDING), np.float32)
    weight[:, CONSTANT] = UNLIKELY - rng.random(tokens)
    prices = rng.uniform(*BIT_PRICE, size=EMBEDDING)
    prices[[ENDS_SENTENCE, FIRST_OF_THREE, FIRST_OF_TWO]] = FLAG_PRICE
    for token, code in codes.items():
        weight[token, CONSTANT] = 0.0
        for dimension, sign in code:
            weight[token, dimension] = sign * prices[dimension]
            weight[token, CONSTANT] -= prices[dimension]
    return weight
