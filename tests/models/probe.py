"""Runs a model in the real library, with nothing of paddock in between.

`python -m tests.models.probe FILE` loads it and decodes one token, printing each stage it has passed: what a
wrong file does to a process is seen from outside.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import llama_cpp.llama_cpp as lib
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.models.wrong import Stage

    Floats = NDArray[np.float32]

# More threads than idle cores wait for each other in spin locks: one is fastest for models this small.
THREADS: Final = 1


@dataclass(slots=True)
class Generation:
    """The tokens of a greedy generation, and how far the best logit was ahead of the second for each."""

    tokens: list[int] = field(default_factory=list[int])
    leads: list[float] = field(default_factory=list[float])


class ProbeError(Exception):
    """The library refused: it returned NULL for a model or a context, or a code for a decode."""


def stages(path: Path) -> Generator[Stage]:
    """Load a file and decode one token; yield each stage passed. Raises ProbeError at one refused."""
    probe = Probe(path)
    yield "load"
    yield from probe.first_token()
    probe.close()


class Probe:
    """A loaded model."""

    def __init__(self, path: Path) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        if model is None:
            message = f"no model from {path.name}"
            raise ProbeError(message)
        self._model = model
        vocab = lib.llama_model_get_vocab(model)
        if vocab is None:
            message = f"no vocabulary in {path.name}"
            raise ProbeError(message)
        self._vocab = vocab

    def close(self) -> None:
        """Free the model."""
        lib.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with what the model adds around it; `special` reads `<|im_end|>` as one token."""
        data = text.encode()
        room = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(self._vocab, data, len(data), room, len(room), True, special)
        return list(room[:count])

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the tokens, special ones left out."""
        buffer = ctypes.create_string_buffer(256)
        pieces = bytearray()
        for token in tokens:
            length = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            pieces += buffer.raw[:length]
        return bytes(pieces)

    def ends(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def chat_template(self) -> str | None:
        """The chat template in the file."""
        template = lib.llama_model_chat_template(self._model, None)
        return None if template is None else template.decode()

    def greedy(self, prompts: Sequence[Sequence[int]], count: int, *, chunk: int = 512) -> list[Generation]:
        """Generate `count` tokens for all prompts together, `chunk` prompt tokens of each in a step."""
        generations = [Generation() for _ in prompts]
        waiting = [list(prompt) for prompt in prompts]
        positions = [0] * len(prompts)
        cells = sum(len(prompt) + count for prompt in prompts)
        with self._context(cells, len(prompts)) as context, _batch(cells) as batch:
            while any(len(generation.tokens) < count for generation in generations):
                wanted: list[tuple[int, int]] = []
                batch.n_tokens = 0
                for sequence, generation in enumerate(generations):
                    if len(generation.tokens) == count:
                        continue
                    now, waiting[sequence] = waiting[sequence][:chunk], waiting[sequence][chunk:]
                    for token in now:
                        _add(batch, token, positions[sequence], sequence)
                        positions[sequence] += 1
                    if not waiting[sequence]:
                        batch.logits[batch.n_tokens - 1] = 1
                        wanted.append((sequence, batch.n_tokens - 1))
                _decode(context, batch)
                for sequence, row in wanted:
                    token, lead = self._best(context, row)
                    generations[sequence].tokens.append(token)
                    generations[sequence].leads.append(lead)
                    waiting[sequence] = [token]
        return generations

    def first_token(self) -> Generator[Stage]:
        """Make a context and decode one token."""
        with self._context(1, 1) as context, _batch(1) as batch:
            yield "context"
            batch.n_tokens = 0
            _add(batch, 0, 0, 0)
            batch.logits[0] = 1
            _decode(context, batch)
        yield "decode"

    def embed(self, text: str) -> Floats:
        """The pooled embedding of a text."""
        tokens = self.tokenize(text)
        with self._context(len(tokens), 1, embeddings=True) as context, _batch(len(tokens)) as batch:
            batch.n_tokens = 0
            for position, token in enumerate(tokens):
                _add(batch, token, position, 0)
            _decode(context, batch)
            values = lib.llama_get_embeddings_seq(context, 0)
            return np.ctypeslib.as_array(values, (lib.llama_model_n_embd(self._model),)).copy()

    def _best(self, context: lib.llama_context_p, row: int) -> tuple[int, float]:
        shape = (lib.llama_vocab_n_tokens(self._vocab),)
        logits: Floats = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), shape)
        second, best = np.argpartition(logits, -2)[-2:]
        return int(best), float(logits[best] - logits[second])

    @contextmanager
    def _context(
        self, cells: int, sequences: int, *, embeddings: bool = False
    ) -> Generator[lib.llama_context_p]:
        params = lib.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = cells
        params.n_seq_max = sequences
        params.kv_unified = True
        params.n_threads = THREADS
        params.n_threads_batch = THREADS
        params.embeddings = embeddings
        context = lib.llama_init_from_model(self._model, params)
        if context is None:
            message = "no context"
            raise ProbeError(message)
        try:
            yield context
        finally:
            lib.llama_free(context)


@contextmanager
def _batch(tokens: int) -> Generator[lib.llama_batch]:
    batch = lib.llama_batch_init(tokens, 0, 1)
    try:
        yield batch
    finally:
        lib.llama_batch_free(batch)


def _add(batch: lib.llama_batch, token: int, position: int, sequence: int) -> None:
    row = batch.n_tokens
    batch.token[row] = token
    batch.pos[row] = position
    batch.n_seq_id[row] = 1
    batch.seq_id[row][0] = sequence
    batch.logits[row] = 0
    batch.n_tokens = row + 1


def _decode(context: lib.llama_context_p, batch: lib.llama_batch) -> None:
    code = lib.llama_decode(context, batch)
    if code != 0:
        message = f"llama_decode returned {code}"
        raise ProbeError(message)


if __name__ == "__main__":
    from pathlib import Path

    for passed in stages(Path(sys.argv[1])):
        sys.stdout.write(f"{passed}\n")
        sys.stdout.flush()
