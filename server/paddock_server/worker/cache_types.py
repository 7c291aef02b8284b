"""The types that keys and values may be kept in.

Used by the worker, and by the server for what it accepts and what it estimates, so that there is one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

CACHE_TYPE_NUMBERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "f32": 0,
        "f16": 1,
        "bf16": 30,
        "q8_0": 8,
        "q4_0": 2,
        "q4_1": 3,
        "iq4_nl": 20,
        "q5_0": 6,
        "q5_1": 7,
    }
)
"""ggml's numbers by llama-server's names, in its order."""

DEFAULT_CACHE_TYPE: Final = "f16"
"""What llama.cpp takes when nobody says."""
