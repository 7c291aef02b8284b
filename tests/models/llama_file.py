"""Writes a llama-architecture GGUF file: hyperparameters, tokenizer, tensors, in one file or in shards.

With a sliding window the architecture is granite_swa: a llama but for windows, and attention sinks per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.models.tokenizer import Vocabulary

    Tensors = Mapping[str, NDArray[np.float32]]

QUANTIZATION: Final = {
    LlamaFileType.ALL_F32: GGMLQuantizationType.F32,
    LlamaFileType.MOSTLY_F16: GGMLQuantizationType.F16,
    LlamaFileType.MOSTLY_Q8_0: GGMLQuantizationType.Q8_0,
    LlamaFileType.MOSTLY_Q4_0: GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a llama model, in elements; `head` is the width of one attention head."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    heads_kv: int
    head: int
    context: int
    rope_base: float = 10000.0
    window: int = 0
    """Positions a sliding layer attends to, its own among them; 0: no layer slides."""

    sliding_layers: int = 0
    """How many layers, from the first on, attend to the window alone."""

    @property
    def architecture(self) -> str:
        """The name of the architecture in GGUF."""
        return "granite_swa" if self.window else "llama"

    def write(self, writer: GGUFWriter) -> None:
        """Add the hyperparameters to a GGUF file."""
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.embedding)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.heads_kv)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(self.rope_base)
        writer.add_layer_norm_rms_eps(1e-5)
        if self.window:
            writer.add_sliding_window(self.window)
            writer.add_sliding_window_pattern([layer < self.sliding_layers for layer in range(self.layers)])
            writer.add_logit_scale(1.0)
            writer.add_array(f"{self.architecture}.deepstack_mapping", [-1] * self.layers)  # none


@dataclass(frozen=True, slots=True)
class About:
    """What a model says of itself."""

    name: str
    description: str
    chat_template: str | None


def write_llama(
    path: Path,
    shape: LlamaShape,
    vocabulary: Vocabulary,
    tensors: Tensors,
    about: About,
    *,
    file_type: LlamaFileType = LlamaFileType.ALL_F32,
    shards: int = 1,
) -> list[Path]:
    """Write the model and return its files.

    Tensors have the shape (outputs, inputs), as numpy has them; matrices are stored in `file_type`, vectors
    always in F32. With more than one shard, `path` gives only folder and stem of the names.
    """
    per_shard = ceil(len(tensors) / shards) if shards > 1 else 0
    writer = GGUFWriter(path, shape.architecture, split_max_tensors=per_shard)
    writer.add_name(about.name)
    writer.add_description(about.description)
    writer.add_file_type(file_type)
    writer.add_vocab_size(len(vocabulary))
    shape.write(writer)
    vocabulary.write(writer, about.chat_template)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or file_type is LlamaFileType.ALL_F32:
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
        else:
            quantization = QUANTIZATION[file_type]
            writer.add_tensor(name, quantize(tensor, quantization), raw_dtype=quantization)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.format_shard_names(path)
