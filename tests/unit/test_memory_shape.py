"""What a header says about memory: which layers keep what, as llama.cpp would have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from paddock_server.catalog import TensorGroup, Weights, merged_facts, model_facts, read_header
from paddock_server.memory import architectures as known
from paddock_server.memory import model_shape
from tests.unit import gguf_bytes as gb
from tests.unit.gguf_bytes import Gguf, Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from paddock_server.catalog import ModelFacts
    from paddock_server.memory import Shape

SIZES: dict[str, Any] = {
    "block_count": 8,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "feed_forward_length": 128,
}
"""Heads are 16 wide unless said otherwise."""


@pytest.fixture
def shape_of(tmp_path: Path) -> ShapeOf:
    return ShapeOf(tmp_path / "model.gguf")


class ShapeOf:
    """Writes a file of an architecture with some hyperparameters, and reads its shape."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def facts(self, architecture: str, *tensors: Tensor, **changed: Any) -> ModelFacts:
        values = SIZES | {key.replace("__", "."): value for key, value in changed.items()}
        pairs = [("general.architecture", gb.text(architecture))]
        for key, value in values.items():
            if value is not None:
                pairs.append((f"{architecture}.{key}", _value(value)))
        return model_facts(read_header(Gguf(pairs, tensors or [Tensor()]).write(self._path)))

    def __call__(self, architecture: str, *tensors: Tensor, **changed: Any) -> Shape:
        return model_shape(self.facts(architecture, *tensors, **changed))


def _value(value: int | list[int]) -> bytes:
    return gb.numbers(gb.INT32, value) if isinstance(value, list) else gb.u32(value)


def test_a_cell_keeps_the_heads_of_keys_and_values(shape_of: ShapeOf) -> None:
    layer = shape_of("llama").layers[0]
    assert (layer.key_width, layer.value_width) == (2 * 16, 2 * 16)


def test_heads_may_have_a_width_of_their_own(shape_of: ShapeOf) -> None:
    shape = shape_of("qwen3", attention__key_length=128, attention__value_length=96)
    assert {(layer.key_width, layer.value_width) for layer in shape.layers} == {(256, 192)}
    assert shape.layers[0].query_width == 4 * 128


def test_layers_may_have_heads_of_their_own(shape_of: ShapeOf) -> None:
    shape = shape_of("deci", block_count=3, attention__head_count_kv=[2, 0, 4])
    assert [layer.key_width for layer in shape.layers] == [32, 0, 64]


def test_without_heads_of_keys_every_head_has_its_own(shape_of: ShapeOf) -> None:
    assert shape_of("llama", attention__head_count_kv=None).layers[0].key_width == 64


def test_compressed_attention_keeps_no_values(shape_of: ShapeOf) -> None:
    layer = shape_of(
        "deepseek2",
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
    ).layers[0]
    assert (layer.key_width, layer.value_width) == (576, 0)


@pytest.mark.parametrize(
    ("architecture", "keys", "sliding"),
    [
        ("gemma3", {}, [1, 1, 1, 1, 1, 0, 1, 1]),
        ("gemma2", {}, [1, 0, 1, 0, 1, 0, 1, 0]),
        ("cohere2moe", {}, [0, 1, 1, 1, 0, 1, 1, 1]),
        ("gpt-oss", {}, [1, 0, 1, 0, 1, 0, 1, 0]),
        ("gemma3", {"attention__sliding_window_pattern": 4}, [1, 1, 1, 0, 1, 1, 1, 0]),
        ("granite_swa", {"attention__sliding_window_pattern": [1, 0] * 4}, [1, 0] * 4),
        ("gemma3", {"attention__sliding_window": 0}, [0] * 8),
        ("llama", {}, [0] * 8),
        ("phi3", {}, [0] * 8),
        ("exaone4", {}, [0] * 8),
    ],
)
def test_the_layers_that_slide_are_those_of_the_architecture(
    shape_of: ShapeOf, architecture: str, keys: dict[str, Any], sliding: list[int]
) -> None:
    shape = shape_of(architecture, **{"attention__sliding_window": 100, **keys})
    assert [int(layer.is_windowed) for layer in shape.layers] == sliding
    assert shape.window_tokens == (100 if any(sliding) else 0)


def test_layers_that_slide_may_have_other_heads(shape_of: ShapeOf) -> None:
    shape = shape_of(
        "gemma4",
        block_count=2,
        attention__sliding_window=100,
        attention__sliding_window_pattern=[1, 0],
        attention__key_length=128,
        attention__key_length_swa=32,
    )
    assert [layer.key_width for layer in shape.layers] == [64, 256]


