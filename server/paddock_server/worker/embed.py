"""Embeddings, computed by the engine's thread between steps, in a context of their own."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.worker import llama
from paddock_server.worker.errors import Reason, WorkerError
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from paddock_server.worker.loading import LoadedModel

MOST_TEXTS: Final = 64
"""Texts of one request, and sequences of one batch."""

BATCH_TOKENS_BESIDE_GENERATIONS: Final = 256
"""Most tokens of a batch while others generate, unless one text has more: a text is never divided."""


@dataclass(slots=True)
class EmbedJob:
    """Texts to embed, as tokens, and the vectors there are so far."""

    call: int
    texts: list[array[int]]
    normalize: bool
    vectors: list[list[float]] = field(default_factory=list[list[float]])

    @property
    def done(self) -> bool:
        """Whether every text has its vector."""
        return len(self.vectors) == len(self.texts)

    def to_reply(self) -> worker_pb2.Reply:
        """Return the answer."""
        return worker_pb2.Reply(
            call=self.call,
            embed=model_manager_pb2.EmbedResponse(
                embeddings=[model_manager_pb2.Embedding(values=vector) for vector in self.vectors],
                usage=generation_pb2.Usage(prompt_tokens=sum(len(text) for text in self.texts)),
            ),
        )


def open_embedding_context(
    model: llama.Model, *, token_limit: int, thread_count: int
) -> llama.Context | None:
    """Return a context that pools each sequence into one vector; None when llama.cpp refused."""
    own_pooling = model.metadata(f"{model.metadata('general.architecture')}.pooling_type")
    return llama.Context.create(
        model,
        llama.ContextParams(
            context_size=token_limit,
            batch_size=token_limit,
            micro_batch_size=token_limit,  # a text is pooled within one micro-batch
            slot_count=MOST_TEXTS,
            thread_count=thread_count,
            embeddings=True,
            pooling=llama.POOLING_MEAN
            if own_pooling in {"", str(llama.POOLING_NONE)}
            else llama.POOLING_UNSPECIFIED,
        ),
    )


class Embedder:
    """Computes embedding jobs batch by batch, in a context made on first use unless the model only embeds."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._context: llama.Context | None = None
        self._batch: llama.Batch | None = None

    def advance(self, job: EmbedJob, *, beside_generations: bool) -> None:
        """Compute the next texts of a job, as many as fit one batch; a small one while others generate.

        Raises:
            WorkerError: There is no memory for the context, or the model ranks instead of embedding.
        """
        context = self._ensure_context()
        if self._batch is None:
            self._batch = llama.Batch(self._loaded.embed_limit)
        batch = self._batch
        batch.clear()
        start = len(job.vectors)
        room = min(batch.capacity, BATCH_TOKENS_BESIDE_GENERATIONS) if beside_generations else batch.capacity
        count = next_batch([len(text) for text in job.texts[start:]], room)
        for slot, text in enumerate(job.texts[start : start + count]):
            batch.add(slot, text, 0, output_last=True)
        batch.output_all()
        context.clear()
        if context.decode(batch) != llama.DECODE_OK:
            text = f"no cells for an embedding batch of {len(batch)} tokens"
            raise llama.LlamaError(text)
        dimensions = self._loaded.model.embedding_dimension_count
        for slot in range(count):
            vector = context.pooled_embedding(slot, dimensions)
            job.vectors.append(normalized(vector) if job.normalize else vector)

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def _ensure_context(self) -> llama.Context:
        context = self._loaded.embedding_context or self._context
        if context is None:
            context = self._context = open_embedding_context(
                self._loaded.model,
                token_limit=self._loaded.embed_limit,
                thread_count=self._loaded.thread_count,
            )
        if context is None:
            raise WorkerError(
                Reason.INSUFFICIENT_MEMORY, "There is no memory for the context that computes embeddings."
            )
        if context.pooling == llama.POOLING_RANK:
            raise WorkerError(Reason.NOT_IMPLEMENTED, "This model ranks texts; it has no embeddings.")
        return context


def next_batch(lengths: list[int], capacity: int) -> int:
    """Return how many of the next texts fit one batch; at least one. `lengths` and `capacity` in tokens."""
    room = capacity
    for count, length in enumerate(lengths[:MOST_TEXTS]):
        room -= length
        if room < 0:
            return max(count, 1)
    return min(len(lengths), MOST_TEXTS)


def normalized(vector: list[float]) -> list[float]:
    """Return the vector scaled to length 1; a zero vector stays."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else vector
