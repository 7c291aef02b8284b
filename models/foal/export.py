"""Writes foal's parameters and tokenizer as GGUF files, and reads them back to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, LlamaFileType, dequantize

from tests.models.llama_file import About, LlamaShape, write_llama
from tests.models.tokenizer import BYTE_CHARACTERS, SPECIALS, Vocabulary

__all__ = ["SHAPE", "SPECIALS", "read_gguf", "write_gguf"]

SHAPE: Final = LlamaShape(
    layers=4, embedding=256, feed_forward=640, heads=8, heads_kv=4, head=32, context=1024
)
TEMPLATE: Final = Path(__file__).parent / "template.jinja"
FILES: Final = {"foal.gguf": LlamaFileType.MOSTLY_Q8_0, "foal-f16.gguf": LlamaFileType.MOSTLY_F16}
"""The first one is checked in; the other is there to compare."""

_BYTE_OF: Final = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def write_gguf(folder: Path, tokenizer_json: str, parameters: dict[str, Any]) -> dict[str, int]:
    """Write every file and return their sizes in bytes.

    Args:
        folder: Where to.
        tokenizer_json: What `tokenizers` writes of a byte-level BPE whose last tokens are SPECIALS.
        parameters: `token_embd` and `output_norm`, and under `blk` one array per tensor, layers first.
    """
    vocabulary = _vocabulary(tokenizer_json)
    tensors = {
        "token_embd.weight": parameters["token_embd"],
        "output_norm.weight": parameters["output_norm"],
    }
    for layer in range(SHAPE.layers):
        for name, stacked in parameters["blk"].items():
            tensors[f"blk.{layer}.{name}.weight"] = stacked[layer]
    description = "A small demo model that answers questions about Paddock, and nothing else."
    about = About("foal", description, TEMPLATE.read_text().strip())
    sizes: dict[str, int] = {}
    for name, file_type in FILES.items():
        (path,) = write_llama(folder / name, SHAPE, vocabulary, tensors, about, file_type=file_type)
        sizes[name] = path.stat().st_size
    return sizes


def read_gguf(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, Any]]:
    """Return the vocabulary but SPECIALS, the merges and the parameters of a file of `write_gguf`."""
    reader = GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.")}
    blocks = {
        name.removesuffix(".weight"): np.stack(
            [tensors[f"blk.{layer}.{name}"] for layer in range(SHAPE.layers)]
        )
        for name in sorted(names)
    }
    parameters = {
        "token_embd": tensors["token_embd.weight"],
        "output_norm": tensors["output_norm.weight"],
        "blk": blocks,
    }
    vocabulary = {token: index for index, token in enumerate(tokens) if token not in SPECIALS}
    return vocabulary, merges, parameters


def _vocabulary(tokenizer_json: str) -> Vocabulary:
    state = json.loads(tokenizer_json)["model"]
    by_id = sorted(state["vocab"].items(), key=lambda item: item[1])
    pieces = tuple(_bytes_of(token) for token, _ in by_id if token not in SPECIALS)
    merges = tuple((_bytes_of(left), _bytes_of(right)) for left, right in state["merges"])
    return Vocabulary(pieces, merges)


def _bytes_of(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)
