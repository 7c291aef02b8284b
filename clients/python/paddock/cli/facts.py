"""What `paddock show` says about a model. Pure."""

from __future__ import annotations

from datetime import datetime

from rich.text import Text

from paddock.cli.output import (
    ago_text,
    bytes_text,
    count_text,
    download_text,
    seconds_text,
    state_text,
)
from paddock.types import HuggingFaceSource, Model, ModelSource, RuntimeOptions

Fact = tuple[str, str | Text]


def facts(model: Model, now: datetime | None = None) -> list[Fact]:
    """Return names and values, in the order they are shown."""
    return [
        ("Model", model.id),
        ("State", state_text(model.state)),
        ("Files", f"{_source(model.source)}, {bytes_text(model.size_bytes)}, {model.artifact_state}"),
        *_download(model),
        *_info(model),
        *_running(model, now),
        *_failure(model, now),
    ]


def _source(source: ModelSource | None) -> str:
    if source is None:
        return "-"
    if isinstance(source, HuggingFaceSource):
        return f"{source.repo_id}@{source.revision or 'main'} {source.file_pattern}"
    return source.path


def _download(model: Model) -> list[Fact]:
    download = model.download
    if download is None:
        return []
    figures = f"{bytes_text(download.completed_bytes)} of {bytes_text(download.total_bytes)}"
    rate = f", {bytes_text(download.bytes_per_second)}/s" if download.bytes_per_second else ""
    facts: list[Fact] = [("Download", Text.assemble(download_text(download), f", {figures}{rate}"))]
    return [*facts, ("", download.failure.message)] if download.failure is not None else facts


def _info(model: Model) -> list[Fact]:
    info = model.info
    if info is None:
        return []
    facts: list[Fact] = [("Name", info.display_name)] if info.display_name else []
    return [
        *facts,
        ("Architecture", info.architecture or "-"),
        ("Parameters", count_text(info.parameter_count)),
        ("Quantization", info.quantization or "-"),
        ("Trained context", f"{info.trained_context_tokens} tokens"),
        ("Vocabulary", f"{info.vocabulary_size} tokens"),
        ("Embedding", f"{info.embedding_dimension_count} dimensions"),
        ("Can", _abilities(has_chat_template=info.has_chat_template, embedding_only=info.embedding_only)),
    ]


def _abilities(*, has_chat_template: bool, embedding_only: bool) -> str:
    if embedding_only:
        return "embed"
    return "chat, complete" if has_chat_template else "complete (no chat template)"


def _running(model: Model, now: datetime | None) -> list[Fact]:
    facts: list[Fact] = []
    if model.worker is not None:
        worker = model.worker
        facts += [
            ("Worker", f"process {worker.pid}, {bytes_text(worker.resident_bytes)} resident"),
            (
                "Requests",
                f"{worker.active_request_count} running, {worker.queued_request_count} waiting",
            ),
            (
                "KV cache",
                f"{worker.kv_cache_used_tokens} of {worker.kv_cache_total_tokens} tokens"
                if worker.kv_cache_total_tokens
                else "-",
            ),
            ("Restarts", str(worker.restart_count)),
        ]
    if model.runtime_options is not None:
        facts.append(("Options", _options(model.runtime_options)))
    for name, time in (("Loaded", model.load_time), ("Used", model.last_use_time)):
        if time is not None:
            facts.append((name, ago_text(time, now)))
    if model.expire_time is not None:
        facts.append(("Unloads at", model.expire_time.astimezone().strftime("%Y-%m-%d %H:%M:%S")))
    return facts


def _options(options: RuntimeOptions) -> str:
    timeout = options.idle_timeout_seconds
    values = {
        "ctx-size": options.context_size_tokens,
        "parallel": options.slot_count,
        "n-gpu-layers": options.gpu_layer_count,
        "threads": options.thread_count,
        "batch-size": options.batch_size_tokens,
        "idle timeout": None if timeout is None else seconds_text(timeout) if timeout else "never",
    }
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "-"


def _failure(model: Model, now: datetime | None) -> list[Fact]:
    failure = model.last_failure
    if failure is None:
        return []
    facts: list[Fact] = [
        ("Last failure", Text(f"{failure.reason}, {ago_text(failure.failure_time, now)}", style="red")),
        ("", failure.message),
    ]
    if failure.signal:
        facts.append(("", f"ended by {failure.signal}"))
    if failure.exit_code is not None:
        facts.append(("", f"exit code {failure.exit_code}"))
    if failure.log_tail:
        facts.append(("Last log lines", Text("\n".join(failure.log_tail))))
    return facts
