"""What the header of a model says about the memory it will take. Pure; reads facts and no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paddock_server.catalog import TensorGroup, Weights
from paddock_server.memory import architectures as known

if TYPE_CHECKING:
    from paddock_server.catalog import ModelFacts
    from paddock_server.catalog.facts import PerBlock

_DEFAULT_TOKEN_SHIFTS: Final = 2
_KDA_CONVOLUTION: Final = 4
_GEMMA3N_LAYERS_WITH_KEYS: Final = 20


_NOTHING: Final = TensorGroup()


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer. Widths are in elements.

    `key_width` and `value_width` are what one cell of the cache keeps, over all heads; 0 is nothing.
    `is_windowed` says that only the cells of the sliding window are kept. `state_width` is what one sequence
    keeps as recurrent state, `convolution_width` the part of it that is a convolution's. `query_width` is
    that of all query heads, `attended_width` that of what they bring back, `head_width` of one head of keys.
    """

    weights: TensorGroup = _NOTHING
    key_width: int = 0
    value_width: int = 0
    is_windowed: bool = False
    state_width: int = 0
    convolution_width: int = 0
    query_width: int = 0
    attended_width: int = 0
    head_width: int = 0
    heads: int = 0
    feed_forward_width: int = 0
    experts_used: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model. Widths and counts are in elements, `window_tokens` and `trained_context_tokens` in tokens.

    `has_memory` is False of a model that keeps nothing between batches: it only embeds; `embeds` says that it
    is made for embeddings, with or without one. `rough` says in a sentence why an estimate may be far off; it
    is empty where the rules are those of llama.cpp.
    """

    architecture: str
    layers: tuple[LayerShape, ...]
    weights: Weights
    embedding_width: int
    vocabulary_size: int
    merge_count: int = 0
    window_tokens: int = 0
    trained_context_tokens: int = 0
    experts: int = 0
    has_memory: bool = True
    embeds: bool = False
    is_pooled_by_mean: bool = True
    rough: str = ""
    projector_bytes: int = 0
    adapter_bytes: int = 0


def model_shape(facts: ModelFacts, *, projector_bytes: int = 0, adapter_bytes: int = 0) -> Shape:
    """Return the shape of a model from the facts of its files; sizes of files beside it in bytes."""
    reader = _Reader(facts)
    window = reader.window()
    count = min(reader.number("block_count") or len(facts.weights.layers), 512)
    kept = reader.layers_with_keys(count)
    layers = tuple(reader.layer(index, count, has_keys=kept[index], window=window) for index in range(count))
    return Shape(
        architecture=facts.architecture,
        layers=layers,
        weights=facts.weights,
        embedding_width=reader.number("embedding_length"),
        vocabulary_size=facts.weights.output_rows or facts.vocabulary_size or 0,
        merge_count=facts.merge_count,
        window_tokens=window,
        trained_context_tokens=facts.trained_context_tokens or 0,
        experts=reader.number("expert_count"),
        has_memory=facts.architecture not in known.WITHOUT_MEMORY,
        embeds=facts.is_embedding_model,
        is_pooled_by_mean=facts.pooling not in {"cls", "last"},
        rough=_roughness(facts.architecture),
        projector_bytes=projector_bytes,
        adapter_bytes=adapter_bytes,
    )


def _roughness(architecture: str) -> str:
    if architecture in known.GENERAL:
        return ""
    if architecture in known.ROUGH:
        return f"Architecture {architecture!r} keeps more than keys, values and states; it is not counted."
    return f"Architecture {architecture!r} is not known; the general rules were taken."


class _Reader:
    """Reads the hyperparameters of one model the way llama.cpp does."""

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self._keys = facts.hyperparameters
        self._architecture = facts.architecture

    def number(self, key: str, default: int = 0, layer: int = 0) -> int:
        """Return the number under a key, or that of one layer where there is one for each."""
        return _of_layer(self._keys.get(key), layer, default)

    def window(self) -> int:
        """Return the tokens of the sliding window; 0 when no layer slides."""
        given = self._keys.get("attention.sliding_window")
        tokens = _of_layer(given, 0, 0)
        if self._architecture == "lfm2":
            return tokens
        rule = known.WINDOWS.get(self._architecture)
        if rule is None or (given is not None and tokens == 0):
            return 0
        if self._architecture == "exaone4" and self.number("block_count") != known.SMALL_EXAONE_LAYERS:
            return 0
        if rule.is_fixed:
            return rule.tokens if given is not None or self._architecture == "llama4" else 0
        return tokens or rule.tokens

    def layers_with_keys(self, count: int) -> list[bool]:
        """Return for each layer whether it has keys and values of its own, by its number alone."""
        kept = count
        if self._architecture == "gemma3n":
            kept = _GEMMA3N_LAYERS_WITH_KEYS
        elif self._architecture == "gemma4":
            kept = count - self.number("attention.shared_kv_layers")
        elif self._architecture != "graniteswitch":
            trunk = count - self.number("nextn_predict_layers")
            kept = trunk if trunk > 0 else count
        return [index < kept for index in range(count)]

    def layer(self, index: int, count: int, *, has_keys: bool, window: int) -> LayerShape:
        """Return one layer."""
        heads = self.number("attention.head_count", 0, index)
        heads_kv = self.number("attention.head_count_kv", heads, index)
        is_recurrent = self._is_recurrent(index, heads_kv, count)
        is_windowed = bool(window) and self._slides(index, count, is_recurrent=is_recurrent)
        key, value = self._head_widths(is_windowed=is_windowed)
        attends = has_keys and self._attends(index, is_recurrent=is_recurrent)
        is_mla = bool(self.number("attention.key_length_mla"))
        groups = self._facts.weights.layers
        convolution, state = self._states() if is_recurrent else (0, 0)
        return LayerShape(
            weights=groups[index] if index < len(groups) else _NOTHING,
            key_width=heads_kv * key if attends else 0,
            value_width=heads_kv * value if attends and not is_mla else 0,
            is_windowed=is_windowed,
            state_width=convolution + state,
            convolution_width=convolution,
            query_width=heads * key if not is_recurrent or attends else 0,
            attended_width=heads * value if not is_recurrent or attends else 0,
            head_width=key,
            heads=heads,
            feed_forward_width=self.number("feed_forward_length", 0, index),
            experts_used=self.number("expert_used_count", 0, index),
        )

    def _head_widths(self, *, is_windowed: bool) -> tuple[int, int]:
        heads = self.number("attention.head_count")
        if not heads:
            return 0, 0
        default = self.number("embedding_length") // heads
        key = self.number("attention.key_length", default)
        value = self.number("attention.value_length", default)
        if is_windowed:
            key = self.number("attention.key_length_swa", key)
            value = self.number("attention.value_length_swa", value)
        return key, value

    def _slides(self, index: int, count: int, *, is_recurrent: bool) -> bool:
        if self._architecture == "lfm2":
            return not is_recurrent
        pattern = self._keys.get("attention.sliding_window_pattern")
        if isinstance(pattern, tuple):
            return index < len(pattern) and bool(pattern[index])
        rule = known.WINDOWS[self._architecture]
        period = pattern if isinstance(pattern, int) else rule.period
        if index >= count - self.number("nextn_predict_layers"):
            return False
        if period == 0:
            return True
        return index % period != 0 if rule.dense_first else index % period < period - 1

    def _is_recurrent(self, index: int, heads_kv: int, count: int) -> bool:
        name = self._architecture
        if name in known.RECURRENT or name in known.RECURRENT_AND_ATTENDING:
            return True
        if name in known.RECURRENT_WITHOUT_KEYS:
            return heads_kv == 0
        if name in known.RECURRENT_WITHOUT_FEED_FORWARD:
            return heads_kv == 0 and self.number("feed_forward_length", 0, index) == 0
        interval = known.RECURRENT_BY_INTERVAL.get(name)
        if interval is None or index >= count - self.number("nextn_predict_layers"):
            return False
        listed = self._keys.get("attention.recurrent_layers")
        if listed is not None:
            return bool(_of_layer(listed, index, 0))
        interval = self.number("full_attention_interval", interval) or interval
        return (index + 1) % interval != 0

    def _attends(self, index: int, *, is_recurrent: bool) -> bool:
        name = self._architecture
        if name in known.WITHOUT_MEMORY:
            return False
        if name in known.RECURRENT_WITHOUT_FEED_FORWARD:
            return not is_recurrent and self.number("feed_forward_length", 0, index) == 0
        return not is_recurrent or name in known.RECURRENT_AND_ATTENDING

    def _states(self) -> tuple[int, int]:
        """Return what a sequence keeps of the convolution and of the state itself, as llama-hparams.cpp."""
        embedding = self.number("embedding_length")
        heads = self.number("attention.head_count")
        head = self.number("wkv.head_size")
        if head:
            return self.number("token_shift_count", _DEFAULT_TOKEN_SHIFTS) * embedding, embedding * head
        kernel = self.number("ssm.conv_kernel")
        inner, state = self.number("ssm.inner_size"), self.number("ssm.state_size")
        short = self.number("shortconv.l_cache")
        if short:
            return embedding * (short - 1), state * inner
        head = self.number("kda.head_dim")
        if head:
            return 3 * ((kernel or _KDA_CONVOLUTION) - 1) * heads * head, head * head * heads
        convolution = max(kernel - 1, 0) * (inner + 2 * self.number("ssm.group_count") * state)
        if self._architecture == "minimax-01":
            key, _ = self._head_widths(is_windowed=False)
            return convolution, key * key * heads
        return convolution, state * inner


def _of_layer(value: PerBlock | None, layer: int, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, int):
        return value
    return value[layer] if layer < len(value) else default
