"""How the bytes of a model's tensors are spread over its layers, in few enough objects to keep for every
model of a directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from paddock_server.catalog.gguf import TensorInfo

MAX_LAYERS: Final = 512
"""llama.cpp reads no model with more; a tensor that claims a higher layer counts as one of the output."""

_LAYER: Final = re.compile(r"blk\.(\d{1,3})\.(.+)")
_INPUT_NAMES: Final = frozenset(
    {"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"}
)
_TABLE: Final = "token_embd.weight"
_HEAD: Final = "output.weight"
_REPACKED_ROWS: Final = 8
"""ggml's CPU code packs matrices together eight rows at a time, and leaves those it cannot divide."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The tensors of one layer, or of the input or output of a model.

    `size_bytes` is that of all of them. `matrix_bytes` has, by tensor type, the bytes of matrices that a
    matrix product uses and whose number of rows is a multiple of eight: those that a CPU may keep in another
    order. `widths` has the outputs of the matrices that decide how large results are, by name.
    """

    size_bytes: int = 0
    matrix_bytes: tuple[tuple[str, int], ...] = ()
    widths: tuple[tuple[str, int], ...] = ()

    def width(self, name: str) -> int:
        """Outputs of the matrix of that name in elements; 0 when the layer has none."""
        return dict(self.widths).get(name, 0)


_NOTHING: Final = TensorGroup()


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model by where they are used.

    `table` is the token embedding when there is no output matrix of its own: it then serves as one too, and a
    device that computes the output gets a copy of it. `output_rows` counts the tokens that the output has a
    logit for.
    """

    input: TensorGroup = _NOTHING
    layers: tuple[TensorGroup, ...] = ()
    output: TensorGroup = _NOTHING
    table: TensorGroup = _NOTHING
    output_rows: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return self.input.size_bytes + self.output.size_bytes + sum(layer.size_bytes for layer in self.layers)


def model_weights(tensors: Iterable[TensorInfo]) -> Weights:
    """Spread tensors over the layers they belong to."""
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    layers: dict[int, list[TensorInfo]] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match is not None and int(match[1]) < MAX_LAYERS:
            layers.setdefault(int(match[1]), []).append(tensor)
        elif tensor.name in _INPUT_NAMES:
            inputs.append(tensor)
        else:
            outputs.append(tensor)
    # Most layers of a model are alike: equal ones are one object.
    shared: dict[TensorGroup, TensorGroup] = {}
    groups = [_group(layers.get(number, ())) for number in range(max(layers, default=-1) + 1)]
    table = [tensor for tensor in inputs if tensor.name == _TABLE]
    head = [tensor for tensor in outputs if tensor.name == _HEAD]
    rows = [tensor.dims[1] for tensor in (*head, *table) if len(tensor.dims) > 1]
    return Weights(
        input=_group(inputs),
        layers=tuple(shared.setdefault(group, group) for group in groups),
        output=_group(outputs),
        table=_NOTHING if head else _group(table, are_products=True),
        output_rows=rows[0] if rows else 0,
    )


def merged_weights(shards: Sequence[Weights]) -> Weights:
    """The weights of a set of shards together."""
    if len(shards) == 1:
        return shards[0]
    count = max(len(shard.layers) for shard in shards)
    layers = tuple(
        _merged([shard.layers[number] for shard in shards if number < len(shard.layers)])
        for number in range(count)
    )
    output = _merged([shard.output for shard in shards])
    return Weights(
        input=_merged([shard.input for shard in shards]),
        layers=layers,
        output=output,
        table=_NOTHING if output.width("output") else _merged([shard.table for shard in shards]),
        output_rows=max(shard.output_rows for shard in shards),
    )


def _group(tensors: Iterable[TensorInfo], *, are_products: bool = False) -> TensorGroup:
    size = 0
    matrices: Counter[str] = Counter()
    widths: dict[str, int] = {}
    for tensor in tensors:
        size += tensor.size_bytes
        if len(tensor.dims) < 2 or not tensor.name.endswith(".weight"):
            continue
        name = tensor.name.removesuffix(".weight").rpartition(".")[2]
        widths[name] = tensor.dims[1]
        if tensor.dims[1] % _REPACKED_ROWS == 0 and (are_products or tensor.name not in _INPUT_NAMES):
            matrices[tensor.type] += tensor.size_bytes
    return TensorGroup(size, tuple(sorted(matrices.items())), tuple(sorted(widths.items())))


def _merged(groups: Sequence[TensorGroup]) -> TensorGroup:
    matrices: Counter[str] = Counter()
    widths: dict[str, int] = {}
    for group in groups:
        matrices.update(dict(group.matrix_bytes))
        widths.update(group.widths)
    size = sum(group.size_bytes for group in groups)
    return TensorGroup(size, tuple(sorted(matrices.items())), tuple(sorted(widths.items())))


def repacked_bytes(group: TensorGroup, types: Iterable[str]) -> int:
    """Bytes of a group that a CPU keeps a reordered copy of; `types` are the tensor types it reorders."""
    sizes: Mapping[str, int] = dict(group.matrix_bytes)
    return sum(sizes.get(name, 0) for name in types)
