"""Messages of `paddock.v1` to the types of the client. Pure; `paddock.requests` is the other direction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from paddock import generation, types
from paddock.generation import FinishReason
from paddock.types import (
    ArtifactState,
    MemoryPhase,
    MemoryVerdict,
    Modality,
    ModelOrigin,
    ModelState,
    ProgressKind,
    Stage,
)
from paddock.v1 import generation_pb2, model_manager_pb2, model_pb2

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

_MODEL_STATES: Final[Mapping[int, ModelState]] = {
    model_pb2.MODEL_STATE_UNLOADED: ModelState.UNLOADED,
    model_pb2.MODEL_STATE_LOADING: ModelState.LOADING,
    model_pb2.MODEL_STATE_LOADED: ModelState.LOADED,
    model_pb2.MODEL_STATE_SLEEPING: ModelState.SLEEPING,
    model_pb2.MODEL_STATE_UNLOADING: ModelState.UNLOADING,
    model_pb2.MODEL_STATE_FAILED: ModelState.FAILED,
}

_ARTIFACT_STATES: Final[Mapping[int, ArtifactState]] = {
    model_pb2.ARTIFACT_STATE_ABSENT: ArtifactState.ABSENT,
    model_pb2.ARTIFACT_STATE_DOWNLOADING: ArtifactState.DOWNLOADING,
    model_pb2.ARTIFACT_STATE_DOWNLOADED: ArtifactState.DOWNLOADED,
}

_MEMORY_PHASES: Final[Mapping[int, MemoryPhase]] = {
    model_pb2.MEMORY_PHASE_PREDICTED: MemoryPhase.PREDICTED,
    model_pb2.MEMORY_PHASE_MEASURED: MemoryPhase.MEASURED,
    model_pb2.MEMORY_PHASE_RELEASING: MemoryPhase.RELEASING,
}

_STAGES: Final[Mapping[int, Stage]] = {
    model_manager_pb2.STAGE_RESOLVE: Stage.RESOLVE,
    model_manager_pb2.STAGE_DOWNLOAD: Stage.DOWNLOAD,
    model_manager_pb2.STAGE_VERIFY: Stage.VERIFY,
    model_manager_pb2.STAGE_ADMIT: Stage.ADMIT,
    model_manager_pb2.STAGE_SPAWN: Stage.SPAWN,
    model_manager_pb2.STAGE_WEIGHTS: Stage.WEIGHTS,
    model_manager_pb2.STAGE_WARMUP: Stage.WARMUP,
}

_FINISH_REASONS: Final[Mapping[int, FinishReason]] = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


MEMORY_VERDICTS: Final[Mapping[int, MemoryVerdict]] = {
    model_manager_pb2.MEMORY_VERDICT_FITS: MemoryVerdict.FITS,
    model_manager_pb2.MEMORY_VERDICT_FITS_AFTER_EVICTION: MemoryVerdict.FITS_AFTER_EVICTION,
    model_manager_pb2.MEMORY_VERDICT_NEVER_FITS: MemoryVerdict.NEVER_FITS,
}

_PART_PREFIX: Final = "MEMORY_PART_KIND_"

_ORIGINS: Final = {
    model_pb2.MODEL_ORIGIN_HUB_CACHE: ModelOrigin.HUB_CACHE,
    model_pb2.MODEL_ORIGIN_MODELS_DIR: ModelOrigin.MODELS_DIR,
    model_pb2.MODEL_ORIGIN_PRESET: ModelOrigin.PRESET,
    model_pb2.MODEL_ORIGIN_CONFIG_FILE: ModelOrigin.CONFIG_FILE,
}

_MODALITIES: Final = {
    model_pb2.MODALITY_TEXT: Modality.TEXT,
    model_pb2.MODALITY_IMAGE: Modality.IMAGE,
    model_pb2.MODALITY_AUDIO: Modality.AUDIO,
}


def model(message: model_pb2.Model) -> types.Model:
    """Convert a model."""
    return types.Model(
        id=message.id,
        state=_MODEL_STATES.get(message.state, ModelState.UNKNOWN),
        artifact_state=_ARTIFACT_STATES.get(message.artifact_state, ArtifactState.UNKNOWN),
        source=_source(message.source),
        load_id=message.load_id,
        runtime_options=(
            _runtime_options(message.runtime_options) if message.HasField("runtime_options") else None
        ),
        info=_model_info(message.info) if message.HasField("info") else None,
        worker=_worker(message.worker) if message.HasField("worker") else None,
        workers=_workers(message),
        last_failure=failure(message.last_failure) if message.HasField("last_failure") else None,
        size_bytes=message.size_bytes,
        load_time=_time(message.load_time) if message.HasField("load_time") else None,
        last_use_time=_time(message.last_use_time) if message.HasField("last_use_time") else None,
        expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
        memory=_memory(message.memory) if message.HasField("memory") else None,
        lease_count=message.lease_count,
        waiting_request_count=message.waiting_request_count,
        aliases=tuple(message.aliases),
        tags=tuple(message.tags),
        pinned=message.pinned,
        priority=message.priority,
        origin=_ORIGINS.get(message.origin, ModelOrigin.UNKNOWN),
        description=message.description,
        group=message.group,
        load_on_startup=message.load_on_startup,
        download=_download(message.download) if message.HasField("download") else None,
    )


def _workers(message: model_pb2.Model) -> tuple[types.WorkerInfo, ...]:
    """A server that knows no replicas names the only worker and no list."""
    if not message.workers and message.HasField("worker"):
        return (_worker(message.worker),)
    return tuple(_worker(worker) for worker in message.workers)


def failure(message: model_pb2.Failure) -> types.Failure:
    """Convert a stored failure."""
    return types.Failure(
        reason=message.reason,
        message=message.message,
        metadata=dict(message.metadata),
        failure_time=_time(message.failure_time) if message.HasField("failure_time") else None,
        log_tail=tuple(message.log_tail),
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal,
    )


def load_progress(event: model_manager_pb2.ProgressEvent) -> types.LoadProgress | None:
    """Convert an event of a load; `None` for a kind this client does not know."""
    stage = _STAGES.get(event.stage, Stage.UNKNOWN)
    time = _time(event.event_time) if event.HasField("event_time") else None
    match event.WhichOneof("detail"):
        case "started":
            return types.LoadProgress(
                stage=stage, kind=ProgressKind.STARTED, event_time=time, message=event.started.message
            )
        case "advanced":
            advanced = event.advanced
            return types.LoadProgress(
                stage=stage,
                kind=ProgressKind.ADVANCED,
                event_time=time,
                fraction=advanced.fraction if advanced.HasField("fraction") else None,
                completed_bytes=advanced.completed_bytes,
                total_bytes=advanced.total_bytes,
            )
        case "finished":
            finished = event.finished
            return types.LoadProgress(
                stage=stage,
                kind=ProgressKind.FINISHED,
                event_time=time,
                cached=finished.cached,
                stage_seconds=(
                    _seconds(finished.stage_duration) if finished.HasField("stage_duration") else None
                ),
            )
        case "warning":
            return types.LoadProgress(
                stage=stage,
                kind=ProgressKind.WARNING,
                event_time=time,
                warning=failure(event.warning.failure),
            )
        case _:
            return None


def watch_event(response: model_manager_pb2.WatchResponse) -> types.WatchEvent | None:
    """Convert an event of a watch; `None` for a kind this client does not know."""
    match response.WhichOneof("event"):
        case "changed":
            previous = response.changed.previous_state
            return types.ModelChanged(
                revision=response.revision,
                model=model(response.changed.model),
                previous_state=_MODEL_STATES.get(previous, ModelState.UNKNOWN) if previous else None,
            )
        case "deleted":
            return types.ModelDeleted(revision=response.revision, model=response.deleted.model)
        case "synced":
            return types.Synced(revision=response.revision)
        case _:
            return None


def chunk(delta: generation_pb2.Delta) -> generation.Chunk:
    """Convert a piece of a generation."""
    finish = delta.finish_reason
    return generation.Chunk(
        choice_index=delta.choice_index,
        text=delta.text,
        reasoning_text=delta.reasoning_text,
        tool_calls=tuple(
            generation.ToolCallDelta(call.call_index, call.id, call.name, call.arguments_json)
            for call in delta.tool_calls
        ),
        logprobs=tuple(_logprob(entry) for entry in delta.logprobs),
        finish_reason=_FINISH_REASONS.get(finish, FinishReason.UNKNOWN) if finish else None,
        stop_sequence=delta.stop_sequence,
        token_count=delta.token_count,
    )


def usage(message: generation_pb2.Usage) -> generation.Usage:
    """Convert token counts."""
    return generation.Usage(
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        completion_tokens=message.completion_tokens,
    )


def timings(message: generation_pb2.Timings) -> generation.Timings:
    """Convert durations."""
    return generation.Timings(
        load_seconds=_seconds(message.load_duration),
        queue_seconds=_seconds(message.queue_duration),
        prompt_seconds=_seconds(message.prompt_duration),
        generation_seconds=_seconds(message.generation_duration),
    )


def log_line(message: model_manager_pb2.LogLine) -> types.LogLine:
    """Convert a log line."""
    return types.LogLine(
        read_time=_time(message.read_time) if message.HasField("read_time") else None,
        load_id=message.load_id,
        pid=message.pid,
        text=message.text,
    )


def memory_estimate(message: model_manager_pb2.EstimateMemoryResponse) -> types.MemoryEstimate:
    """Convert what a model would take in memory."""
    return types.MemoryEstimate(
        parts=tuple(
            types.MemoryPart(device=part.device, kind=_part_kind(part.kind), size_bytes=part.size_bytes)
            for part in message.parts
        ),
        devices=tuple(
            types.DeviceMemory(
                device=device.device,
                needed_bytes=device.needed_bytes,
                budget_bytes=device.budget_bytes,
                held_bytes=device.held_bytes,
                measured=device.measured,
            )
            for device in message.devices
        ),
        verdict=MEMORY_VERDICTS.get(message.verdict, MemoryVerdict.UNKNOWN),
        options=_runtime_options(message.runtime_options),
        roughness=message.roughness,
    )


def _part_kind(kind: model_manager_pb2.MemoryPartKind.ValueType) -> str:
    """Return the name of a kind as programs use it; one of a newer server is `other`."""
    if kind not in model_manager_pb2.MemoryPartKind.values():
        return "other"
    return model_manager_pb2.MemoryPartKind.Name(kind).removeprefix(_PART_PREFIX).lower()


def reloaded(message: model_manager_pb2.ReloadResponse) -> types.Reloaded:
    """Convert what a reload changed."""
    return types.Reloaded(
        added=tuple(message.added),
        changed=tuple(message.changed),
        removed=tuple(message.removed),
        unchanged_count=message.unchanged_count,
        problems=tuple(
            types.ConfigProblem(file=one.file, line=one.line, key=one.key, message=one.message)
            for one in message.problems
        ),
    )


def server_info(message: model_manager_pb2.GetServerInfoResponse) -> types.ServerInfo:
    """Convert what the server says about itself."""
    return types.ServerInfo(
        version=message.version,
        instance_id=message.instance_id,
        start_time=_time(message.start_time) if message.HasField("start_time") else None,
        features=tuple(message.features),
        devices=tuple(
            types.Device(
                display_name=device.display_name,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
                budget_bytes=device.budget_bytes,
                held_bytes=device.held_bytes,
            )
            for device in message.devices
        ),
    )


def _memory(message: model_pb2.MemoryCharge) -> types.MemoryCharge:
    return types.MemoryCharge(
        phase=_MEMORY_PHASES.get(message.phase, MemoryPhase.UNKNOWN), bytes=dict(message.bytes)
    )


def _download(message: model_pb2.Download) -> types.Download:
    return types.Download(
        completed_bytes=message.completed_bytes,
        total_bytes=message.total_bytes,
        bytes_per_second=message.bytes_per_second,
        paused=message.paused,
        failure=failure(message.failure) if message.HasField("failure") else None,
    )


def _source(message: model_pb2.ModelSource) -> types.ModelSource | None:
    match message.WhichOneof("source"):
        case "local":
            return types.LocalSource(path=message.local.path)
        case "hugging_face":
            hub = message.hugging_face
            return types.HuggingFaceSource(
                repo_id=hub.repo_id, file_pattern=hub.file_pattern, revision=hub.revision
            )
        case _:
            return None


def _runtime_options(message: model_pb2.RuntimeOptions) -> types.RuntimeOptions:
    return types.RuntimeOptions(
        context_size_tokens=(
            message.context_size_tokens if message.HasField("context_size_tokens") else None
        ),
        gpu_layer_count=message.gpu_layer_count if message.HasField("gpu_layer_count") else None,
        slot_count=message.slot_count if message.HasField("slot_count") else None,
        idle_timeout_seconds=(_seconds(message.idle_timeout) if message.HasField("idle_timeout") else None),
        sleep_timeout_seconds=(
            _seconds(message.sleep_timeout) if message.HasField("sleep_timeout") else None
        ),
        thread_count=message.thread_count if message.HasField("thread_count") else None,
        batch_size_tokens=message.batch_size_tokens if message.HasField("batch_size_tokens") else None,
        cache_type_k=message.cache_type_k if message.HasField("cache_type_k") else None,
        cache_type_v=message.cache_type_v if message.HasField("cache_type_v") else None,
        replica_count=message.replica_count if message.HasField("replica_count") else None,
    )


def _model_info(message: model_pb2.ModelInfo) -> types.ModelInfo:
    return types.ModelInfo(
        architecture=message.architecture,
        quantization=message.quantization,
        parameter_count=message.parameter_count,
        trained_context_tokens=message.trained_context_tokens,
        embedding_dimension_count=message.embedding_dimension_count,
        has_chat_template=message.has_chat_template,
        vocabulary_size=message.vocabulary_size,
        display_name=message.display_name,
        embedding_only=message.embedding_only,
        input_modalities=tuple(
            _MODALITIES[modality] for modality in message.input_modalities if modality in _MODALITIES
        ),
        template_has_tools=message.template_has_tools,
        template_has_thinking=message.template_has_thinking,
    )


def _worker(message: model_pb2.Worker) -> types.WorkerInfo:
    return types.WorkerInfo(
        pid=message.pid,
        start_time=_time(message.start_time) if message.HasField("start_time") else None,
        restart_count=message.restart_count,
        active_request_count=message.active_request_count,
        queued_request_count=message.queued_request_count,
        resident_bytes=message.resident_bytes,
        kv_cache_used_tokens=message.kv_cache_used_tokens,
        kv_cache_total_tokens=message.kv_cache_total_tokens,
    )


def _logprob(message: generation_pb2.TokenLogprob) -> generation.TokenLogprob:
    return generation.TokenLogprob(
        message.token_id, message.token, message.logprob, tuple(_logprob(entry) for entry in message.top)
    )


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def _seconds(message: Duration) -> float:
    return message.ToNanoseconds() / 1e9