def test_layers_that_share_their_keys_keep_none(shape_of: ShapeOf) -> None:
    shape = shape_of(
        "gemma4",
        attention__sliding_window=100,
        attention__sliding_window_pattern=[1] * 8,
        attention__shared_kv_layers=3,
    )
    assert [bool(layer.key_width) for layer in shape.layers] == [True] * 5 + [False] * 3


def test_a_recurrent_layer_keeps_a_state_and_no_keys(shape_of: ShapeOf) -> None:
    shape = shape_of(
        "mamba",
        attention__head_count=0,
        attention__head_count_kv=0,
        ssm__conv_kernel=4,
        ssm__inner_size=128,
        ssm__state_size=16,
    )
    assert {layer.state_width for layer in shape.layers} == {3 * 128 + 16 * 128}
    assert {layer.key_width for layer in shape.layers} == {0}


def test_rwkv_keeps_the_last_tokens_and_a_matrix_per_head(shape_of: ShapeOf) -> None:
    shape = shape_of("rwkv7", attention__head_count=0, wkv__head_size=32)
    assert shape.layers[0].state_width == 2 * 64 + 64 * 32


@pytest.mark.parametrize(
    ("architecture", "keys", "recurrent"),
    [
        ("jamba", {"attention__head_count_kv": [0, 2] * 4}, [1, 0] * 4),
        ("qwen3next", {}, [1, 1, 1, 0] * 2),
        ("qwen3next", {"full_attention_interval": 2}, [1, 0] * 4),
        (
            "nemotron_h",
            {"attention__head_count_kv": [0, 0, 2, 0] * 2, "feed_forward_length": [0, 9, 0, 9] * 2},
            [1, 0, 0, 0] * 2,
        ),
    ],
)
def test_a_hybrid_has_keys_where_it_has_no_state(
    shape_of: ShapeOf, architecture: str, keys: dict[str, Any], recurrent: list[int]
) -> None:
    sizes = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16}
    shape = shape_of(architecture, **sizes, **keys)
    assert [int(layer.state_width > 0) for layer in shape.layers] == recurrent
    assert not any(layer.state_width and layer.key_width for layer in shape.layers)


def test_an_encoder_keeps_nothing(shape_of: ShapeOf) -> None:
    shape = shape_of("bert")
    assert not shape.has_memory
    assert {layer.key_width for layer in shape.layers} == {0}


def test_an_architecture_nobody_knows_is_rough(shape_of: ShapeOf) -> None:
    assert shape_of("llama").rough == ""
    assert "'nobody'" in shape_of("nobody").rough
    assert "'deepseek4'" in shape_of("deepseek4").rough
    assert not known.GENERAL & known.ROUGH


def test_weights_are_those_of_their_layers(shape_of: ShapeOf) -> None:
    tensors = [
        Tensor("token_embd.weight", (32, 8), gb.Q8_0, 272),
        Tensor("blk.1.ffn_up.weight", (32, 16), gb.Q8_0, 544),
        Tensor("blk.1.attn_norm.weight", (32,), gb.F32, 128),
        Tensor("output.weight", (32, 8), gb.Q8_0, 272),
    ]
    weights = shape_of("llama", *tensors).weights
    assert weights.input.size_bytes == 272
    assert [group.size_bytes for group in weights.layers] == [0, 544 + 128]
    assert weights.layers[1].matrix_bytes == (("Q8_0", 544),)
    assert weights.layers[1].width("ffn_up") == 16
    assert (weights.output.size_bytes, weights.output_rows) == (272, 8)
    assert weights.table == TensorGroup()


def test_a_table_without_an_output_beside_it_is_one(shape_of: ShapeOf) -> None:
    weights = shape_of("llama", Tensor("token_embd.weight", (32, 8), gb.Q8_0, 272)).weights
    assert weights.table.size_bytes == 272
    assert weights.size_bytes == 272


def test_shards_are_one_model(shape_of: ShapeOf) -> None:
    first = shape_of.facts("llama", Tensor("token_embd.weight", (32, 8), gb.Q8_0, 272))
    second = shape_of.facts(
        "llama",
        Tensor("blk.0.ffn_up.weight", (32, 16), gb.Q8_0, 544),
        Tensor("output.weight", (32, 8), gb.Q8_0, 272),
    )
    weights = merged_facts([first, second]).weights
    assert weights.size_bytes == 272 + 544 + 272
    assert weights.table == TensorGroup()
    assert weights.layers[0].width("ffn_up") == 16


def test_a_hostile_layer_number_makes_no_layers(shape_of: ShapeOf) -> None:
    shape = shape_of("llama", Tensor("blk.999.ffn_up.weight", (32, 16), gb.F32, 2048), block_count=2**31 - 1)
    assert shape.weights.layers == ()
    assert len(shape.layers) == 512
    assert Weights().size_bytes == 0
