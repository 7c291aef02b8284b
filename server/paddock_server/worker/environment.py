"""Environment variables the libraries of a worker read when they are loaded."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

LIBRARY_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        # A thread that waits for the others of its step sleeps after this many turns. OpenMP's own choice is
        # to spin for milliseconds, which is right on an idle machine only: with another program on the same
        # cores a step then takes five to ten times as long (bench/README.md has the figures).
        "GOMP_SPINCOUNT": "1000",
        # numpy is along for a few logits at a time; its threads would only be in the way.
        "OPENBLAS_NUM_THREADS": "1",
    }
)


def set_library_environment() -> None:
    """Set what is not set yet. To be called before llama_cpp or numpy is imported."""
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
