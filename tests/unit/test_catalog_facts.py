from __future__ import annotations

from pathlib import Path

import pytest

from paddock_server.catalog import (
    GgufError,
    Split,
    TensorGroup,
    UnsupportedGgufError,
    Weights,
    merged_facts,
    model_facts,
    read_header,
)
from paddock_server.catalog.facts import ModelFacts
from paddock_server.catalog.ggml_types import FILE_TYPES
from tests.unit import gguf_bytes as gb
from tests.unit.gguf_bytes import Gguf, Tensor

WEIGHTS = Tensor("token_embd.weight", (256, 4), gb.Q4_K, 576)
NORMS = [Tensor(f"blk.{index}.norm", (32,), gb.F32, 128) for index in range(5)]


@pytest.fixture
def facts(tmp_path: Path) -> FactsOf:
    return FactsOf(tmp_path / "model.gguf")


class FactsOf:
    """Writes a file and reads its facts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, *pairs: tuple[str, bytes], architecture: str = "llama") -> ModelFacts:
        file = Gguf([("general.architecture", gb.text(architecture)), *pairs], [*NORMS, WEIGHTS])
        return model_facts(read_header(file.write(self._path)))


def test_facts_are_what_the_keys_say(facts: FactsOf) -> None:
    found = facts(
        ("general.name", gb.text("Modèle")),
        ("general.type", gb.text("model")),
        ("general.file_type", gb.u32(15)),
        ("llama.context_length", gb.u32(131_072)),
        ("llama.embedding_length", gb.number(gb.UINT64, 4096)),
        ("llama.block_count", gb.number(gb.INT32, 2)),
        ("llama.attention.head_count", gb.u32(32)),
        ("llama.attention.head_count_kv", gb.numbers(gb.INT32, [8, 4])),
        ("llama.attention.key_length", gb.u32(128)),
        ("llama.attention.value_length", gb.u32(64)),
        ("qwen2.context_length", gb.u32(1)),
        ("tokenizer.ggml.tokens", gb.strings(["a", "b", "c"])),
        ("tokenizer.ggml.merges", gb.strings(["a b"])),
        ("tokenizer.chat_template", gb.text("{{ x }}")),
        ("llama.rope.freq_base", gb.number(gb.FLOAT32, 1e4)),
        ("llama.pattern", gb.numbers(gb.BOOL, [True, False])),
        ("llama.negative", gb.number(gb.INT32, -1)),
    )

    assert found == ModelFacts(
        architecture="llama",
        general_type="model",
        name="Modèle",
        quantization="Q4_K_M",
        parameter_count=1024 + 5 * 32,
        parameters_by_type={"F32": 160, "Q4_K": 1024},
        tensor_count=6,
        tensor_bytes=576 + 5 * 128,
        trained_context_tokens=131_072,
        embedding_length=4096,
        block_count=2,
        head_count=32,
        kv_head_count=(8, 4),
        key_length=128,
        value_length=64,
        vocabulary_size=3,
        has_chat_template=True,
        chat_template="{{ x }}",
        pooling=None,
        is_embedding_model=False,
        file_type=15,
        split=None,
        hyperparameters={
            "context_length": 131_072,
            "embedding_length": 4096,
            "block_count": 2,
            "attention.head_count": 32,
            "attention.head_count_kv": (8, 4),
            "attention.key_length": 128,
            "attention.value_length": 64,
            "pattern": (1, 0),
        },
        weights=Weights(
            input=TensorGroup(576, (), (("token_embd", 4),)),
            layers=(TensorGroup(128),) * 5,
            table=TensorGroup(576, (), (("token_embd", 4),)),
            output_rows=4,
        ),
        merge_count=1,
    )


def test_what_a_file_does_not_say_is_none_and_not_zero(facts: FactsOf) -> None:
    found = facts()

    assert found.trained_context_tokens is None
    assert found.head_count is None
    assert found.kv_head_count is None
    assert found.vocabulary_size is None
    assert (found.has_chat_template, found.chat_template) == (False, None)
    assert (found.name, found.general_type) == ("", "")


@pytest.mark.parametrize(("number", "name"), FILE_TYPES.items())
def test_the_quantization_is_the_file_type_by_name(facts: FactsOf, number: int, name: str) -> None:
    assert facts(("general.file_type", gb.u32(number))).quantization == name
    assert facts(("general.file_type", gb.u32(number | 1024))).quantization == name


@pytest.mark.parametrize("pairs", [[], [("general.file_type", gb.u32(999))]])
def test_without_a_known_file_type_the_quantization_is_that_of_most_parameters(
    facts: FactsOf, pairs: list[tuple[str, bytes]]
) -> None:
    assert facts(*pairs).quantization == "Q4_K"


@pytest.mark.parametrize(
    ("architecture", "pooling", "name", "embeds"),
    [
        ("llama", None, None, False),
        ("llama", 0, "none", False),
        ("qwen3", 3, "last", True),
        ("llama", 1, "mean", True),
        ("llama", 2, "cls", True),
        ("qwen3", 4, "rank", False),
        ("bert", None, None, True),
        ("nomic-bert", 0, "none", True),
        ("gemma-embedding", None, None, True),
    ],
)
def test_embedding_models_are_told_by_architecture_or_pooling(
    facts: FactsOf, architecture: str, pooling: int | None, name: str | None, *, embeds: bool
) -> None:
    pairs = [] if pooling is None else [(f"{architecture}.pooling_type", gb.u32(pooling))]

    found = facts(*pairs, architecture=architecture)

    assert (found.pooling, found.is_embedding_model) == (name, embeds)


def test_the_vocabulary_is_counted_or_else_believed(facts: FactsOf) -> None:
    claimed = ("llama.vocab_size", gb.u32(32_000))

    assert facts(claimed).vocabulary_size == 32_000
    assert facts(claimed, ("tokenizer.ggml.tokens", gb.strings(["a"] * 2000))).vocabulary_size == 2000


def test_an_empty_template_is_none(facts: FactsOf) -> None:
    found = facts(("tokenizer.chat_template", gb.text("")))

    assert (found.has_chat_template, found.chat_template) == (False, None)


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [
        ("{{ x }}", False, False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True, False),
        ("{% if enable_thinking %}<think>{% endif %}", False, True),
        ("{{ message.reasoning_content }}", False, True),
        ("{{ footools_or_rethinking }}", False, False),
    ],
)
def test_what_a_template_can_do_is_told_by_its_words(
    facts: FactsOf, template: str, tools: bool, thinking: bool
) -> None:
    found = facts(("tokenizer.chat_template", gb.text(template)))

    assert (found.template_has_tools, found.template_has_thinking) == (tools, thinking)


def test_a_projector_says_which_encoders_it_has(facts: FactsOf) -> None:
    found = facts(("clip.has_vision_encoder", gb.number(gb.BOOL, True)))

    assert (found.has_vision_encoder, found.has_audio_encoder) == (True, False)


def test_a_template_too_long_to_keep_is_still_there(facts: FactsOf) -> None:
    found = facts(("tokenizer.chat_template", gb.text("x" * (1024 * 1024 + 1))))

    assert (found.has_chat_template, found.chat_template) == (True, None)


def test_a_name_too_long_to_keep_is_left_out(facts: FactsOf) -> None:
    assert facts(("general.name", gb.text("n" * 5000))).name == ""


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("llama.context_length", gb.text("4096"), "is not a whole number"),
        ("llama.context_length", gb.number(gb.FLOAT32, 4096.0), "is not a whole number"),
        ("llama.context_length", gb.number(gb.BOOL, True), "is not a whole number"),
        ("llama.context_length", gb.numbers(gb.INT32, [4096]), "is not a whole number"),
        ("llama.context_length", gb.u32(2**31), "is 2147483648; it must be from 0 to 2147483647"),
        ("llama.block_count", gb.number(gb.INT32, -1), "is -1; it must be from 0 to 2147483647"),
        ("llama.attention.head_count_kv", gb.numbers(gb.INT32, [8, -8]), "is -8; it must be"),
        ("llama.attention.head_count_kv", gb.numbers(gb.FLOAT32, [8.0]), "is not a whole number"),
        ("llama.attention.head_count", gb.numbers(gb.INT32, [1] * 2000), "is not a whole number"),
        ("general.name", gb.u32(3), "is not a string"),
        ("tokenizer.chat_template", gb.u32(3), "is not a string"),
        ("tokenizer.ggml.tokens", gb.text("abc"), "is not an array of strings"),
        ("split.count", gb.text("2"), "is not a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_with_its_key(
    facts: FactsOf, key: str, value: bytes, what: str
) -> None:
    first_key_at = 24
    pair_bytes = len(gb.name("general.architecture") + gb.text("llama"))

    with pytest.raises(GgufError) as caught:
        facts((key, value))

    assert caught.value.what.startswith(f"key {key!r} {what}")
    assert caught.value.offset == first_key_at + pair_bytes


def test_an_architecture_that_is_no_string_is_an_error(tmp_path: Path) -> None:
    file = Gguf([("general.architecture", gb.strings(["llama"]))])

    with pytest.raises(GgufError, match=r"key 'general.architecture' is not a string"):
        model_facts(read_header(file.write(tmp_path / "m.gguf")))


def test_an_unknown_pooling_is_unsupported(facts: FactsOf) -> None:
    with pytest.raises(UnsupportedGgufError, match=r"key 'llama.pooling_type' is 9; 0 to 4 are known"):
        facts(("llama.pooling_type", gb.u32(9)))


def test_the_facts_of_shards_are_the_keys_of_the_first_and_the_sums_of_all(tmp_path: Path) -> None:
    def split(number: int) -> list[tuple[str | bytes, bytes]]:
        return [
            ("split.no", gb.number(gb.UINT16, number)),
            ("split.count", gb.number(gb.UINT16, 2)),
            ("split.tensors.count", gb.number(gb.INT32, 6)),
        ]

    first = Gguf([("general.architecture", gb.text("llama")), *split(0)], NORMS)
    second = Gguf(split(1), [WEIGHTS])

    shards = [model_facts(read_header(file.write(tmp_path / "s.gguf"))) for file in (first, second)]
    merged = merged_facts(shards)

    assert [shard.split for shard in shards] == [Split(0, 2, 6), Split(1, 2, 6)]
    assert merged.architecture == "llama"
    assert merged.quantization == "Q4_K"
    assert merged.parameter_count == 1024 + 5 * 32
    assert merged.parameters_by_type == {"F32": 160, "Q4_K": 1024}
    assert (merged.tensor_count, merged.tensor_bytes) == (6, 576 + 5 * 128)
