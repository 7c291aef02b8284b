"""The models there are: on disk (a bounded GGUF header reader, the scan of model directories and of the hub's
cache), and as the configuration files have them.

Nothing here is asynchronous; call it from a thread.
"""

from __future__ import annotations

from paddock_server.catalog.catalog import Catalog, file_problems
from paddock_server.catalog.configured.problems import InvalidConfigError, Place, Problem
from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError
from paddock_server.catalog.entries import CatalogEntry, CatalogProblem
from paddock_server.catalog.facts import ModelFacts, Split, merged_facts, model_facts
from paddock_server.catalog.ggml_types import TENSOR_TYPES, TensorType
from paddock_server.catalog.gguf import GgufHeader, OmittedValue, TensorInfo, read_header
from paddock_server.catalog.hub_cache import HubOrigin
from paddock_server.catalog.hub_names import HubNameError, HubRef, hub_ref, parse_hub_name
from paddock_server.catalog.roots import CatalogError
from paddock_server.catalog.setup import DEFAULT_SETUP, NO_DEFAULTS, ModelSetup, Origin, RequestDefaults
from paddock_server.catalog.weights import TensorGroup, Weights, repacked_bytes

__all__ = [
    "DEFAULT_SETUP",
    "NO_DEFAULTS",
    "TENSOR_TYPES",
    "Catalog",
    "CatalogEntry",
    "CatalogError",
    "CatalogProblem",
    "GgufError",
    "GgufHeader",
    "HubNameError",
    "HubOrigin",
    "HubRef",
    "InvalidConfigError",
    "ModelFacts",
    "ModelSetup",
    "OmittedValue",
    "Origin",
    "Place",
    "Problem",
    "RequestDefaults",
    "Split",
    "TensorGroup",
    "TensorInfo",
    "TensorType",
    "UnsupportedGgufError",
    "Weights",
    "file_problems",
    "hub_ref",
    "merged_facts",
    "model_facts",
    "parse_hub_name",
    "read_header",
    "repacked_bytes",
]
