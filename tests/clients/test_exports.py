from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import paddock

EXPORTED = [
    "ArtifactState",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "Code",
    "Completion",
    "ConfigProblem",
    "Device",
    "DeviceMemory",
    "Download",
    "DownloadStream",
    "Embeddings",
    "Failure",
    "FieldViolation",
    "FinishReason",
    "GenerateOptions",
    "GenerationStream",
    "HuggingFaceSource",
    "Image",
    "InsufficientMemoryError",
    "InvalidFieldError",
    "LoadFailedError",
    "LoadProgress",
    "LoadStream",
    "LocalSource",
    "LogLine",
    "LogStream",
    "MemoryEstimate",
    "MemoryPart",
    "MemoryVerdict",
    "Messages",
    "Modality",
    "Model",
    "ModelChanged",
    "ModelDeleted",
    "ModelInfo",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelOrigin",
    "ModelSource",
    "ModelState",
    "ModelUnavailableError",
    "PaddockError",
    "ProgressKind",
    "Prompt",
    "PromptProgress",
    "Reason",
    "Reloaded",
    "Role",
    "RuntimeOptions",
    "ServerInfo",
    "Stage",
    "Synced",
    "Timings",
    "TokenLogprob",
    "Tokenization",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolName",
    "Unloaded",
    "Usage",
    "WatchEvent",
    "WatchStream",
    "WorkerInfo",
]


def imports_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(inspect.getsource(paddock))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: statement.module or ""
        for node in guarded
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_the_package_exports_these_names() -> None:
    """A change of this list is a change for every user of the package."""
    assert sorted(paddock.__all__) == sorted(EXPORTED)


def test_what_type_checkers_see_is_what_there_is() -> None:
    seen = imports_for_type_checkers()

    assert set(seen) == set(paddock.__all__)
    assert set(paddock.__all__) <= set(dir(paddock))
    for name, module in seen.items():
        assert getattr(paddock, name) is getattr(import_module(module), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "nope"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        getattr(paddock, name)


def test_importing_the_messages_does_not_import_grpc() -> None:
    """A worker imports paddock.v1; grpc would cost it 35 ms and 14 MB."""
    code = "import paddock.v1.model_manager_pb2, paddock.errors, sys; sys.exit('grpc' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
