"""Trains foal on the CPU and writes its GGUF files.

    python -m venv /tmp/foal && /tmp/foal/bin/pip install -r models/foal/requirements.txt
    /tmp/foal/bin/python models/foal/train.py

A llama: RMS norm, grouped-query attention with rotary positions, SwiGLU, the output matrix tied to the
embedding. Only what the assistant says counts fully in the loss; questions count a little, so that the model
learns how they are written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Final

CORES: Final = 2
"""Batches are split over so many devices, each a core: one device computes a small model on one core only."""

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={CORES}")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.foal import corpus  # noqa: E402
from models.foal.export import SHAPE, SPECIALS, read_gguf, write_gguf  # noqa: E402

VOCABULARY: Final = 2048
QUESTION_WEIGHT: Final = 0.15
TOOL_SHARE: Final = 0.04
TOOL_ROUNDS: Final = 3
ECHO_SHARE: Final = 0.08
CUT_SHARE: Final = 0.5
CUT_TOKENS: Final = (8, 24)
"""So many conversations are cut so far into their answer: which answer it is shows in its first words, and
the time goes into more questions."""

SLIP_SHARE: Final = 0.01
"""Tokens of questions that training replaces by any other, so that no single word decides."""

FRESH_SHARE: Final = 0.6
"""Conversations that begin a new text; the others go on in the one before, as in a long chat."""

PHASES: Final = ((0.9, 320, 4), (0.1, 1024, 2))
"""Share of the time, tokens of a sequence, sequences of a batch."""

PEAK_RATE: Final = 2e-3
GO_ON_RATE: Final = 3e-4
"""Of a training that goes on from parameters."""

Parameters = dict[str, Any]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Learn a byte-level BPE."""
    tokenizer = split_as_llama_cpp(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def split_as_llama_cpp(model: models.BPE) -> Tokenizer:
    """Return a tokenizer that splits as llama.cpp's pre-tokenizer "smollm" does."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Sampler:
    """Makes batches: token ids and the weight of each as a target."""

    def __init__(self, blocks: dict[str, corpus.Block], tokenizer: Tokenizer, seed: int) -> None:
        self._blocks = blocks
        self._list = list(blocks.values())
        self._order: list[corpus.Block] = []
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._bos = tokenizer.token_to_id(SPECIALS[0])
        self._words = tokenizer.get_vocab_size() - len(SPECIALS)

    def batch(self, sequences: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (sequences, length + 1) token ids and weights."""
        rows = [self._row(length + 1) for _ in range(sequences)]
        return np.array([row[0] for row in rows], np.int32), np.array([row[1] for row in rows], np.float32)

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        fresh = True
        while len(ids) < length:
            if fresh:
                ids.append(self._bos)
                weights.append(0.0)
            messages = self._conversation()
            calls = any(message.role == "tool" for message in messages)
            cut = self._rng.randint(*CUT_TOKENS) if not calls and self._rng.random() < CUT_SHARE else None
            for message in messages[:-1]:
                self._append(message, ids, weights, slips=not calls)
            self._append(messages[-1], ids, weights, cut=cut)
            fresh = cut is not None or self._rng.random() < FRESH_SHARE
        return ids[:length], weights[:length]

    def _conversation(self) -> list[corpus.Message]:
        if self._rng.random() < TOOL_SHARE:
            city = corpus.some_city(self._rng)
            return corpus.tool_conversation(self._rng, city, rounds=self._rng.randint(1, TOOL_ROUNDS))
        if self._rng.random() < ECHO_SHARE:
            return corpus.echo_conversation(self._rng)
        if not self._order:
            self._order = self._list.copy()
            self._rng.shuffle(self._order)
        messages = corpus.training_conversation(self._blocks, self._order.pop(), self._rng)
        if messages[0].role != "system" and self._rng.random() < 0.03:
            messages.insert(0, corpus.tools_message((corpus.WEATHER, corpus.CALCULATOR)))
        return messages

    def _append(
        self,
        message: corpus.Message,
        ids: list[int],
        weights: list[float],
        *,
        slips: bool = False,
        cut: int | None = None,
    ) -> None:
        """Add a turn: a question with slips, or, with `cut`, so many tokens of an answer."""
        said = message.role == "assistant"
        opening = self._tokenizer.encode(f"{corpus.IM_START}{message.role}\n").ids
        body = self._tokenizer.encode(f"{message.content}{corpus.IM_END}").ids
        if slips and message.role == "user":
            body = [self._slip(token) for token in body[:-1]] + body[-1:]
        ending = self._tokenizer.encode("\n").ids
        if cut is not None and cut < len(body):
            body, ending = body[:cut], []
        ids += opening + body + ending
        weight = 1.0 if said else QUESTION_WEIGHT if message.role == "user" else 0.0
        weights += [0.0] * len(opening) + [weight] * len(body) + [0.0] * len(ending)

    def _slip(self, token: int) -> int:
        return self._rng.randrange(self._words) if self._rng.random() < SLIP_SHARE else token


def initial(key: jax.Array, vocabulary: int) -> Parameters:
    """Return random parameters; matrices as (outputs, inputs), as the file has them."""
    shape = SHAPE
    query, keys = shape.heads * shape.head, shape.heads_kv * shape.head
    sizes = {
        "attn_q": (query, shape.embedding),
        "attn_k": (keys, shape.embedding),
        "attn_v": (keys, shape.embedding),
        "attn_output": (shape.embedding, query),
        "ffn_gate": (shape.feed_forward, shape.embedding),
        "ffn_up": (shape.feed_forward, shape.embedding),
        "ffn_down": (shape.embedding, shape.feed_forward),
    }
    keys_ = iter(jax.random.split(key, shape.layers * len(sizes) + 1))
    deep = 1 / math.sqrt(2 * shape.layers)
    layers = []
    for _ in range(shape.layers):
        layer = {"attn_norm": jnp.ones(shape.embedding), "ffn_norm": jnp.ones(shape.embedding)}
        for name, size in sizes.items():
            scale = (deep if name in ("attn_output", "ffn_down") else 1) / math.sqrt(size[1])
            layer[name] = jax.random.normal(next(keys_), size) * scale
        layers.append(layer)
    table = jax.random.normal(next(keys_), (vocabulary, shape.embedding)) * 0.02
    # All layers in one array each: the compiler then sees one layer, not all of them.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {"token_embd": table, "output_norm": jnp.ones(shape.embedding), "blk": stacked}


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Root mean square norm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate neighbouring pairs, as llama.cpp does for a llama. x: (batch, time, heads, head)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def logits_of(parameters: Parameters, tokens: jax.Array) -> jax.Array:
    """Return (batch, time, vocabulary) logits."""
    shape = SHAPE
    batch, time_ = tokens.shape
    steps = jnp.arange(time_)[:, None]
    angles = steps * shape.rope_base ** (-jnp.arange(0, shape.head, 2) / shape.head)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    mask = jnp.where(jnp.tril(jnp.ones((time_, time_), bool)), 0.0, -1e9)
    groups = shape.heads // shape.heads_kv

    def layer(x: jax.Array, weights: Parameters) -> tuple[jax.Array, None]:
        y = norm(x, weights["attn_norm"])
        query = (y @ weights["attn_q"].T).reshape(batch, time_, shape.heads, shape.head)
        key = (y @ weights["attn_k"].T).reshape(batch, time_, shape.heads_kv, shape.head)
        value = (y @ weights["attn_v"].T).reshape(batch, time_, shape.heads_kv, shape.head)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query = query.reshape(batch, time_, shape.heads_kv, groups, shape.head)
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key) / math.sqrt(shape.head) + mask
        mixed = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, -1), value)
        x = x + mixed.reshape(batch, time_, -1) @ weights["attn_output"].T
        y = norm(x, weights["ffn_norm"])
        gated = jax.nn.silu(y @ weights["ffn_gate"].T) * (y @ weights["ffn_up"].T)
        return x + gated @ weights["ffn_down"].T, None

    x, _ = jax.lax.scan(layer, parameters["token_embd"][tokens], parameters["blk"])
    return norm(x, parameters["output_norm"]) @ parameters["token_embd"].T


