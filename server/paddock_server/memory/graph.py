"""How large the scratch memory of a compute graph gets: ggml's allocator, run over sizes alone. Pure.

ggml lays the results of a graph out in one buffer before it computes: each gets the smallest hole it fits, is
written over its input where the operation allows, and leaves a hole behind its last use. What is left unused
depends on the order of all of them: no formula over the widths says it, the same steps over a graph of the
same shape do. The graphs follow llama-graph.cpp and models/*.cpp of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT: Final = 64
"""Bytes a result is rounded up to. ggml's is 32 on a CPU and 128 on CUDA; the difference does not show."""


@dataclass(frozen=True, slots=True)
class Node:
    """A result: its bytes, the results it reads, and whether it may take the place of one of them."""

    size: int
    sources: tuple[int, ...]
    in_place: bool
    is_input: bool
    is_output: bool


@dataclass(slots=True)
class Graph:
    """Results in the order in which they are computed. Methods return the number of the result."""

    nodes: list[Node] = field(default_factory=list[Node])

    def input(self, size: int) -> int:
        """Add an input of `size` bytes; inputs are laid out before everything else."""
        return self._add(Node(size, (), in_place=False, is_input=True, is_output=False))

    def make(self, size: int, *sources: int) -> int:
        """Add a result that needs memory of its own."""
        return self._add(Node(size, sources, in_place=False, is_input=False, is_output=False))

    def over(self, *sources: int) -> int:
        """Add a result as large as its first source, written over a source where no one else needs it."""
        size = self.nodes[sources[0]].size
        return self._add(Node(size, sources, in_place=True, is_input=False, is_output=False))

    def output(self, size: int, *sources: int) -> int:
        """Add a result that is kept to the end."""
        return self._add(Node(size, sources, in_place=False, is_input=False, is_output=True))

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1


class _Arena:
    """The free blocks of a buffer without end, by offset; the last one is what has never been used."""

    def __init__(self) -> None:
        self._holes: list[list[int]] = []
        self._end = 0
        self.peak = 0

    def take(self, size: int) -> int:
        """Return the offset of `size` bytes: the smallest hole they fit, else behind everything."""
        fitting = [hole for hole in self._holes if hole[1] >= size]
        if fitting:
            # Of equal holes ggml takes the last one.
            best = min(reversed(fitting), key=lambda hole: hole[1])
            offset = best[0]
            best[0] += size
            best[1] -= size
            if best[1] == 0:
                self._holes.remove(best)
            return offset
        offset = self._end
        self._end += size
        self.peak = max(self.peak, self._end)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free bytes, and join them with the free ones beside them."""
        self._holes.append([offset, size])
        self._holes.sort()
        joined: list[list[int]] = []
        for hole in self._holes:
            if joined and sum(joined[-1]) == hole[0]:
                joined[-1][1] += hole[1]
            else:
                joined.append(hole)
        if joined and sum(joined[-1]) == self._end:
            self._end = joined.pop()[0]
        self._holes = joined


def scratch_bytes(graph: Graph) -> int:
    """Return the bytes ggml's allocator needs for a graph."""
    arena = _Arena()
    nodes = graph.nodes
    readers = [0] * len(nodes)
    for node in nodes:
        for source in node.sources:
            readers[source] += 1
    place: dict[int, tuple[int, int]] = {}
    for number, node in enumerate(nodes):
        if node.is_input and node.size:
            place[number] = _taken(arena, node.size)
    for number, node in enumerate(nodes):
        if node.is_input:
            continue
        reused = _reusable(nodes, node, readers, place) if node.in_place else None
        if reused is not None:
            place[number] = place.pop(reused)
        elif node.size:
            place[number] = _taken(arena, node.size)
        for source in node.sources:
            readers[source] -= 1
            if readers[source] == 0 and source in place and not nodes[source].is_output:
                arena.give(*place.pop(source))
    return arena.peak


def _taken(arena: _Arena, size: int) -> tuple[int, int]:
    size = -(-size // ALIGNMENT) * ALIGNMENT
    return arena.take(size), size


def _reusable(
    nodes: Sequence[Node], node: Node, readers: Sequence[int], place: dict[int, tuple[int, int]]
) -> int | None:
    for source in node.sources:
        fits = nodes[source].size == node.size and not nodes[source].is_output
        if fits and readers[source] == 1 and source in place:
            return source
    return None
