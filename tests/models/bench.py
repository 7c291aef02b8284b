"""Makes the model that speed is measured on: about 100 million random weights in Q8_0."""

from __future__ import annotations

import itertools
import string
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf import LlamaFileType

from tests.models.llama_file import About, LlamaShape, write_llama
from tests.models.text import CHATML
from tests.models.tokenizer import SPECIALS, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.models.tokenizer import Merge, Vocabulary

    Floats = NDArray[np.float32]

VOCABULARY: Final = 32_000
SHAPE: Final = LlamaShape(
    layers=12, embedding=768, feed_forward=2048, heads=12, heads_kv=4, head=64, context=8192
)
EMBEDDING_SCALE: Final = 0.1


def make_bench_model(path: Path, *, seed: int = 1) -> list[Path]:
    """Write the model and return its file (about 107 MB).

    What it says has no end: the end tokens have the logit 0, others reach well above it.
    """
    rng = np.random.default_rng(seed)
    vocab = letter_vocabulary(VOCABULARY)
    about = About("Bench: random weights", "For measuring speed; its text means nothing.", CHATML)
    tensors = _tensors(rng, vocab)
    return write_llama(path, SHAPE, vocab, tensors, about, file_type=LlamaFileType.MOSTLY_Q8_0)


def letter_vocabulary(size: int) -> Vocabulary:
    """All groups of two and three letters, then groups behind a space, until there are `size` tokens."""
    letters = [letter.encode() for letter in string.ascii_lowercase]
    pairs = [first + second for first, second in itertools.product(letters, letters)]
    merges: list[Merge] = [(pair[:1], pair[1:]) for pair in pairs]
    merges += [(pair, letter) for pair, letter in itertools.product(pairs, letters)]
    merges += [(b" ", letter) for letter in letters]
    merges += [(b" " + pair[:1], pair[1:]) for pair in pairs]
    merges += [(b" " + pair, letter) for pair, letter in itertools.product(pairs, letters)]
    return vocabulary(merges[: size - 256 - len(SPECIALS)])


def _tensors(rng: np.random.Generator, vocab: Vocabulary) -> dict[str, Floats]:
    def matrix(outputs: int, inputs: int) -> Floats:
        return rng.standard_normal((outputs, inputs), np.float32) / np.float32(np.sqrt(inputs))

    table = rng.standard_normal((len(vocab), SHAPE.embedding), np.float32) * np.float32(EMBEDDING_SCALE)
    # The output matrix is this one too: no row, no chance. What is left are tokens that are whole characters.
    table[:256] = 0.0
    table[len(vocab.pieces) :] = 0.0
    ones = np.ones(SHAPE.embedding, np.float32)
    tensors: dict[str, Floats] = {"token_embd.weight": table, "output_norm.weight": ones}
    query, keys = SHAPE.heads * SHAPE.head, SHAPE.heads_kv * SHAPE.head
    for layer in range(SHAPE.layers):
        prefix = f"blk.{layer}."
        tensors |= {
            f"{prefix}attn_norm.weight": ones,
            f"{prefix}attn_q.weight": matrix(query, SHAPE.embedding),
            f"{prefix}attn_k.weight": matrix(keys, SHAPE.embedding),
            f"{prefix}attn_v.weight": matrix(keys, SHAPE.embedding),
            f"{prefix}attn_output.weight": matrix(SHAPE.embedding, query),
            f"{prefix}ffn_norm.weight": ones,
            f"{prefix}ffn_gate.weight": matrix(SHAPE.feed_forward, SHAPE.embedding),
            f"{prefix}ffn_up.weight": matrix(SHAPE.feed_forward, SHAPE.embedding),
            f"{prefix}ffn_down.weight": matrix(SHAPE.embedding, SHAPE.feed_forward),
        }
    return tensors
