"""Makes the tiny GGUF files that tests run on, `python -m tests.models make DIR`; every one of them is noise.

Makers take the path of the file to write, `DIR/NAME.gguf`, and return the files they wrote, first the one to
load; a model of several shards gets the folder `DIR/NAME`. The same arguments make the same bytes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from gguf import PoolingType

from tests.models.bench import make_bench_model
from tests.models.embed import make_embedder
from tests.models.noise import make_noise
from tests.models.scripted import make_scripted
from tests.models.text import BROKEN, CHATML_WITH_BOS, RAISING
from tests.models.wrong import WRONG_MODELS, WrongModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Maker = Callable[[Path], list[Path]]

__all__ = [
    "MODELS",
    "WRONG_MODELS",
    "WrongModel",
    "make_all",
    "make_bench_model",
    "make_embedder",
    "make_noise",
    "make_scripted",
]


def _sharded(path: Path) -> list[Path]:
    return make_noise(path.with_suffix("") / path.name, seed=3, name="Noise in three shards", shards=3)


MODELS: Final[dict[str, Maker]] = {
    "noise": make_noise,
    "noise-b": partial(
        make_noise, seed=2, name="Noise B, a template with a BOS", chat_template=CHATML_WITH_BOS
    ),
    "sharded": _sharded,
    "multibyte": partial(
        make_noise, seed=4, name="Noise with characters of several tokens", multibyte_share=0.5
    ),
    "stops": partial(make_noise, seed=5, name="Noise that stops at once", stop_share=0.3),
    "no-template": partial(make_noise, seed=6, name="Noise without a chat template", chat_template=None),
    "sliding": partial(make_noise, name="Noise, two layers of which have a sliding window", window=32),
    "template-raises": partial(
        make_noise, seed=7, name="Noise, a template that raises", chat_template=RAISING
    ),
    "template-broken": partial(make_noise, seed=8, name="Noise, no template at all", chat_template=BROKEN),
    "scripted": partial(
        make_scripted, script="The lamp at the end of the pier is lit. One, two, three, dark. 😀 終"
    ),
    "embed": make_embedder,
    "embed-cls": partial(make_embedder, seed=2, pooling=PoolingType.CLS),
}
"""The models that load, by name."""


def make_all(folder: Path, names: Iterable[str] = MODELS) -> dict[str, list[Path]]:
    """Make the named models in a folder and return their files by name. KeyError for an unknown name."""
    return {name: MODELS[name](folder / f"{name}.gguf") for name in names}
