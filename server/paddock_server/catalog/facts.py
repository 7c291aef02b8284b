"""What the header of a model file says about the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError, quoted
from paddock_server.catalog.ggml_types import FILE_TYPES
from paddock_server.catalog.gguf import TEMPLATE_KEY, GgufHeader, OmittedValue
from paddock_server.catalog.weights import Weights, merged_weights, model_weights

PerBlock = int | tuple[int, ...]
"""One number for every block of a model, or one for each."""

_MAX_INT32 = 2**31 - 1

# By inspection of the text: to render a template of a file nobody has asked for would be to trust it.
_TOOLS = re.compile(r"\btools\b")
_THINKING = re.compile(r"enable_thinking|reasoning_content|<think(?:ing)?>|\bthinking\b")
_GUESSED_FILE_TYPE = 1024

_POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_EMBEDDING_POOLINGS = frozenset({"mean", "cls", "last"})
_EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)


@dataclass(frozen=True, slots=True)
class Split:
    """A file's place in a set of shards: `number` counts from 0, `tensor_count` is that of the whole set."""

    number: int
    count: int
    tensor_count: int | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts from the header of one file, or of a set of shards together.

    A number that the file does not give is None, a text that it does not give is empty. Lengths and counts
    are in elements, `trained_context_tokens` in tokens, `tensor_bytes` in bytes. `parameters_by_type` counts
    parameters by the name of their tensor type. `chat_template` is None too when the template is longer than
    a header reader keeps; `has_chat_template` tells the two apart. What the template `has` is told by its
    words. `pooling` is one of none, mean, cls, last and rank. A projector says which encoders it has.
    `hyperparameters` has the whole numbers, and arrays of them, that the file gives under the name of its
    architecture, by the rest of their keys; `merge_count` counts the merges of its tokenizer.
    """

    architecture: str
    general_type: str
    name: str
    quantization: str
    parameter_count: int
    parameters_by_type: Mapping[str, int]
    tensor_count: int
    tensor_bytes: int
    trained_context_tokens: int | None
    embedding_length: int | None
    block_count: int | None
    head_count: PerBlock | None
    kv_head_count: PerBlock | None
    key_length: int | None
    value_length: int | None
    vocabulary_size: int | None
    has_chat_template: bool
    chat_template: str | None
    pooling: str | None
    is_embedding_model: bool
    file_type: int | None
    split: Split | None
    hyperparameters: Mapping[str, PerBlock] = field(default_factory=dict[str, PerBlock])
    weights: Weights = field(default_factory=Weights)
    merge_count: int = 0
    template_has_tools: bool = False
    template_has_thinking: bool = False
    has_vision_encoder: bool = False
    has_audio_encoder: bool = False


def model_facts(header: GgufHeader) -> ModelFacts:
    """The facts of one file.

    Raises:
        GgufError: a key has a value of the wrong type or out of range.
    """
    keys = _Keys(header)
    architecture = keys.text("general.architecture")
    parameters_by_type: Counter[str] = Counter()
    for tensor in header.tensors:
        parameters_by_type[tensor.type] += tensor.element_count
    file_type = keys.integer("general.file_type")
    template = keys.text(TEMPLATE_KEY)
    pooling = keys.pooling(f"{architecture}.pooling_type")
    return ModelFacts(
        architecture=architecture,
        general_type=keys.text("general.type"),
        name=keys.text("general.name"),
        quantization=_quantization(file_type, parameters_by_type),
        parameter_count=header.parameter_count,
        parameters_by_type=dict(parameters_by_type),
        tensor_count=len(header.tensors),
        tensor_bytes=header.tensor_bytes,
        trained_context_tokens=keys.integer(f"{architecture}.context_length"),
        embedding_length=keys.integer(f"{architecture}.embedding_length"),
        block_count=keys.integer(f"{architecture}.block_count"),
        head_count=keys.per_block(f"{architecture}.attention.head_count"),
        kv_head_count=keys.per_block(f"{architecture}.attention.head_count_kv"),
        key_length=keys.integer(f"{architecture}.attention.key_length"),
        value_length=keys.integer(f"{architecture}.attention.value_length"),
        vocabulary_size=keys.vocabulary_size(architecture),
        has_chat_template=header.metadata.get(TEMPLATE_KEY, "") != "",
        chat_template=template or None,
        pooling=pooling,
        is_embedding_model=architecture in _EMBEDDING_ARCHITECTURES or pooling in _EMBEDDING_POOLINGS,
        file_type=file_type,
        split=keys.split(),
        hyperparameters=keys.hyperparameters(f"{architecture}."),
        weights=model_weights(header.tensors),
        merge_count=keys.length("tokenizer.ggml.merges"),
        template_has_tools=_TOOLS.search(template) is not None,
        template_has_thinking=_THINKING.search(template) is not None,
        has_vision_encoder=keys.flag("clip.has_vision_encoder"),
        has_audio_encoder=keys.flag("clip.has_audio_encoder"),
    )


def merged_facts(shards: Sequence[ModelFacts]) -> ModelFacts:
    """The facts of a set of shards, first shard first: its keys, and the sums of all tensors."""
    first = shards[0]
    parameters_by_type: Counter[str] = Counter()
    for shard in shards:
        parameters_by_type.update(shard.parameters_by_type)
    return replace(
        first,
        quantization=_quantization(first.file_type, parameters_by_type),
        parameter_count=sum(shard.parameter_count for shard in shards),
        parameters_by_type=dict(parameters_by_type),
        tensor_count=sum(shard.tensor_count for shard in shards),
        tensor_bytes=sum(shard.tensor_bytes for shard in shards),
        weights=merged_weights([shard.weights for shard in shards]),
    )


def _quantization(file_type: int | None, parameters_by_type: Mapping[str, int]) -> str:
    if file_type is not None:
        name = FILE_TYPES.get(file_type & ~_GUESSED_FILE_TYPE)
        if name is not None:
            return name
    return max(parameters_by_type, key=lambda name: (parameters_by_type[name], name), default="")


class _Keys:
    """Typed look-ups in one header."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def text(self, key: str) -> str:
        """The string under `key`; empty when there is none, or one too long to be a name."""
        value = self._header.metadata.get(key)
        if value is None or (isinstance(value, OmittedValue) and not value.is_array):
            return ""
        if not isinstance(value, str):
            self._fail(key, "is not a string")
        return value

    def flag(self, key: str) -> bool:
        """The truth value under `key`; false when there is none."""
        value = self._header.metadata.get(key, False)
        if not isinstance(value, bool):
            self._fail(key, "is not true or false")
        return value

    def integer(self, key: str) -> int | None:
        """The number under `key`, from 0 to 2**31 - 1."""
        value = self._header.metadata.get(key)
        return None if value is None else self._checked(key, value)

    def per_block(self, key: str) -> PerBlock | None:
        """The number or array of numbers under `key`."""
        value = self._header.metadata.get(key)
        if isinstance(value, tuple):
            return tuple(self._checked(key, element) for element in value)
        return self.integer(key)

    def hyperparameters(self, prefix: str) -> dict[str, PerBlock]:
        """The numbers and arrays of numbers from 0 to 2**31 - 1 whose keys start with `prefix`, without it.

        Others, such as fractions, are left out: they say nothing about sizes.
        """
        found: dict[str, PerBlock] = {}
        for key, value in self._header.metadata.items():
            if not key.startswith(prefix):
                continue
            if isinstance(value, int) and 0 <= value <= _MAX_INT32:
                found[key[len(prefix) :]] = int(value)
            elif isinstance(value, tuple):
                whole = tuple(
                    int(part) for part in value if isinstance(part, int) and 0 <= part <= _MAX_INT32
                )
                if len(whole) == len(value):
                    found[key[len(prefix) :]] = whole
        return found

    def length(self, key: str) -> int:
        """The number of elements of the array under `key`; 0 when there is none."""
        value = self._header.metadata.get(key)
        if isinstance(value, tuple):
            return len(value)
        return value.length if isinstance(value, OmittedValue) and value.is_array else 0

    def pooling(self, key: str) -> str | None:
        """The name of the pooling under `key`."""
        number = self.integer(key)
        if number is None:
            return None
        name = _POOLINGS.get(number)
        if name is None:
            what = f"key {quoted(key)} is {number}; 0 to {max(_POOLINGS)} are known"
            raise UnsupportedGgufError(self._header.path, what, self._header.key_offsets[key])
        return name

    def vocabulary_size(self, architecture: str) -> int | None:
        """The number of tokens listed, or claimed where none are listed."""
        key = "tokenizer.ggml.tokens"
        tokens = self._header.metadata.get(key)
        if tokens is None:
            return self.integer(f"{architecture}.vocab_size")
        if not (isinstance(tokens, OmittedValue) and tokens.is_array):
            self._fail(key, "is not an array of strings")
        return tokens.length

    def split(self) -> Split | None:
        """The file's place in its set of shards."""
        count = self.integer("split.count")
        if not count:
            return None
        return Split(self.integer("split.no") or 0, count, self.integer("split.tensors.count"))

    def _checked(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self._fail(key, "is not a whole number")
        if not 0 <= value <= _MAX_INT32:
            self._fail(key, f"is {value}; it must be from 0 to {_MAX_INT32}")
        return value

    def _fail(self, key: str, what: str) -> NoReturn:
        raise GgufError(self._header.path, f"key {quoted(key)} {what}", self._header.key_offsets[key])
