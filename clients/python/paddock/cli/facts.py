"""What `paddock show` says about a model. Pure."""

from __future__ import annotations

from datetime import datetime

from rich.text import Text

from paddock.cli.listing import expiry_verb, file_fault
from paddock.cli.output import (
    ago_text,
    count_text,
    download_text,
    seconds_since,
    seconds_text,
    state_text,
)
from paddock.sizes import size_text
from paddock.types import HuggingFaceSource, Model, ModelOrigin, ModelSource, RuntimeOptions

Fact = tuple[str, str | Text]


def facts(model: Model, now: datetime | None = None) -> list[Fact]:
    """Return names and values, in the order they are shown."""
    return [
        ("Model", model.id),
        *_names(model),
        ("State", state_text(model.state)),
        ("Files", _files(model)),
        *_download(model),
        *_info(model),
        *_running(model, now),
        *_failure(model, now),
    ]


def _names(model: Model) -> list[Fact]:
    """Return what the configuration says, as far as it says anything."""
    facts = [
        ("Description", model.description),
        ("Aliases", ", ".join(model.aliases)),
        ("Tags", ", ".join(model.tags)),
        ("Group", model.group),
        ("Priority", str(model.priority) if model.priority else ""),
        ("Kept", "pinned" if model.pinned else ""),
        ("Loaded at the start", "yes" if model.load_on_startup else ""),
        ("Known from", "" if model.origin is ModelOrigin.UNKNOWN else model.origin.replace("_", " ")),
    ]
    return [(name, value) for name, value in facts if value]


def _files(model: Model) -> str:
    """Return where the files are, and how: what lies in a directory of the server was not downloaded."""
    state = file_fault(model)
    if not state and isinstance(model.source, HuggingFaceSource):
        state = str(model.artifact_state)
    return ", ".join(filter(None, (_source(model.source), size_text(model.size_bytes), state)))


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
    figures = f"{size_text(download.completed_bytes)} of {size_text(download.total_bytes)}"
    rate = f", {size_text(download.bytes_per_second)}/s" if download.bytes_per_second else ""
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
    for worker in model.workers:
        facts += [
            ("Worker", f"process {worker.pid}, {size_text(worker.resident_bytes)} resident"),
            (
                "KV cache",
                f"{worker.kv_cache_used_tokens} of {worker.kv_cache_total_tokens} tokens"
                if worker.kv_cache_total_tokens
                else "-",
            ),
            ("Restarts", str(worker.restart_count)),
        ]
    requests = _requests(model)
    if requests:
        facts.append(("Requests", requests))
    if model.memory is not None and model.memory.bytes:
        sizes = ", ".join(
            f"{device} {size_text(size)}" for device, size in sorted(model.memory.bytes.items())
        )
        facts.append(("Memory", f"{sizes} ({model.memory.phase})"))
    if model.runtime_options is not None:
        facts.append(("Options", _options(model.runtime_options)))
    for name, time in (("Loaded", model.load_time), ("Used", model.last_use_time)):
        if time is not None:
            facts.append((name, ago_text(time, now)))
    if model.expire_time is not None:
        left = seconds_text(max(-seconds_since(model.expire_time, now), 0))
        at = model.expire_time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        facts.append((expiry_verb(model).capitalize(), f"in {left}, at {at}"))
    return facts


def _requests(model: Model) -> str:
    """Return what requests do with the model; empty where none does anything and it has no worker."""
    worker = model.worker
    counts = [
        (model.lease_count, "use it", worker is not None),
        (worker.active_request_count if worker else 0, "decoded now", worker is not None),
        (worker.queued_request_count if worker else 0, "waiting for a slot", False),
        (model.waiting_request_count, "waiting for the load", False),
    ]
    return ", ".join(f"{count} {what}" for count, what, always in counts if count or always)


def _options(options: RuntimeOptions) -> str:
    values = {
        "ctx-size": options.context_size_tokens,
        "parallel": options.slot_count,
        "n-gpu-layers": options.gpu_layer_count,
        "threads": options.thread_count,
        "batch-size": options.batch_size_tokens,
        "cache-type-k": options.cache_type_k,
        "cache-type-v": options.cache_type_v,
        "idle timeout": _time_text(options.idle_timeout_seconds),
        "sleep timeout": _time_text(options.sleep_timeout_seconds),
        "replicas": options.replica_count,
    }
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "-"


def _time_text(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return seconds_text(seconds) if seconds else "never"


def _failure(model: Model, now: datetime | None) -> list[Fact]:
    failure = model.last_failure
    if failure is None:
        return []
    facts: list[Fact] = [
        ("Last failure", Text(f"{failure.reason}, {ago_text(failure.failure_time, now)}", style="red")),
        ("", failure.message),
    ]
    # The message of most failures has it already.
    if failure.signal and failure.signal not in failure.message:
        facts.append(("", f"ended by {failure.signal}"))
    if failure.exit_code is not None and f"code {failure.exit_code}" not in failure.message:
        facts.append(("", f"exit code {failure.exit_code}"))
    if failure.log_tail:
        facts.append(("Last log lines", Text("\n".join(failure.log_tail))))
    return facts
