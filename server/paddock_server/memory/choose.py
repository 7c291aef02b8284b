"""Which context and how many sequences fit. Pure."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from paddock_server.memory.estimate import estimate, padded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paddock_server.memory.estimate import LoadOptions, Placement
    from paddock_server.memory.shape import Shape

LEAST_CONTEXT_TOKENS: Final = 2048
"""A context below this is worth less than fewer sequences: prompts with their answers no longer fit."""

_STEP: Final = 256
_UNTRAINED_CONTEXT_TOKENS: Final = 4096
"""Largest context of a model that does not say what it was trained with."""


class Verdict(Enum):
    """Whether a model fits: now, once others have gone, or never."""

    FITS = auto()
    FITS_AFTER_EVICTION = auto()
    NEVER_FITS = auto()


def verdict(needed: Mapping[str, int], budget: Mapping[str, int], held: Mapping[str, int]) -> Verdict:
    """Return whether a need fits; bytes by device. A device without a budget has no room."""
    if not _fits(needed, budget):
        return Verdict.NEVER_FITS
    left = {device: size - held.get(device, 0) for device, size in budget.items()}
    return Verdict.FITS if _fits(needed, left) else Verdict.FITS_AFTER_EVICTION


def chosen(
    shape: Shape,
    options: LoadOptions,
    placement: Placement,
    budget: Mapping[str, int],
    *,
    keeps_slots: bool = False,
) -> LoadOptions:
    """Return the options with a context in place of 0: the trained one, or the largest that fits the budget.

    Sequences are given up, unless `keeps_slots`, before the context gets shorter than LEAST_CONTEXT_TOKENS.
    Where nothing fits, the smallest is returned; other contexts than 0 are left as they are. `budget` is in
    bytes by device.
    """
    if options.context_size_tokens or not shape.has_memory:
        return options
    trained = shape.trained_context_tokens or _UNTRAINED_CONTEXT_TOKENS
    least = min(LEAST_CONTEXT_TOKENS, padded(trained))

    def fits(tokens: int, slots: int) -> bool:
        tried = replace(options, context_size_tokens=tokens, slot_count=slots)
        return _fits(estimate(shape, tried, placement).totals, budget)

    slots = options.slot_count
    while slots > 1 and not keeps_slots and not fits(least, slots):
        slots //= 2
    if fits(trained, slots):
        return replace(options, context_size_tokens=trained, slot_count=slots)
    # What fits is below what does not: halve the steps between them. Nothing at all leaves one step.
    low, high = 1, padded(trained) // _STEP
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * _STEP, slots):
            low = middle
        else:
            high = middle
    return replace(options, context_size_tokens=min(low * _STEP, trained), slot_count=slots)


def _fits(needed: Mapping[str, int], room: Mapping[str, int]) -> bool:
    return all(size <= room.get(device, 0) for device, size in needed.items())
