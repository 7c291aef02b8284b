"""What a failure becomes on the command line: an exit code and a sentence. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import IntEnum
from typing import Final

from paddock.errors import PaddockError, Reason, row_of


class ExitCode(IntEnum):
    """What the exit code of every command says."""

    OK = 0
    FAILED = 1
    """Failed in a way no other code says."""
    USAGE = 2
    """An argument is wrong."""
    NOT_FOUND = 3
    """There is no such model."""
    SERVER_UNREACHABLE = 4
    UNAVAILABLE = 5
    """Not now; the same command may work in a moment."""
    CANNOT_LOAD = 6
    """The model cannot be loaded until something about it, or about the machine, changes."""
    INTERRUPTED = 130
    """Ctrl-C."""


_EXIT_CODES: Final[Mapping[str, ExitCode]] = {
    Reason.SERVER_UNREACHABLE: ExitCode.SERVER_UNREACHABLE,
    Reason.MODEL_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.HUB_FILE_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.INVALID_FIELD: ExitCode.USAGE,
    Reason.INVALID_GRAMMAR: ExitCode.USAGE,
    Reason.CONTEXT_LENGTH_EXCEEDED: ExitCode.USAGE,
    Reason.CRASH_LOOP: ExitCode.CANNOT_LOAD,
    Reason.UNSUPPORTED_MODEL: ExitCode.CANNOT_LOAD,
    Reason.MODEL_CORRUPT: ExitCode.CANNOT_LOAD,
    Reason.LOAD_STALLED: ExitCode.CANNOT_LOAD,
    Reason.INSUFFICIENT_MEMORY: ExitCode.CANNOT_LOAD,
    Reason.DISK_FULL: ExitCode.CANNOT_LOAD,
}


FLAGS: Final[Mapping[str, str]] = {
    "model": "MODEL",
    "runtime_options.context_size_tokens": "--ctx-size",
    "runtime_options.slot_count": "--parallel",
    "runtime_options.gpu_layer_count": "--n-gpu-layers",
    "runtime_options.thread_count": "--threads",
    "runtime_options.batch_size_tokens": "--batch-size",
    "runtime_options.cache_type_k": "--cache-type-k",
    "runtime_options.cache_type_v": "--cache-type-v",
    "runtime_options.replica_count": "--replicas",
    "runtime_options.idle_timeout": "--idle-timeout-seconds",
    "runtime_options.sleep_timeout": "--sleep-idle-seconds",
    "load_timeout": "--timeout-seconds",
    "drain_timeout": "--drain-seconds",
    "tail_line_count": "--tail",
    "sampling.temperature": "--temperature",
    "sampling.top_p": "--top-p",
    "sampling.top_k": "--top-k",
    "sampling.min_p": "--min-p",
    "sampling.seed": "--seed",
    "stop.max_tokens": "--max-tokens",
    "stop.stop_sequences": "--stop",
    "keep_alive": "--keep-alive",
}
"""What is typed for a field of a request. A field that is not here has nothing typed for it."""


def _invalid(error: PaddockError) -> str:
    """Return what is wrong with what was typed, by the names it was typed under."""
    return "; ".join(
        f"{FLAGS.get(one.field.partition('[')[0], one.field)}: {one.description}" for one in error.violations
    )


def exit_code(reason: str) -> ExitCode:
    """Return the exit code for the reason of an error."""
    if reason in _EXIT_CODES:
        return _EXIT_CODES[reason]
    return ExitCode.UNAVAILABLE if row_of(reason).retryable else ExitCode.FAILED


_NEAR: Final = 0.7
"""Likeness of names, of 1, from which one is a hint: below, short names are like anything."""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that somebody may have meant, likeliest first."""
    by_plain: dict[str, str] = {}
    for other in known:
        by_plain.setdefault(_plain(other), other)
    return [by_plain[near] for near in get_close_matches(_plain(name), by_plain, n=3, cutoff=_NEAR)]


def _plain(name: str) -> str:
    """Return a name without what people get wrong about names."""
    return name.casefold().removeprefix("hf:").removesuffix(".gguf")


def _not_found(name: str, near: Iterable[str]) -> str:
    """Return what to tell of a name that no model has."""
    start = f"There is no model named {name!r}."
    if meant := ", ".join(near):
        return f"{start} Did you mean {meant}?"
    start += " `paddock ls` shows the models there are."
    if name.startswith("hf:"):
        return f"{start} `paddock pull {name}` downloads it."
    if name.startswith(_PATH_STARTS) or name.casefold().endswith(".gguf"):
        return f"{start} A path is no name: `paddock up --models-dir` serves files."
    return start


_PATH_STARTS: Final = ("/", "./", "../", "~")
"""How a path begins that cannot be the name of a model. FOLDER/NAME can."""


def describe(error: PaddockError, server: str, near: Iterable[str] = ()) -> str:
    """Return what to tell the person at the keyboard: what happened, and what to do about it.

    `near` are names like that of a model there is not.
    """
    model = error.resource or error.metadata.get("model")
    match error.reason:
        case Reason.SERVER_UNREACHABLE:
            return (
                f"No Paddock server answers at {server}. "
                "Start it with `paddock up`, or name another with --server."
            )
        case Reason.MODEL_NOT_FOUND if model:
            return _not_found(model, near)
        case Reason.INVALID_FIELD if error.violations:
            return _invalid(error)
        case Reason.MODEL_NOT_LOADED if model:
            return f"The model {model!r} is not loaded. Load it with `paddock load {model}`."
        case Reason.OPTIONS_CONFLICT if model:
            names = error.metadata.get("fields", "of another load").split(",")
            fields = ", ".join(FLAGS.get(f"runtime_options.{name.strip()}", name.strip()) for name in names)
            return (
                f"The model {model!r} is loaded with other options ({fields}). "
                "`--on-conflict reload` loads it again, `--on-conflict keep` takes it as it is."
            )
        case Reason.CRASH_LOOP | Reason.WORKER_CRASHED if model:
            return f"{error.message} `paddock logs {model}` shows what its worker wrote."
        case Reason.INTERNAL if error.request_id:
            return f"{error.message} The server's log says more under the request id {error.request_id}."
        case Reason.HUB_UNREACHABLE if "status" not in error.metadata:
            return error.message  # nobody answered: to try again in a moment is no advice
        case _ if error.row.retryable:
            return f"{error.message} Try again in {error.retry_after_seconds or 1:g} s."
        case _:
            return error.message
