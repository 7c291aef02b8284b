"""The compute graph of a model, as far as the sizes of its results go. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from paddock_server.memory.graph import Graph

if TYPE_CHECKING:
    from paddock_server.memory.shape import LayerShape, Shape

_FLOAT: Final = 4
_HALF: Final = 2
_INDEX: Final = 8
_ALIKE_LAYERS: Final = 6
"""Of layers that are alike, those beyond find the same holes."""

_ROTATED_HEADS: Final = 64
"""A quantised cache is rotated where the width of a head is a multiple of this."""

_QUANTISED_INPUT: Final = 292 / 256
"""Bytes per element of an input that is quantised for a product: at most those of Q8_K."""

_EXPERT_ROW: Final = 8

WITHOUT_FLASH_ATTENTION: Final = frozenset({"grok"})


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What one graph computes. `tokens` at once, of `sequences`, with `outputs` of them giving a result.

    `cells` and `window_cells` are those of the whole caches. The rotations are done for a quantised cache.
    `pools` says that sequences are pooled into one vector each instead of giving logits.
    """

    tokens: int
    sequences: int
    outputs: int
    cells: int = 0
    window_cells: int = 0
    rotates_keys: bool = False
    rotates_values: bool = False
    pools: bool = False


def compute_graph(shape: Shape, batch: BatchShape) -> Graph:
    """Return the graph of a batch."""
    return _Builder(shape, batch).build()


