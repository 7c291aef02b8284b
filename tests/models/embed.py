"""Makes a small BERT with random weights, for embeddings: WordPiece tokens, mean or CLS pooling."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf import GGUFWriter, LlamaFileType, PoolingType, TokenType

from tests.models.text import PASSAGE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

LAYERS: Final = 2
HEADS: Final = 4
EMBEDDING: Final = 64
FEED_FORWARD: Final = 128
SEGMENTS: Final = 2
WORD_START: Final = "\u2581"
SPECIALS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_embedder(
    path: Path, *, seed: int = 1, pooling: PoolingType = PoolingType.MEAN, context: int = 512
) -> list[Path]:
    """Write an embedding model of EMBEDDING dimensions and return its file."""
    rng = np.random.default_rng(seed)
    tokens = wordpiece_tokens()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "bert")
    writer.add_name(f"Random embeddings, {pooling.name.lower()} pooling")
    writer.add_description(f"A BERT with random weights (seed {seed}). Made for tests.")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(context)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    add_wordpiece(writer, tokens)
    for name, tensor in _tensors(rng, len(tokens), context).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path]


def wordpiece_tokens() -> list[str]:
    """The words of the passage and all letters, as GGUF spells them: a mark begins a word, not its rest."""
    words = {"".join(filter(str.isalpha, word)).lower() for word in PASSAGE.split()}
    symbols = string.ascii_lowercase + string.digits + string.punctuation
    starts = [WORD_START + word for word in [*symbols, *sorted(words - {""} - set(symbols))]]
    return [*SPECIALS, *starts, *symbols]


def add_wordpiece(writer: GGUFWriter, tokens: list[str]) -> None:
    """Add a WordPiece tokenizer, whose first tokens are the SPECIALS, to a GGUF file."""
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    normal = len(tokens) - len(SPECIALS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIALS) + [TokenType.NORMAL] * normal)
    writer.add_token_type_count(SEGMENTS)
    writer.add_pad_token_id(SPECIALS.index("[PAD]"))
    writer.add_unk_token_id(SPECIALS.index("[UNK]"))
    writer.add_bos_token_id(SPECIALS.index("[CLS]"))
    writer.add_sep_token_id(SPECIALS.index("[SEP]"))
    writer.add_mask_token_id(SPECIALS.index("[MASK]"))


def _tensors(rng: np.random.Generator, tokens: int, context: int) -> dict[str, Floats]:
    def matrix(outputs: int, inputs: int, scale: float = 1.0) -> Floats:
        return rng.standard_normal((outputs, inputs), np.float32) * np.float32(scale / np.sqrt(inputs))

    def norm(name: str) -> dict[str, Floats]:
        return {
            f"{name}.weight": np.ones(EMBEDDING, np.float32),
            f"{name}.bias": np.zeros(EMBEDDING, np.float32),
        }

    tensors = {
        "token_embd.weight": matrix(tokens, EMBEDDING),
        "token_types.weight": matrix(SEGMENTS, EMBEDDING, 0.1),
        "position_embd.weight": matrix(context, EMBEDDING, 0.1),
        **norm("token_embd_norm"),
    }
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{prefix}{name}.weight"] = matrix(EMBEDDING, EMBEDDING)
            tensors[f"{prefix}{name}.bias"] = np.zeros(EMBEDDING, np.float32)
        tensors[f"{prefix}ffn_up.weight"] = matrix(FEED_FORWARD, EMBEDDING)
        tensors[f"{prefix}ffn_up.bias"] = np.zeros(FEED_FORWARD, np.float32)
        tensors[f"{prefix}ffn_down.weight"] = matrix(EMBEDDING, FEED_FORWARD)
        tensors[f"{prefix}ffn_down.bias"] = np.zeros(EMBEDDING, np.float32)
        tensors |= norm(f"{prefix}attn_output_norm") | norm(f"{prefix}layer_output_norm")
    return tensors
