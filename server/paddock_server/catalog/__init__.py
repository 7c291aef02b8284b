"""The models on disk: a bounded GGUF header reader, and the scan of the model directories.

Nothing here is asynchronous; call it from a thread.
"""

from __future__ import annotations

from paddock_server.catalog.cursor import GgufError, UnsupportedGgufError
from paddock_server.catalog.directory import Catalog
from paddock_server.catalog.entries import CatalogEntry, CatalogProblem
from paddock_server.catalog.facts import ModelFacts, Split, merged_facts, model_facts
from paddock_server.catalog.ggml_types import TENSOR_TYPES, TensorType
from paddock_server.catalog.gguf import GgufHeader, OmittedValue, TensorInfo, read_header
from paddock_server.catalog.roots import CatalogError
from paddock_server.catalog.weights import TensorGroup, Weights, repacked_bytes

__all__ = [
    "TENSOR_TYPES",
    "Catalog",
    "CatalogEntry",
    "CatalogError",
    "CatalogProblem",
    "GgufError",
    "GgufHeader",
    "ModelFacts",
    "OmittedValue",
    "Split",
    "TensorGroup",
    "TensorInfo",
    "TensorType",
    "UnsupportedGgufError",
    "Weights",
    "merged_facts",
    "model_facts",
    "read_header",
    "repacked_bytes",
]