def work_bytes(shape: Shape, tokens: int) -> int:
    """Return what a CPU needs beside a graph's results: the inputs of its largest product, quantised.

    `tokens` are those computed at once.
    """
    largest = 0.0
    for layer in shape.layers:
        group = layer.weights
        width = max(layer.feed_forward_width, layer.query_width, shape.embedding_width, group.width("ssm_x"))
        largest = max(largest, width * tokens * _QUANTISED_INPUT)
        used = layer.experts_used
        if used and shape.experts:
            rows = used * tokens
            width = max(group.width("ffn_up_exps"), group.width("ffn_gate_up_exps") // 2)
            largest = max(largest, rows * (width * _QUANTISED_INPUT + shape.experts * _EXPERT_ROW))
    return int(largest)


class _Builder:
    def __init__(self, shape: Shape, batch: BatchShape) -> None:
        self._shape = shape
        self._batch = batch
        self._graph = Graph()
        self._tokens = batch.tokens
        self._flashes = shape.architecture not in WITHOUT_FLASH_ATTENTION
        self._wide = shape.embedding_width
        self._masks: dict[bool, int] = {}

    def build(self) -> Graph:
        """Put the whole graph together."""
        graph, batch, tokens = self._graph, self._batch, self._tokens
        graph.input(tokens * _FLOAT)
        # The place of embeddings that come instead of tokens: there in every graph, whichever comes.
        graph.input(self._row(self._wide))
        positions = graph.input(tokens * _FLOAT)
        rows = graph.input(batch.outputs * _FLOAT)
        self._add_masks()
        current = graph.make(self._row(self._wide), positions)
        if not self._shape.has_memory:
            table = graph.make(self._row(self._wide), positions)
            current = graph.make(self._row(self._wide), graph.over(table, current))
        layers = self._distinct_layers()
        for index, layer in enumerate(layers):
            current = self._layer(layer, current, rows if index == len(layers) - 1 else None)
        self._head(current)
        return graph

    def _add_masks(self) -> None:
        graph, batch, tokens = self._graph, self._batch, self._tokens
        element = _HALF if self._flashes else _FLOAT
        keeps = any(layer.key_width for layer in self._shape.layers)
        attends = any(layer.query_width for layer in self._shape.layers)
        slides = any(layer.is_windowed and layer.query_width for layer in self._shape.layers)
        if keeps:
            cells = {False: batch.cells} | ({True: batch.window_cells} if slides else {})
        else:
            cells = {False: tokens} | ({True: tokens} if slides else {}) if attends else {}
        heads = {layer.head_width for layer in self._shape.layers if layer.key_width}
        rotation = max((width & -width for width in heads), default=0)
        if rotation >= _ROTATED_HEADS:
            graph.input(rotation**2 * _FLOAT if batch.rotates_keys else 0)
            graph.input(_ROTATED_HEADS**2 * _FLOAT if batch.rotates_values else 0)
        for windowed, count in cells.items():
            graph.input(2 * tokens * _INDEX if keeps else 0)
            self._masks[windowed] = graph.input(tokens * count * element)

    def _distinct_layers(self) -> list[LayerShape]:
        layers: list[LayerShape] = []
        for _, run in groupby(self._shape.layers):
            layers += list(run)[:_ALIKE_LAYERS]
        return layers

    def _row(self, width: int) -> int:
        return self._tokens * width * _FLOAT

    def _layer(self, layer: LayerShape, current: int, rows: int | None) -> int:
        graph = self._graph
        before = current
        normed = graph.over(current) if self._shape.has_memory else current
        parts: list[int] = []
        if layer.state_width:
            parts.append(self._recurrence(layer, normed))
        if layer.query_width:
            parts.append(self._attention(layer, normed))
        if parts:
            mixed = graph.over(*parts) if len(parts) > 1 else parts[0]
            if rows is not None:
                self._tokens = self._batch.outputs
                mixed = graph.make(self._row(self._wide), mixed, rows)
                before = graph.make(self._row(self._wide), before, rows)
            current = self._normed(graph.over(mixed, before))
        if _has_feed_forward(layer):
            current = self._normed(graph.over(self._feed_forward(layer, current), current))
        return current

    def _normed(self, current: int) -> int:
        """Encoders normalise behind a sum, with an operation that needs memory of its own."""
        if self._shape.has_memory:
            return current
        return self._graph.make(self._row(self._wide), current)

    def _attention(self, layer: LayerShape, normed: int) -> int:
        graph, batch = self._graph, self._batch
        key, value = layer.key_width, layer.value_width
        heads_kv = layer.weights.width("attn_k") or layer.query_width
        # Turned by its position, a query does not take the place of the one before: it is a view of it.
        query = graph.make(self._row(layer.query_width), normed)
        if key:
            query = graph.make(self._row(layer.query_width), query)
        rotates = layer.head_width % _ROTATED_HEADS == 0
        if batch.rotates_keys and rotates:
            query = graph.make(self._row(layer.query_width), query)
        kept = [key, value] if key else [heads_kv, layer.weights.width("attn_v") or heads_kv]
        # A cache with windows stores keys first, one without values first.
        order = [0, 1] if True in self._masks or not key else [1, 0]
        sources: list[int] = []
        for which in order:
            part = graph.make(self._row(kept[which]), normed)
            if key and which == 0:
                part = graph.make(self._row(kept[which]), part)
            rotated = batch.rotates_values if which else batch.rotates_keys
            if key and rotated and rotates:
                part = graph.make(self._row(kept[which]), part)
            sources.append(part)
        if key:
            # Written into the cache, and from there on part of it.
            for part in sources:
                graph.make(0, part)
            sources = []
        elif self._flashes:
            sources = [graph.make(graph.nodes[part].size // 2, part) for part in sources]
        mask = self._masks[layer.is_windowed and True in self._masks]
        if self._flashes:
            found = graph.make(self._row(layer.attended_width), query, *sources, mask)
        else:
            cells = batch.cells if key else self._tokens
            scores = graph.over(graph.make(self._row(layer.heads * cells), query, *sources), mask)
            found = graph.make(
                self._row(layer.attended_width), graph.make(self._row(layer.attended_width), scores)
            )
        if key and batch.rotates_values and rotates:
            found = graph.make(self._row(layer.attended_width), found)
        return graph.make(self._row(self._wide), found)

    def _recurrence(self, layer: LayerShape, normed: int) -> int:
        graph, group, sequences = self._graph, layer.weights, self._batch.sequences
        inner = (group.width("ssm_x") and group.width("ssm_dt")) or group.width("ssm_in") // 2
        inner = inner or group.width("attn_qkv") or group.width("ssm_out") or 2 * self._wide
        both = graph.make(self._row(group.width("ssm_in") or 2 * inner), normed)
        past = graph.make(sequences * layer.convolution_width * _FLOAT)
        window = graph.make(self._row(inner) + sequences * layer.convolution_width * _FLOAT, past, both)
        graph.make(0, window)
        mixed = graph.over(graph.make(self._row(inner), window))
        small = graph.make(self._row(group.width("ssm_x")), mixed)
        steps = graph.make(self._row(inner), graph.make(self._row(group.width("ssm_x")), small))
        states = sequences * (layer.state_width - layer.convolution_width) * _FLOAT
        scanned = graph.make(self._row(inner) + states, mixed, steps, small)
        graph.make(0, scanned)
        added = graph.over(graph.make(self._row(inner), mixed), scanned)
        gate = graph.make(self._row(inner), both)
        gated = graph.make(self._row(inner), gate, added)
        return graph.make(self._row(self._wide), gated)

    def _feed_forward(self, layer: LayerShape, current: int) -> int:
        graph, group = self._graph, layer.weights
        normed = graph.over(current, current) if self._shape.has_memory else current
        up = group.width("ffn_up")
        experts = group.width("ffn_up_exps") or group.width("ffn_gate_up_exps") // 2
        parts: list[int] = []
        if experts and layer.experts_used:
            parts.append(self._experts(layer, normed, experts))
        shared = group.width("ffn_up_shexp")
        if shared:
            parts.append(self._gated(normed, shared))
        if up and group.width("ffn_gate"):
            parts.append(self._gated(normed, up))
        elif up:
            inner = graph.make(self._row(up), normed)
            if layer.feed_forward_width and up == 2 * layer.feed_forward_width:
                inner = graph.make(self._row(up // 2), inner)
            parts.append(graph.make(self._row(self._wide), graph.over(inner)))
        return graph.over(*parts) if len(parts) > 1 else parts[0]

    def _gated(self, normed: int, width: int) -> int:
        graph = self._graph
        gate = graph.make(self._row(width), normed)
        up = graph.make(self._row(width), normed)
        return graph.make(self._row(self._wide), graph.make(self._row(width), gate, up))

    def _experts(self, layer: LayerShape, normed: int, width: int) -> int:
        graph, used = self._graph, layer.experts_used
        chances = graph.over(graph.make(self._row(self._shape.experts), normed))
        chosen = graph.make(self._row(self._shape.experts), chances)
        shares = graph.make(self._row(used), chances, chosen)
        gate = graph.make(self._row(used * width), normed, chosen)
        up = graph.make(self._row(used * width), normed, chosen)
        inner = graph.make(self._row(used * width), gate, up)
        weighed = graph.over(graph.make(self._row(used * self._wide), inner, chosen), shares)
        total = graph.make(self._row(self._wide), weighed)
        for _ in range(used - 2):
            total = graph.over(total, weighed)
        return total

    def _head(self, current: int) -> None:
        graph, batch = self._graph, self._batch
        if self._shape.has_memory:
            # Also where nobody reads them: a model that can generate computes logits for embeddings too.
            current = graph.over(current)
            graph.output(batch.outputs * self._shape.vocabulary_size * _FLOAT, current)
        if not batch.pools:
            return
        pooled = batch.sequences * self._wide * _FLOAT
        if not self._shape.is_pooled_by_mean:
            graph.output(pooled, current)
            return
        shares = graph.input(batch.tokens * batch.sequences * _FLOAT)
        graph.output(pooled, graph.make(graph.nodes[current].size, current), shares)


def _has_feed_forward(layer: LayerShape) -> bool:
    return any(layer.weights.width(name) for name in ("ffn_up", "ffn_up_exps", "ffn_gate_up_exps"))
