"""How a model is to be served: what its source says of it beside its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class Origin(Enum):
    """Where a model comes from, lowest precedence first: what a later one says wins."""

    HUB_CACHE = auto()
    MODELS_DIR = auto()
    PRESET = auto()
    CONFIG_FILE = auto()


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """What a request takes for fields it leaves unset, by the name of the model it asks for.

    `sampling` is by the names of `SamplingParams`; an empty text and None set nothing.
    """

    sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    max_tokens: int | None = None
    system_prompt: str = ""
    template_arguments_json: str = ""


NO_DEFAULTS = RequestDefaults()


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """How to serve one loaded model.

    `options` are those of its loads, by their names in `RuntimeOptions`; what is left out is the server's
    affair. `names` are all names it can be asked for by, its id among them, with what requests by that name
    take for unset fields; `aliases` are those of them that are listed beside the id. The times are None where
    they are the server's affair. Of the models of one `group` that is
    `exclusive` only one may be loaded at a time.
    """

    origin: Origin = Origin.MODELS_DIR
    names: Mapping[str, RequestDefaults] = field(default_factory=dict[str, RequestDefaults])
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pinned: bool = False
    priority: int = 0
    group: str = ""
    exclusive: bool = False
    load_on_startup: bool = False
    hidden: bool = False
    description: str = ""
    options: Mapping[str, int | str] = field(default_factory=dict[str, int | str])
    idle_timeout_seconds: float | None = None
    sleep_timeout_seconds: float | None = None
    drain_seconds: float | None = None


DEFAULT_SETUP = ModelSetup()
