"""Makes models that answer every prompt with one given text, for tests that need to know every token.

One layer whose attention and feed-forward part are zero, and an embedding that is one-hot, leave a Markov
chain: the next token depends on the last one alone. A token outside the script is followed by the first
piece, each piece by the next, the last one by the end of the generation. Any sampler gives the same, as long
as it does not rule the best token out: the others together have a probability below 1e-14.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from tests.models.llama_file import About, LlamaShape, write_llama
from tests.models.tokenizer import IM_END, SPECIALS, vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START: Final = "<|go|>"
HEAD: Final = 32
LEAD: Final = 40.0

# No text holds these two bytes, so prompts are tokenized byte by byte and never into pieces of the script.
UNUSED_MERGE: Final = (b"\xff", b"\xfe")

TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<|go|>' -}}{%- endif -%}"
)
"""ChatML that ends in a token no script holds."""


def make_scripted(
    path: Path,
    script: str | Sequence[bytes],
    *,
    name: str = "Scripted: one answer to everything",
    chat_template: str | None = TEMPLATE,
    context: int = 2048,
    repeat: bool = False,
) -> list[Path]:
    """Write a model that says `script` and stops, or says it again and again, and return its files.

    A text is cut into pieces of two characters or more; give the pieces to choose the cuts, for instance in
    the middle of a character. Pieces must differ from each other, as tokens do. A prompt whose last token is
    in the script starts behind it: chat prompts never do, others can only end in a piece of a single byte.
    Raises ValueError for an empty script and for a piece that comes twice.
    """
    pieces = distinct_pieces(script) if isinstance(script, str) else list(script)
    twice = sorted(piece for piece, count in Counter(pieces).items() if count > 1)
    if twice or not all(pieces) or not pieces:
        message = f"a script needs one piece or more, none empty and all different; these come twice: {twice}"
        raise ValueError(message)

    vocab = vocabulary([UNUSED_MERGE], pieces, (*SPECIALS, START))
    tokens = [vocab.id_of(piece) for piece in pieces]
    embedding = -(-(len(tokens) + 1) // HEAD) * HEAD
    start, end = 0, tokens[0] if repeat else vocab.special(IM_END)

    table = np.zeros((len(vocab), embedding), np.float32)
    table[:, start] = 1.0
    output = np.zeros((len(vocab), embedding), np.float32)
    output[tokens[0], start] = LEAD / np.sqrt(embedding)
    for place, (token, following) in enumerate(zip(tokens, [*tokens[1:], end], strict=True), start=1):
        table[token] = 0.0
        table[token, place] = 1.0
        output[following, place] = LEAD / np.sqrt(embedding)

    ones = np.ones(embedding, np.float32)
    to_head = np.zeros((HEAD, embedding), np.float32)
    tensors = {
        "token_embd.weight": table,
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": to_head,
        "blk.0.attn_k.weight": to_head,
        "blk.0.attn_v.weight": to_head,
        "blk.0.attn_output.weight": to_head.T,
        "blk.0.ffn_norm.weight": ones,
        "blk.0.ffn_gate.weight": to_head,
        "blk.0.ffn_up.weight": to_head,
        "blk.0.ffn_down.weight": to_head.T,
        "output_norm.weight": ones,
        "output.weight": output,
    }
    shape = LlamaShape(
        layers=1, embedding=embedding, feed_forward=HEAD, heads=1, heads_kv=1, head=HEAD, context=context
    )
    about = About(name, "Says one text, whatever the prompt. Made for tests.", chat_template)
    return write_llama(path, shape, vocab, tensors, about)


def distinct_pieces(text: str) -> list[bytes]:
    """Cut a text into pieces of two characters or more, no two of them the same."""
    pieces: dict[str, None] = {}
    begin = 0
    while begin < len(text):
        end = begin + 2
        while text[begin:end] in pieces and end < len(text):
            end += 1
        piece = text[begin:end]
        if pieces and (piece in pieces or len(piece) == 1):
            # The rest is too short to be new. Its predecessor was new when shorter, so it stays new longer.
            previous, _ = pieces.popitem()
            piece = previous + piece
        pieces[piece] = None
        begin = end
    return [piece.encode() for piece in pieces]
