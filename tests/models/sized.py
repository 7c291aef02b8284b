"""Makes models of six kinds with random weights, large enough that what they take in memory can be measured.

They say nothing. Tens of megabytes each, so that they are made when a test asks for them and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf import GGUFWriter, LlamaFileType, PoolingType
from gguf.quants import quantize

from tests.models.bench import letter_vocabulary
from tests.models.embed import add_wordpiece, wordpiece_tokens
from tests.models.llama_file import QUANTIZATION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Keys = Callable[[GGUFWriter], None]

VOCABULARY: Final = 12_000
CONTEXT: Final = 32_768
WINDOW: Final = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a transformer, in elements; `experts` 0 is a dense one."""

    layers: int = 8
    embedding: int = 512
    feed_forward: int = 1536
    heads: int = 8
    heads_kv: int = 2
    head: int = 64
    experts: int = 0
    experts_used: int = 2


class _Noise:
    """Random matrices, shaped (outputs, inputs) or (experts, outputs, inputs)."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Floats:
        return self._rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))


def make_dense(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a llama with grouped queries: four heads share one of the keys and values."""
    sizes = Sizes()

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_dimension_count(sizes.head)

    return _write_decoder(path, "llama", sizes, keys, _transformer(sizes), file_type)


def make_narrow_heads(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a llama whose heads are narrower than the blocks of a quantised cache."""
    sizes = Sizes(layers=1, embedding=64, feed_forward=64, heads=4, heads_kv=4, head=16)

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_dimension_count(sizes.head)

    return _write_decoder(path, "llama", sizes, keys, _transformer(sizes), file_type)


def make_wide_heads(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a qwen3 whose heads are wider than its embedding divided by their number."""
    sizes = Sizes(head=128)

    def keys(writer: GGUFWriter) -> None:
        writer.add_key_length(sizes.head)
        writer.add_value_length(sizes.head)

    tensors = _transformer(sizes) | _query_key_norms(sizes)
    return _write_decoder(path, "qwen3", sizes, keys, tensors, file_type)


def make_windowed(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a gemma3, of whose layers five of six attend to a window alone."""
    sizes = Sizes(layers=12, head=128, embedding=384)

    def keys(writer: GGUFWriter) -> None:
        writer.add_key_length(sizes.head)
        writer.add_value_length(sizes.head)
        writer.add_sliding_window(WINDOW)

    ones = np.ones(sizes.embedding, np.float32)
    tensors = _transformer(sizes) | _query_key_norms(sizes)
    for layer in range(sizes.layers):
        tensors[f"blk.{layer}.post_attention_norm.weight"] = ones
        tensors[f"blk.{layer}.post_ffw_norm.weight"] = ones
    return _write_decoder(path, "gemma3", sizes, keys, tensors, file_type)


def make_experts(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a qwen3moe that uses two of eight experts for a token."""
    sizes = Sizes(layers=6, feed_forward=512, experts=8)

    def keys(writer: GGUFWriter) -> None:
        writer.add_key_length(sizes.head)
        writer.add_value_length(sizes.head)
        writer.add_expert_count(sizes.experts)
        writer.add_expert_used_count(sizes.experts_used)
        writer.add_expert_feed_forward_length(sizes.feed_forward)

    tensors = _transformer(sizes) | _query_key_norms(sizes)
    return _write_decoder(path, "qwen3moe", sizes, keys, tensors, file_type)


def make_recurrent(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a mamba, which has a state for every sequence and no keys and values."""
    layers, embedding, convolution, state, rank = 16, 512, 4, 16, 32
    inner = 2 * embedding
    noise = _Noise(5)
    ones = np.ones(embedding, np.float32)
    tensors: dict[str, Floats] = {
        "token_embd.weight": noise(VOCABULARY, embedding),
        "output_norm.weight": ones,
    }
    for layer in range(layers):
        prefix = f"blk.{layer}."
        tensors |= {
            f"{prefix}attn_norm.weight": ones,
            f"{prefix}ssm_in.weight": noise(2 * inner, embedding),
            f"{prefix}ssm_conv1d.weight": noise(inner, convolution),
            f"{prefix}ssm_conv1d.bias": np.zeros(inner, np.float32),
            f"{prefix}ssm_x.weight": noise(rank + 2 * state, inner),
            f"{prefix}ssm_dt.weight": noise(inner, rank),
            f"{prefix}ssm_dt.bias": np.zeros(inner, np.float32),
            f"{prefix}ssm_a": -np.ones((inner, state), np.float32),
            f"{prefix}ssm_d": np.ones(inner, np.float32),
            f"{prefix}ssm_out.weight": noise(embedding, inner),
        }

    def keys(writer: GGUFWriter) -> None:
        writer.add_ssm_conv_kernel(convolution)
        writer.add_ssm_inner_size(inner)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(rank)

    sizes = Sizes(layers=layers, embedding=embedding, feed_forward=0, heads=0, heads_kv=0)
    return _write_decoder(path, "mamba", sizes, keys, tensors, file_type)


def make_encoder(path: Path, file_type: LlamaFileType = LlamaFileType.MOSTLY_Q8_0) -> list[Path]:
    """Write a bert, which reads a text at once and keeps nothing of it."""
    layers, embedding, feed_forward, heads, context = 8, 512, 2048, 8, 512
    tokens = wordpiece_tokens()
    tokens += [f"\u2581{word}q" for word in map(str, range(VOCABULARY - len(tokens)))]
    noise = _Noise(6)

    def norm(name: str) -> dict[str, Floats]:
        ones, zeros = np.ones(embedding, np.float32), np.zeros(embedding, np.float32)
        return {f"{name}.weight": ones, f"{name}.bias": zeros}

    tensors: dict[str, Floats] = {
        "token_embd.weight": noise(VOCABULARY, embedding),
        "token_types.weight": noise(2, embedding),
        "position_embd.weight": noise(context, embedding),
        **norm("token_embd_norm"),
    }
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{prefix}{name}.weight"] = noise(embedding, embedding)
            tensors[f"{prefix}{name}.bias"] = np.zeros(embedding, np.float32)
        tensors[f"{prefix}ffn_up.weight"] = noise(feed_forward, embedding)
        tensors[f"{prefix}ffn_up.bias"] = np.zeros(feed_forward, np.float32)
        tensors[f"{prefix}ffn_down.weight"] = noise(embedding, feed_forward)
        tensors[f"{prefix}ffn_down.bias"] = np.zeros(embedding, np.float32)
        tensors |= norm(f"{prefix}attn_output_norm") | norm(f"{prefix}layer_output_norm")

    writer = _writer(path, "bert", VOCABULARY)
    writer.add_context_length(context)
    writer.add_embedding_length(embedding)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    add_wordpiece(writer, tokens)
    return _finish(writer, path, tensors, file_type)


SIZED: Final = {
    "dense": make_dense,
    "wide-heads": make_wide_heads,
    "windowed": make_windowed,
    "experts": make_experts,
    "recurrent": make_recurrent,
    "encoder": make_encoder,
}
"""The makers by name."""


def _transformer(sizes: Sizes) -> dict[str, Floats]:
    noise = _Noise(sizes.layers)
    ones = np.ones(sizes.embedding, np.float32)
    tensors: dict[str, Floats] = {
        "token_embd.weight": noise(VOCABULARY, sizes.embedding),
        "output_norm.weight": ones,
        "output.weight": noise(VOCABULARY, sizes.embedding),
    }
    for layer in range(sizes.layers):
        prefix = f"blk.{layer}."
        tensors |= {
            f"{prefix}attn_norm.weight": ones,
            f"{prefix}attn_q.weight": noise(sizes.heads * sizes.head, sizes.embedding),
            f"{prefix}attn_k.weight": noise(sizes.heads_kv * sizes.head, sizes.embedding),
            f"{prefix}attn_v.weight": noise(sizes.heads_kv * sizes.head, sizes.embedding),
            f"{prefix}attn_output.weight": noise(sizes.embedding, sizes.heads * sizes.head),
            f"{prefix}ffn_norm.weight": ones,
            **_feed_forward(noise, sizes, prefix),
        }
    return tensors


def _feed_forward(noise: _Noise, sizes: Sizes, prefix: str) -> dict[str, Floats]:
    many = (sizes.experts,) if sizes.experts else ()
    suffix = "_exps" if sizes.experts else ""
    tensors = {
        f"{prefix}ffn_gate{suffix}.weight": noise(*many, sizes.feed_forward, sizes.embedding),
        f"{prefix}ffn_up{suffix}.weight": noise(*many, sizes.feed_forward, sizes.embedding),
        f"{prefix}ffn_down{suffix}.weight": noise(*many, sizes.embedding, sizes.feed_forward),
    }
    if sizes.experts:
        tensors[f"{prefix}ffn_gate_inp.weight"] = noise(sizes.experts, sizes.embedding)
    return tensors


def _query_key_norms(sizes: Sizes) -> dict[str, Floats]:
    ones = np.ones(sizes.head, np.float32)
    names = ("attn_q_norm", "attn_k_norm")
    return {f"blk.{layer}.{name}.weight": ones for layer in range(sizes.layers) for name in names}


def _write_decoder(
    path: Path,
    architecture: str,
    sizes: Sizes,
    keys: Keys,
    tensors: Mapping[str, Floats],
    file_type: LlamaFileType,
) -> list[Path]:
    vocabulary = letter_vocabulary(VOCABULARY)
    writer = _writer(path, architecture, len(vocabulary))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.embedding)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    keys(writer)
    vocabulary.write(writer, None)
    return _finish(writer, path, tensors, file_type)


def _writer(path: Path, architecture: str, tokens: int) -> GGUFWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    writer.add_name(f"Random weights: {architecture}")
    writer.add_vocab_size(tokens)
    return writer


def _finish(
    writer: GGUFWriter, path: Path, tensors: Mapping[str, Floats], file_type: LlamaFileType
) -> list[Path]:
    writer.add_file_type(file_type)
    kind = QUANTIZATION[file_type]
    small = ("ssm_conv1d", "ssm_a", "ssm_d", "ffn_gate_inp", "token_types", "position_embd")
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or tensor.shape[-1] % 32 or any(part in name for part in small):
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path]
