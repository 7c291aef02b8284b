"""Client of Paddock, the server that loads, serves and unloads language models.

Names are imported on first use (PEP 562): a worker process that imports `paddock.v1` must not pay for grpc.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from paddock.client import Client
    from paddock.errors import (
        Code,
        FieldViolation,
        InsufficientMemoryError,
        InvalidFieldError,
        LoadFailedError,
        ModelNotFoundError,
        ModelNotLoadedError,
        ModelUnavailableError,
        PaddockError,
        Reason,
    )
    from paddock.generation import (
        ChatMessage,
        Choice,
        Chunk,
        Completion,
        Embeddings,
        FinishReason,
        GenerateOptions,
        Image,
        Messages,
        Prompt,
        PromptProgress,
        Role,
        Timings,
        Tokenization,
        TokenLogprob,
        Tool,
        ToolCall,
        ToolCallDelta,
        ToolName,
        Usage,
    )
    from paddock.streams import DownloadStream, GenerationStream, LoadStream, LogStream, WatchStream
    from paddock.types import (
        ArtifactState,
        Device,
        Download,
        Failure,
        HuggingFaceSource,
        LoadProgress,
        LocalSource,
        LogLine,
        Model,
        ModelChanged,
        ModelDeleted,
        ModelInfo,
        ModelSource,
        ModelState,
        ProgressKind,
        RuntimeOptions,
        ServerInfo,
        Stage,
        Synced,
        Unloaded,
        WatchEvent,
        WorkerInfo,
    )

__all__ = [
    "ArtifactState",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "Code",
    "Completion",
    "Device",
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
    "Messages",
    "Model",
    "ModelChanged",
    "ModelDeleted",
    "ModelInfo",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelSource",
    "ModelState",
    "ModelUnavailableError",
    "PaddockError",
    "ProgressKind",
    "Prompt",
    "PromptProgress",
    "Reason",
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

_MODULES: Final = {
    "paddock.client": ("Client",),
    "paddock.errors": (
        "Code",
        "FieldViolation",
        "InsufficientMemoryError",
        "InvalidFieldError",
        "LoadFailedError",
        "ModelNotFoundError",
        "ModelNotLoadedError",
        "ModelUnavailableError",
        "PaddockError",
        "Reason",
    ),
    "paddock.generation": (
        "ChatMessage",
        "Choice",
        "Chunk",
        "Completion",
        "Embeddings",
        "FinishReason",
        "GenerateOptions",
        "Image",
        "Messages",
        "Prompt",
        "PromptProgress",
        "Role",
        "Timings",
        "TokenLogprob",
        "Tokenization",
        "Tool",
        "ToolCall",
        "ToolCallDelta",
        "ToolName",
        "Usage",
    ),
    "paddock.streams": ("DownloadStream", "GenerationStream", "LoadStream", "LogStream", "WatchStream"),
    "paddock.types": (
        "ArtifactState",
        "Device",
        "Download",
        "Failure",
        "HuggingFaceSource",
        "LoadProgress",
        "LocalSource",
        "LogLine",
        "Model",
        "ModelChanged",
        "ModelDeleted",
        "ModelInfo",
        "ModelSource",
        "ModelState",
        "ProgressKind",
        "RuntimeOptions",
        "ServerInfo",
        "Stage",
        "Synced",
        "Unloaded",
        "WatchEvent",
        "WorkerInfo",
    ),
}
"""Where each name lives. The imports above say the same to type checkers; a test compares them."""

_MODULE_OF: Final = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # a checker that sees it takes every name for defined

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULE_OF.keys())
