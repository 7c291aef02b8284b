"""One sequence as the scheduler sees it: its tokens, and how many of them are in the KV cache."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final

NO_SLOT: Final = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens of one choice of a generation. `tokens` grows by one with every token generated."""

    group: int
    """Number of the generation. Sequences of one group begin with the same prompt."""

    order: int
    """Age: the lower, the older. Of two that want the same cells the older one gets them."""

    tokens: array[int]
    """Prompt and output."""

    prompt_length: int
    """Tokens of the prompt, the first of `tokens`."""

    evaluated: int = 0
    """Leading tokens whose state is in the KV cache."""

    slot: int = NO_SLOT
    """Sequence id in the KV cache while it runs."""

    started: bool = field(default=False)
    """Whether it ever had a slot."""

    @property
    def pending(self) -> int:
        """Tokens still to evaluate. One of them, the last, has its successor sampled."""
        return len(self.tokens) - self.evaluated

    @property
    def generated(self) -> int:
        """Tokens of output."""
        return len(self.tokens) - self.prompt_length
