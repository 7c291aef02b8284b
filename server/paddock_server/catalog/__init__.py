"""The models on disk: a bounded GGUF header reader, and the scan of model directories and of the hub's cache.

Nothing here is asynchronous; call it from a thread.
"""

from __future__ import annotations

from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError
from paddock_server.catalog.directory import Catalog
from paddock_server.catalog.entries import CatalogEntry, CatalogProblem
from paddock_server.catalog.facts import ModelFacts, Split, merged_facts, model_facts
from paddock_server.catalog.gguf import GgufHeader, OmittedValue, TensorInfo, read_header
from paddock_server.catalog.hub_cache import HubOrigin
from paddock_server.catalog.hub_names import HubNameError, HubRef, hub_ref, parse_hub_name
from paddock_server.catalog.roots import CatalogError

__all__ = [
    "Catalog",
    "CatalogEntry",
    "CatalogError",
    "CatalogProblem",
    "GgufError",
    "GgufHeader",
    "HubNameError",
    "HubOrigin",
    "HubRef",
    "ModelFacts",
    "OmittedValue",
    "Split",
    "TensorInfo",
    "UnsupportedGgufError",
    "hub_ref",
    "merged_facts",
    "model_facts",
    "parse_hub_name",
    "read_header",
]
