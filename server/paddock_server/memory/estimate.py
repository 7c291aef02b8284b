"""What a model takes in memory once it is loaded, part by part and device by device. Pure.

Weights, caches, states and output buffers are what llama.cpp allocates, to the byte; scratch memory is its
allocator run over a graph of the same shape. Only the process itself is a constant that was measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paddock_server.catalog import TENSOR_TYPES, TensorType, repacked_bytes
from paddock_server.memory.compute import BatchShape, compute_graph, work_bytes
from paddock_server.memory.graph import scratch_bytes
from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS, DEFAULT_CACHE_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paddock_server.memory.shape import LayerShape, Shape

RAM: Final = "RAM"
"""Name of the machine's own memory among the devices."""

CACHE_TYPES: Final[Mapping[str, TensorType]] = MappingProxyType(
    {name: TENSOR_TYPES[number] for name, number in CACHE_TYPE_NUMBERS.items()}
)
"""The types a cache may have, by llama-server's names."""

PROCESS_BYTES: Final = 30 * 1024 * 1024
"""A worker without a model: Python, its modules and the libraries of llama.cpp, as resident."""

GPU_PROCESS_BYTES: Final = 512 * 1024 * 1024
"""What a driver keeps on a device for a process that computes there."""

TOKEN_BYTES: Final = 160
"""What llama.cpp keeps of one token of the vocabulary: its text twice, and its place in tables."""

MERGE_BYTES: Final = 145
"""What llama.cpp keeps of one merge of a tokenizer."""

CELL_BYTES: Final = 52
"""What llama.cpp notes down about one cell of a cache, beside its keys and values."""

SLOT_TOKEN_BYTES: Final = 12
"""What a slot keeps of every token while it samples."""

_FLOAT: Final = 4
_CELL_STEP: Final = 256
_MICRO_BATCH: Final = 256
_MICRO_BATCH_OFFLOADED: Final = 512
_EMBED_TOKENS: Final = 2048
_EMBED_SEQUENCES: Final = 64


class PartKind(StrEnum):
    """What bytes are for."""

    WEIGHTS = "weights"
    REPACKED_WEIGHTS = "repacked_weights"
    KV_CACHE = "kv_cache"
    RECURRENT_STATE = "recurrent_state"
    COMPUTE = "compute"
    OUTPUT = "output"
    PROJECTOR = "projector"
    ADAPTERS = "adapters"
    PROCESS = "process"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The options of a load that decide about memory; fields as in `RuntimeOptions`, cache types by name."""

    context_size_tokens: int
    slot_count: int
    batch_size_tokens: int
    gpu_layer_count: int = -1
    cache_type_k: str = DEFAULT_CACHE_TYPE
    cache_type_v: str = DEFAULT_CACHE_TYPE
    keeps_whole_windows: bool = True
    """Whether a layer with a window keeps every cell, as the worker has llama.cpp do; else the window's."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What a model is loaded on.

    `gpus` are the devices llama.cpp offloads to, in its order; it shares layers out by `gpu_free_bytes`.
    `repacked_types` are the tensor types that the CPU keeps a reordered copy of.
    """

    gpus: tuple[str, ...] = ()
    gpu_free_bytes: tuple[int, ...] = ()
    repacked_types: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind on one device."""

    device: str
    kind: PartKind
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load takes. `rough` says in a sentence why it may be far off; empty where it is not."""

    parts: tuple[Part, ...]
    rough: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by device."""
        totals: Counter[str] = Counter()
        for part in self.parts:
            totals[part.device] += part.size_bytes
        return dict(totals)

    def of(self, kind: PartKind) -> int:
        """Bytes of a kind over all devices."""
        return sum(part.size_bytes for part in self.parts if part.kind is kind)


def estimate(shape: Shape, options: LoadOptions, placement: Placement | None = None) -> Estimate:
    """Return what a model takes with these options once it is loaded and has been used to the full.

    Raises:
        KeyError: a cache type is none of `CACHE_TYPES`.
    """
    run = _Run(shape, options, placement or Placement())
    sizes: Counter[tuple[str, PartKind]] = Counter()
    for device, kind, size in run.parts():
        sizes[device, kind] += size
    parts = [Part(device, kind, size) for (device, kind), size in sizes.items() if size]
    order = list(PartKind)
    devices = [RAM, *run.gpus]
    parts.sort(key=lambda part: (devices.index(part.device), order.index(part.kind)))
    return Estimate(tuple(parts), shape.rough)


@dataclass(frozen=True, slots=True)
class _Context:
    """One context of the worker. Counts in tokens; `pools` when it embeds."""

    cells: int
    window_cells: int
    micro_batch: int
    sequences: int
    outputs: int
    key: TensorType
    value: TensorType
    pools: bool = False


