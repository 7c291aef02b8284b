"""llama.cpp's samplers, typed: chains that pick a token, and grammars that say which ones may be picked."""

from __future__ import annotations

import ctypes
import importlib
import math
from typing import TYPE_CHECKING, Any, Final, Self

from paddock_server.worker import llama

if TYPE_CHECKING:
    from collections.abc import Iterable

_c: Final = llama.bindings


class Sampler:
    """A chain of llama.cpp's samplers. Stateful: one per sequence."""

    def __init__(self) -> None:
        params = _c.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = _c.llama_sampler_chain_init(params)
        self._penalties: Any = None

    def add_logit_bias(self, vocab: llama.Vocab, biases: Iterable[tuple[int, float]]) -> None:
        """Add a constant to the logits of some tokens; -inf bans one."""
        rows = [_c.llama_logit_bias(token=token, bias=bias) for token, bias in biases]
        native = (_c.llama_logit_bias * len(rows))(*rows)
        self._add(_c.llama_sampler_init_logit_bias(vocab.size, len(rows), native))

    def add_penalties(
        self, vocab: llama.Vocab, *, last_tokens: int, repetition: float, frequency: float, presence: float
    ) -> None:
        """Penalize tokens among the last ones accepted. `remember` gives it those of the prompt."""
        self._penalties = _c.llama_sampler_init_penalties(
            vocab.size, last_tokens, repetition, frequency, presence
        )
        self._add(self._penalties)

    def add_top_k(self, k: int) -> None:
        """Keep the `k` most likely candidates."""
        self._add(_c.llama_sampler_init_top_k(k))

    def add_top_p(self, p: float) -> None:
        """Keep the most likely candidates up to a cumulative probability."""
        self._add(_c.llama_sampler_init_top_p(p, 1))

    def add_min_p(self, p: float) -> None:
        """Keep candidates at least `p` times as likely as the best one."""
        self._add(_c.llama_sampler_init_min_p(p, 1))

    def add_temperature(self, temperature: float) -> None:
        """Divide the logits."""
        self._add(_c.llama_sampler_init_temp(temperature))

    def add_greedy(self) -> None:
        """Pick the best candidate. Last in a chain."""
        self._add(_c.llama_sampler_init_greedy())

    def add_distribution(self, seed: int) -> None:
        """Draw from what is left. Last in a chain."""
        self._add(_c.llama_sampler_init_dist(seed))

    def _add(self, sampler: Any) -> None:
        _c.llama_sampler_chain_add(self._chain, sampler)

    def remember(self, tokens: Iterable[int]) -> None:
        """Count tokens of the prompt towards the penalties."""
        if self._penalties is not None:
            for token in tokens:
                _c.llama_sampler_accept(self._penalties, token)

    def sample(self, context: llama.Context, row: int) -> int:
        """Pick the token that follows batch row `row` of the last decode, and count it as accepted."""
        return context.sample(self._chain, row)

    def pick(self, candidates: Candidates) -> int:
        """Pick one of the candidates without counting it as accepted."""
        _c.llama_sampler_apply(self._chain, candidates.native)
        return candidates.selected

    def accept(self, token: int) -> None:
        """Count a token that `pick` returned."""
        _c.llama_sampler_accept(self._chain, token)

    @property
    def names(self) -> list[str]:
        """Names of the samplers in the chain, in order."""
        chain = self._chain
        samplers = (
            _c.llama_sampler_chain_get(chain, index) for index in range(_c.llama_sampler_chain_n(chain))
        )
        return [str(_c.llama_sampler_name(sampler).decode()) for sampler in samplers]

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            _c.llama_sampler_free(self._chain)
            self._chain = None


class Candidates:
    """The tokens a sampler chooses among, with their logits. numpy is imported with the first of these."""

    def __init__(self, size: int) -> None:
        numpy: Any = importlib.import_module("numpy")
        self._size = size
        self._rows = numpy.zeros(size, dtype=[("token", "i4"), ("logit", "f4"), ("probability", "f4")])
        self._tokens = numpy.arange(size, dtype="i4")
        self._as_array = numpy.ctypeslib.as_array
        row_pointer: Any = _c.llama_token_data_p
        self._data: Any = ctypes.cast(self._rows.ctypes.data, row_pointer)
        self.native = _c.llama_token_data_array(data=self._data, size=size, selected=-1, sorted=False)

    def fill(self, context: llama.Context, row: int) -> None:
        """Take the logits of a batch row. Starts afresh: samplers reorder and shorten the array."""
        self._rows["token"] = self._tokens
        self._rows["logit"] = self._as_array(context.logits(row), shape=(self._size,))
        self.native.data = self._data
        self.native.size = self._size
        self.native.selected = -1
        self.native.sorted = False

    @property
    def selected(self) -> int:
        """The token that was picked."""
        return int(self.native.data[self.native.selected].id)

    @property
    def possible(self) -> bool:
        """Whether any token is left that is not banned. Only right after `fill` and `Grammar.restrict`."""
        return float(self._rows["logit"].max()) > -math.inf


class Grammar:
    """A GBNF grammar and how far the output is in it. One per sequence."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._one = _c.llama_token_data()

    @classmethod
    def parse(cls, vocab: llama.Vocab, text: str) -> Self | None:
        """Return the grammar, at its start symbol `root`; None when it is not one (the log says why)."""
        native = _c.llama_sampler_init_grammar(vocab.pointer, text.encode(), b"root")
        return cls(native) if native else None

    def clone(self) -> Self:
        """Return a copy, as far as this one is."""
        return type(self)(_c.llama_sampler_clone(self._native))

    def restrict(self, candidates: Candidates) -> None:
        """Ban every candidate that cannot come next. Slow: it looks at the whole vocabulary."""
        _c.llama_sampler_apply(self._native, candidates.native)

    def allows(self, token: int) -> bool:
        """Return whether the token can come next. Fast."""
        self._one.id = token
        self._one.logit = 1.0
        array = _c.llama_token_data_array(data=ctypes.pointer(self._one), size=1, selected=-1, sorted=False)
        _c.llama_sampler_apply(self._native, array)
        return float(self._one.logit) > -math.inf

    def accept(self, token: int) -> None:
        """Go on by a token, which must be allowed: llama.cpp ends the process otherwise."""
        _c.llama_sampler_accept(self._native, token)

    def close(self) -> None:
        """Free it."""
        if self._native:
            _c.llama_sampler_free(self._native)
            self._native = None
