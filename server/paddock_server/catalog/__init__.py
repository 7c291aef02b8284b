"""The models there are: on disk (a bounded GGUF header reader, the scan of the model directories), and as the
configuration files have them.

Nothing here is asynchronous; call it from a thread.
"""

from __future__ import annotations

from paddock_server.catalog.catalog import Catalog, file_problems
from paddock_server.catalog.configured.problems import InvalidConfigError, Place, Problem
from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError
from paddock_server.catalog.entries import CatalogEntry, CatalogProblem
from paddock_server.catalog.facts import ModelFacts, Split, merged_facts, model_facts
from paddock_server.catalog.gguf import GgufHeader, OmittedValue, TensorInfo, read_header
from paddock_server.catalog.roots import CatalogError
from paddock_server.catalog.setup import DEFAULT_SETUP, NO_DEFAULTS, ModelSetup, Origin, RequestDefaults

__all__ = [
    "DEFAULT_SETUP",
    "NO_DEFAULTS",
    "Catalog",
    "CatalogEntry",
    "CatalogError",
    "CatalogProblem",
    "GgufError",
    "GgufHeader",
    "InvalidConfigError",
    "ModelFacts",
    "ModelSetup",
    "OmittedValue",
    "Origin",
    "Place",
    "Problem",
    "RequestDefaults",
    "Split",
    "TensorInfo",
    "UnsupportedGgufError",
    "file_problems",
    "merged_facts",
    "model_facts",
    "read_header",
]