class _Run:
    """The parts of one estimate."""

    def __init__(self, shape: Shape, options: LoadOptions, placement: Placement) -> None:
        self._shape = shape
        self._options = options
        self._repacked = placement.repacked_types
        wanted = options.gpu_layer_count
        count = len(shape.layers)
        offloaded = (count + 1 if wanted < 0 else min(wanted, count + 1)) if placement.gpus else 0
        self.gpus = placement.gpus if offloaded else ()
        self._first = count + 1 - offloaded
        shares = list(accumulate(placement.gpu_free_bytes or (1,) * len(self.gpus)))
        self._splits = [share / shares[-1] for share in shares] if self.gpus else []
        self._offloaded = offloaded

    def parts(self) -> Iterator[tuple[str, PartKind, int]]:
        """Yield device, kind and bytes, in no order and as often as there is something."""
        shape = self._shape
        yield from self._weights()
        contexts = list(self._contexts())
        for context in contexts:
            yield from self._memory(context)
            yield from self._scratch(context)
            width = shape.vocabulary_size + (shape.embedding_width if context.pools else 0)
            yield RAM, PartKind.OUTPUT, context.outputs * width * _FLOAT
        first = self.gpus[0] if self.gpus else RAM
        yield first, PartKind.PROJECTOR, shape.projector_bytes
        yield first, PartKind.ADAPTERS, shape.adapter_bytes
        yield RAM, PartKind.PROCESS, self._process_bytes(contexts)
        for gpu in self.gpus:
            yield gpu, PartKind.PROCESS, GPU_PROCESS_BYTES

    def _device(self, layer: int) -> str:
        """Return where a layer is; that of the output comes behind the last."""
        if not self.gpus or layer < self._first:
            return RAM
        return self.gpus[bisect_right(self._splits, (layer - self._first) / self._offloaded)]

    def _weights(self) -> Iterator[tuple[str, PartKind, int]]:
        weights = self._shape.weights
        groups = [(RAM, weights.input)]
        groups += [(self._device(index), group) for index, group in enumerate(weights.layers)]
        head = self._device(len(self._shape.layers))
        groups.append((head, weights.output))
        for device, group in groups:
            yield device, PartKind.WEIGHTS, group.size_bytes
            if device == RAM:
                yield RAM, PartKind.REPACKED_WEIGHTS, repacked_bytes(group, self._repacked)
        # A table that serves as output too is read from the file once, unless the output is somewhere else.
        if not self._shape.has_memory:
            return
        if head != RAM:
            yield head, PartKind.WEIGHTS, weights.table.size_bytes
        else:
            yield RAM, PartKind.REPACKED_WEIGHTS, repacked_bytes(weights.table, self._repacked)

    def _contexts(self) -> Iterator[_Context]:
        options, shape = self._options, self._shape
        slots = options.slot_count
        batch = max(options.batch_size_tokens, slots)
        if shape.has_memory:
            context = max(options.context_size_tokens or shape.trained_context_tokens, slots)
            micro = min(batch, _MICRO_BATCH_OFFLOADED if self.gpus else _MICRO_BATCH)
            key, value = CACHE_TYPES[options.cache_type_k], CACHE_TYPES[options.cache_type_v]
            yield self._context(context, min(context, micro), slots, slots, key, value)
        if shape.embeds or not shape.has_memory:
            limit = min(shape.trained_context_tokens or _EMBED_TOKENS, max(_EMBED_TOKENS, batch))
            half = CACHE_TYPES[DEFAULT_CACHE_TYPE]
            yield self._context(limit, limit, _EMBED_SEQUENCES, limit, half, half, pools=True)

    def _context(
        self,
        tokens: int,
        micro_batch: int,
        sequences: int,
        outputs: int,
        key: TensorType,
        value: TensorType,
        *,
        pools: bool = False,
    ) -> _Context:
        cells = padded(tokens)
        window = cells
        if not self._options.keeps_whole_windows:
            window = padded(min(cells, self._shape.window_tokens * sequences + micro_batch))
        return _Context(cells, window, micro_batch, sequences, outputs, key, value, pools)

    def _memory(self, context: _Context) -> Iterator[tuple[str, PartKind, int]]:
        for index, layer in enumerate(self._shape.layers):
            device = self._device(index)
            cells = context.window_cells if layer.is_windowed else context.cells
            yield device, PartKind.KV_CACHE, cell_bytes(layer, context.key, context.value) * cells
            state = layer.state_width * context.sequences * _FLOAT
            yield device, PartKind.RECURRENT_STATE, state

    def _scratch(self, context: _Context) -> Iterator[tuple[str, PartKind, int]]:
        shape, sequences = self._shape, context.sequences
        # llama.cpp reserves for a batch that all sequences share alike.
        tokens = -(-context.micro_batch // sequences) * sequences
        batch = BatchShape(
            tokens=tokens,
            sequences=sequences,
            outputs=min(tokens, context.outputs),
            cells=context.cells,
            window_cells=context.window_cells,
            rotates_keys=context.key.block_elements > 1,
            rotates_values=context.value.block_elements > 1,
            pools=context.pools,
        )
        size = scratch_bytes(compute_graph(shape, batch))
        computing = {self._device(index) for index in range(len(shape.layers) + 1)} or {RAM}
        for device in computing:
            yield device, PartKind.COMPUTE, size
        if RAM in computing:
            yield RAM, PartKind.COMPUTE, work_bytes(shape, context.micro_batch)
        else:
            # The host looks the embeddings up, and keeps the masks to send them over.
            masks = tokens * context.cells * 2
            yield RAM, PartKind.COMPUTE, 2 * tokens * shape.embedding_width * _FLOAT + masks

    def _process_bytes(self, contexts: list[_Context]) -> int:
        shape = self._shape
        cells = sum(context.cells for context in contexts if shape.has_memory)
        slots = self._options.slot_count if shape.has_memory else 0
        return (
            PROCESS_BYTES
            + shape.vocabulary_size * (TOKEN_BYTES + slots * SLOT_TOKEN_BYTES)
            + shape.merge_count * MERGE_BYTES
            + cells * CELL_BYTES
        )


def padded(cells: int) -> int:
    """Return the cells llama.cpp makes of a context size."""
    return -(-cells // _CELL_STEP) * _CELL_STEP


def cell_bytes(layer: LayerShape, key: TensorType, value: TensorType) -> int:
    """Return the bytes one cell of the cache takes in a layer."""
    rows = ((layer.key_width, key), (layer.value_width, value))
    return sum(-(-width // kind.block_elements) * kind.block_bytes for width, kind in rows)
