"""Bytes of a load: by part, by device, and what is chosen to fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import TensorGroup, Weights
from paddock_server.memory import (
    LEAST_CONTEXT_TOKENS,
    RAM,
    LayerShape,
    LoadOptions,
    PartKind,
    Placement,
    Shape,
    Verdict,
    chosen,
    estimate,
    verdict,
)
from paddock_server.memory.compute import work_bytes
from paddock_server.memory.graph import Graph, scratch_bytes
from paddock_server.rpc.estimates import PART_KINDS, VERDICTS

MATRICES = (("attn_k", 64), ("attn_v", 64), ("ffn_gate", 512), ("ffn_up", 512))
LAYER = LayerShape(
    weights=TensorGroup(1_000_000, (("Q4_0", 900_000),), MATRICES),
    key_width=64,
    value_width=32,
    query_width=256,
    attended_width=128,
    head_width=32,
    heads=8,
)
WEIGHTS = Weights(
    input=TensorGroup(500_000),
    layers=(LAYER.weights,) * 4,
    output=TensorGroup(2000),
    table=TensorGroup(500_000, (("Q4_0", 500_000),)),
    output_rows=1000,
)
SHAPE = Shape(
    "llama", (LAYER,) * 4, WEIGHTS, embedding_width=256, vocabulary_size=1000, trained_context_tokens=32_768
)
OPTIONS = LoadOptions(context_size_tokens=4096, slot_count=4, batch_size_tokens=512)
GPU = Placement(("CUDA0",), (1 << 30,))
TWO_GPUS = Placement(("CUDA0", "CUDA1"), (3 << 30, 1 << 30))


def bytes_of(kind: PartKind, device: str, options: LoadOptions = OPTIONS, placement: Placement = GPU) -> int:
    parts = estimate(SHAPE, options, placement).parts
    return sum(part.size_bytes for part in parts if part.kind is kind and part.device == device)


def test_the_cache_is_cells_by_layers_by_widths() -> None:
    assert estimate(SHAPE, OPTIONS).of(PartKind.KV_CACHE) == 4096 * 4 * (64 + 32) * 2


@pytest.mark.parametrize(
    ("key", "value", "cell"),
    [
        ("f32", "f16", 256 + 64),
        ("q8_0", "q8_0", 68 + 34),
        ("q4_0", "f16", 36 + 64),
        ("bf16", "q5_1", 128 + 24),
    ],
)
def test_the_cache_has_the_types_of_its_keys_and_values(key: str, value: str, cell: int) -> None:
    options = replace(OPTIONS, cache_type_k=key, cache_type_v=value)
    assert estimate(SHAPE, options).of(PartKind.KV_CACHE) == 4096 * 4 * cell


def test_cells_are_rounded_up() -> None:
    odd, even = replace(OPTIONS, context_size_tokens=4000), replace(OPTIONS, context_size_tokens=4096)
    assert estimate(SHAPE, odd).of(PartKind.KV_CACHE) == estimate(SHAPE, even).of(PartKind.KV_CACHE)


def test_layers_with_a_window_keep_the_window_of_every_sequence_and_a_batch() -> None:
    sliding = replace(LAYER, is_windowed=True)
    shape = replace(SHAPE, layers=(LAYER, sliding), window_tokens=300)
    narrow = replace(OPTIONS, keeps_whole_windows=False)
    cell = (64 + 32) * 2
    assert estimate(shape, OPTIONS).of(PartKind.KV_CACHE) == 2 * 4096 * cell
    # 300 * 4 + 256 cells, in steps of 256.
    assert estimate(shape, narrow).of(PartKind.KV_CACHE) == (4096 + 1536) * cell


def test_every_sequence_has_a_state_of_its_own() -> None:
    shape = replace(SHAPE, layers=(LayerShape(state_width=100, convolution_width=30),) * 2)
    assert estimate(shape, OPTIONS).of(PartKind.RECURRENT_STATE) == 2 * 4 * 100 * 4


def test_logits_are_kept_for_every_sequence() -> None:
    assert estimate(SHAPE, OPTIONS).of(PartKind.OUTPUT) == 4 * 1000 * 4


def test_files_beside_the_model_count() -> None:
    shape = replace(SHAPE, projector_bytes=7, adapter_bytes=5)
    found = estimate(shape, OPTIONS)
    assert (found.of(PartKind.PROJECTOR), found.of(PartKind.ADAPTERS)) == (7, 5)


def test_reordered_weights_are_copies_beside_the_file() -> None:
    placement = Placement(repacked_types=frozenset({"Q4_0"}))
    found = estimate(SHAPE, OPTIONS, placement)
    assert found.of(PartKind.WEIGHTS) == WEIGHTS.size_bytes
    assert found.of(PartKind.REPACKED_WEIGHTS) == 4 * 900_000 + 500_000


def test_the_input_stays_in_ram_and_a_shared_table_goes_to_the_output_too() -> None:
    assert bytes_of(PartKind.WEIGHTS, RAM) == 500_000
    assert bytes_of(PartKind.WEIGHTS, "CUDA0") == 4_000_000 + 2000 + 500_000
    assert bytes_of(PartKind.KV_CACHE, RAM) == 0


@pytest.mark.parametrize(("count", "layers"), [(0, 0), (1, 0), (2, 1), (4, 3), (5, 4), (99, 4), (-1, 4)])
def test_the_output_is_offloaded_first_and_then_layers_from_the_last(count: int, layers: int) -> None:
    options = replace(OPTIONS, gpu_layer_count=count)
    cache = 4096 * (64 + 32) * 2
    assert bytes_of(PartKind.KV_CACHE, "CUDA0", options) == layers * cache
    assert bytes_of(PartKind.KV_CACHE, RAM, options) == (4 - layers) * cache


def test_layers_are_shared_out_by_free_memory() -> None:
    cache = 4096 * (64 + 32) * 2
    assert bytes_of(PartKind.KV_CACHE, "CUDA0", placement=TWO_GPUS) == 4 * cache
    even = Placement(("CUDA0", "CUDA1"), (1, 1))
    assert bytes_of(PartKind.KV_CACHE, "CUDA0", placement=even) == 3 * cache
    assert bytes_of(PartKind.KV_CACHE, "CUDA1", placement=even) == cache


def test_a_result_lies_in_the_smallest_hole_or_over_its_source() -> None:
    graph = Graph()
    first = graph.input(640)
    second = graph.make(1280, first)
    third = graph.over(second)
    graph.make(640, third)
    # The input is free once `second` is there; `third` lies over it, and the last fits the hole.
    assert scratch_bytes(graph) == 640 + 1280


def test_a_result_that_is_read_twice_is_not_written_over() -> None:
    graph = Graph()
    first = graph.make(640)
    graph.over(graph.over(first), first)
    assert scratch_bytes(graph) == 2 * 640


def test_larger_batches_and_contexts_take_more_scratch_memory() -> None:
    small = estimate(SHAPE, OPTIONS).of(PartKind.COMPUTE)
    assert estimate(SHAPE, replace(OPTIONS, batch_size_tokens=64)).of(PartKind.COMPUTE) < small
    assert estimate(SHAPE, replace(OPTIONS, context_size_tokens=16_384)).of(PartKind.COMPUTE) > small


def test_a_context_left_open_is_the_trained_one_where_that_fits() -> None:
    options = replace(OPTIONS, context_size_tokens=0)
    assert chosen(SHAPE, options, Placement(), {RAM: 1 << 40}).context_size_tokens == 32_768


def test_a_context_left_open_is_the_largest_that_fits() -> None:
    options = replace(OPTIONS, context_size_tokens=0)
    budget = {RAM: estimate(SHAPE, OPTIONS).totals[RAM]}
    taken = chosen(SHAPE, options, Placement(), budget)
    assert taken == OPTIONS
    more = replace(taken, context_size_tokens=taken.context_size_tokens + 256)
    assert estimate(SHAPE, more).totals[RAM] > budget[RAM]


def test_a_context_that_was_asked_for_is_left_alone() -> None:
    assert chosen(SHAPE, OPTIONS, Placement(), {RAM: 0}) == OPTIONS


def test_sequences_are_given_up_before_the_context_gets_too_short() -> None:
    # One sequence costs as much as half the shortest context.
    state = LayerShape(state_width=LEAST_CONTEXT_TOKENS * 24)
    shape = replace(SHAPE, layers=(LAYER, state), trained_context_tokens=8192)
    options = replace(OPTIONS, context_size_tokens=0)
    one = replace(options, context_size_tokens=LEAST_CONTEXT_TOKENS, slot_count=1)
    budget = {RAM: estimate(shape, one).totals[RAM]}

    assert chosen(shape, options, Placement(), budget) == one
    kept = chosen(shape, options, Placement(), budget, keeps_slots=True)
    assert kept.slot_count == 4
    assert kept.context_size_tokens < LEAST_CONTEXT_TOKENS


def test_where_nothing_fits_the_smallest_context_is_returned() -> None:
    options = replace(OPTIONS, context_size_tokens=0)
    assert chosen(SHAPE, options, Placement(), {RAM: 0}) == replace(
        options, context_size_tokens=256, slot_count=1
    )


@pytest.mark.parametrize(
    ("needed", "held", "expected"),
    [
        ({RAM: 10}, {RAM: 0}, Verdict.FITS),
        ({RAM: 10}, {RAM: 1}, Verdict.FITS_AFTER_EVICTION),
        ({RAM: 11}, {RAM: 0}, Verdict.NEVER_FITS),
        ({RAM: 1, "CUDA0": 6}, {"CUDA0": 0}, Verdict.NEVER_FITS),
        ({RAM: 1, "CUDA0": 5}, {"CUDA0": 1}, Verdict.FITS_AFTER_EVICTION),
        ({"CUDA9": 1}, {}, Verdict.NEVER_FITS),
    ],
)
def test_the_verdict_is_that_of_the_fullest_device(
    needed: dict[str, int], held: dict[str, int], expected: Verdict
) -> None:
    assert verdict(needed, {RAM: 10, "CUDA0": 5}, held) is expected


def test_every_kind_and_verdict_has_a_name_on_the_wire() -> None:
    assert {kind: pb.MemoryPartKind.Name(PART_KINDS[kind]) for kind in PartKind} == {
        kind: f"MEMORY_PART_KIND_{kind.value.upper()}" for kind in PartKind
    }
    assert {each: pb.MemoryVerdict.Name(VERDICTS[each]) for each in Verdict} == {
        each: f"MEMORY_VERDICT_{each.name}" for each in Verdict
    }


def sized(
    layers: int, embedding: int, feed_forward: int, heads: int, heads_kv: int, experts: int = 0, used: int = 0
) -> Shape:
    """A transformer with heads of 128 and 36,000 tokens."""
    suffix = "_exps" if experts else ""
    names = (f"ffn_gate{suffix}", f"ffn_up{suffix}")
    widths = (("attn_k", 128 * heads_kv), *((name, feed_forward) for name in names))
    layer = LayerShape(
        weights=TensorGroup(0, (), widths),
        key_width=128 * heads_kv,
        value_width=128 * heads_kv,
        query_width=128 * heads,
        attended_width=128 * heads,
        head_width=128,
        heads=heads,
        feed_forward_width=feed_forward,
        experts_used=used,
    )
    return Shape("llama", (layer,) * layers, Weights(), embedding, 36_000, experts=experts)


@pytest.mark.parametrize(
    ("shape", "cache_type", "mebibytes"),
    [
        (sized(32, 4096, 14_336, 32, 8), "f16", 62.01),
        (sized(32, 4096, 14_336, 32, 8), "q8_0", 58.08),
        (sized(4, 8192, 28_672, 64, 8), "f16", 120.01),
        (sized(28, 1024, 3072, 16, 8), "f16", 17.01),
        (sized(48, 2048, 768, 32, 4, 128, 8), "f16", 48.01),
    ],
    ids=["8B", "8B with a quantised cache", "70B", "0.6B", "30B-A3B"],
)
def test_scratch_memory_is_what_llama_cpp_says(shape: Shape, cache_type: str, mebibytes: float) -> None:
    """The figures are those of llama.cpp for files of these sizes, 8192 cells and 4 sequences."""
    options = LoadOptions(8192, 4, 512, cache_type_k=cache_type, cache_type_v=cache_type)
    scratch = estimate(shape, options).of(PartKind.COMPUTE) - work_bytes(shape, 256)
    assert scratch / 2**20 == pytest.approx(mebibytes, abs=0.02)
