"""Log probabilities of generated tokens. numpy, 12 MB, is imported with the first request that asks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from paddock.v1 import generation_pb2

if TYPE_CHECKING:
    from paddock_server.worker import llama


def prepare() -> None:
    """Import numpy now, in the caller's thread: in the engine's it would hold up every stream."""
    importlib.import_module("numpy")


def token_logprob(
    context: llama.Context, row: int, vocab: llama.Vocab, token: int, top_count: int
) -> generation_pb2.TokenLogprob:
    """Return the log probability of `token` under the model's own distribution, before any sampler.

    Args:
        context: Context whose last decode computed the row.
        row: Batch row the token was sampled from.
        vocab: Vocabulary of the model.
        token: The token picked.
        top_count: Most likely alternatives to list, most likely first.
    """
    numpy: Any = importlib.import_module("numpy")
    logits = numpy.ctypeslib.as_array(context.logits(row), shape=(vocab.size,)).astype(numpy.float64)
    highest = logits.max()
    logprobs = logits - (highest + numpy.log(numpy.exp(logits - highest).sum()))
    top_count = min(top_count, vocab.size)
    best: list[int] = []
    if top_count:
        unsorted: list[int] = numpy.argpartition(-logprobs, top_count - 1)[:top_count].tolist()
        best = sorted(unsorted, key=lambda other: (-float(logprobs[other]), other))
    return generation_pb2.TokenLogprob(
        token_id=token,
        token=vocab.piece(token, special=True),
        logprob=float(logprobs[token]),
        top=[
            generation_pb2.TokenLogprob(
                token_id=other, token=vocab.piece(other, special=True), logprob=float(logprobs[other])
            )
            for other in best
        ],
    )