def loss_of(parameters: Parameters, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean cross entropy of the next tokens."""
    logits = logits_of(parameters, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def learning_rate(done: float, peak: float) -> float:
    """Return the rate when this share of the time is over: up quickly, down along a cosine."""
    if done < 0.03:
        return peak * done / 0.03
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.03) / 0.97))))


def train(
    sampler: Sampler, parameters: Parameters, minutes: float, peak: float
) -> tuple[Parameters, dict[str, Any]]:
    """Train for so many minutes, at most at rate `peak`; returns the parameters and what happened."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, b2=0.98, weight_decay=0.05),
    )
    state = optimizer.init(parameters)
    mesh = jax.make_mesh((jax.device_count(),), ("sequences",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("sequences"))
    parameters, state = jax.device_put((parameters, state), everywhere)

    @jax.jit
    def step(parameters: Parameters, state: Any, tokens: jax.Array, weights: jax.Array, rate: float) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(parameters, tokens, weights)
        state[1].hyperparams["learning_rate"] = rate
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    begin = time.monotonic()
    total = minutes * 60
    steps = seen = 0
    loss = math.nan
    said = begin
    boundary = 0.0
    for share, length, sequences in PHASES:
        boundary += share * total
        while (spent := time.monotonic() - begin) < boundary:
            tokens, weights = jax.device_put(sampler.batch(sequences, length), split)
            rate = learning_rate(spent / total, peak)
            parameters, state, loss_now = step(parameters, state, tokens, weights, rate)
            loss = float(loss_now)
            steps += 1
            seen += tokens.size
            if time.monotonic() - said > 15:
                said = time.monotonic()
                print(
                    f"{spent / 60:5.1f} min  step {steps}  loss {loss:.4f}  {seen / spent:.0f} tokens/s",
                    flush=True,
                )
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    parameters = jax.device_put(parameters, jax.devices()[0])
    return parameters, {"steps": steps, "tokens": seen, "minutes": minutes, "loss": loss, "parameters": count}


def perplexity(parameters: Parameters, blocks: dict[str, corpus.Block], tokenizer: Tokenizer) -> float:
    """Return the perplexity of the answers to held-out questions, a token."""
    bos = tokenizer.token_to_id(SPECIALS[0])
    score = jax.jit(lambda tokens, weights: loss_of(parameters, tokens, weights) * weights[:, 1:].sum())
    total = count = 0.0
    for block in blocks.values():
        for question in block.held_out:
            *before, answer = corpus.conversation(blocks, block, question)
            head = "".join(message.render() for message in before) + f"{corpus.IM_START}assistant\n"
            prompt = [bos, *tokenizer.encode(head).ids]
            body = tokenizer.encode(f"{answer.content}{corpus.IM_END}").ids
            size = 64 * math.ceil((len(prompt) + len(body)) / 64)
            padding = size - len(prompt) - len(body)
            tokens = np.array([prompt + body + [0] * padding])
            weights = np.array([[0.0] * len(prompt) + [1.0] * len(body) + [0.0] * padding])
            total += float(score(tokens, weights))
            count += len(body)
    return math.exp(total / count)


def main() -> None:
    """Train, write, and say how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=36)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "foal")
    parser.add_argument("--start", type=Path, help="go on from this GGUF file: the text has changed a little")
    arguments = parser.parse_args()
    blocks = corpus.read_blocks()
    print(f"{len(blocks)} blocks", flush=True)
    if arguments.start is None:
        tokenizer = train_tokenizer(corpus.all_text(blocks.values(), random.Random(arguments.seed)))
        parameters, peak = initial(jax.random.key(arguments.seed), tokenizer.get_vocab_size()), PEAK_RATE
    else:
        vocabulary, merges, arrays = read_gguf(arguments.start)
        parameters = jax.tree.map(jnp.asarray, arrays)
        tokenizer, peak = split_as_llama_cpp(models.BPE(vocabulary, merges)), GO_ON_RATE
        tokenizer.add_special_tokens(list(SPECIALS))
    sampler = Sampler(blocks, tokenizer, arguments.seed)
    parameters, report = train(sampler, parameters, arguments.minutes, peak)
    report["held_out_perplexity"] = perplexity(parameters, blocks, tokenizer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report["files"] = write_gguf(arguments.out, tokenizer.to_str(), jax.tree.map(np.asarray, parameters))
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
