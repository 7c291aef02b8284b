"""What the world sees of a model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paddock.v1 import model_pb2
from paddock_server.manager.state import PUBLIC_STATES, Phase

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from paddock_server.catalog import CatalogEntry, ModelFacts
    from paddock_server.manager.run import LiveWorker
    from paddock_server.manager.state import ActorState


@dataclass(frozen=True, slots=True)
class Times:
    """When things happened, in seconds since the epoch; 0 for never."""

    loaded: float = 0.0
    last_use: float = 0.0
    failed: float = 0.0


def public_state(state: ActorState) -> model_pb2.ModelState.ValueType:
    """Return the state the world sees."""
    return PUBLIC_STATES[state.phase]


def visible(state: ActorState) -> tuple[object, ...]:
    """Return what watchers are told of when it changes. Use is not among it: it changes all the time."""
    return (
        PUBLIC_STATES[state.phase],
        state.load_id,
        state.options,
        state.effective,
        state.failure,
        state.restart_count,
        state.gone,
    )


def model_proto(
    entry: CatalogEntry, state: ActorState, worker: LiveWorker | None, times: Times, now: float
) -> model_pb2.Model:
    """Return the model as `List` shows it. `now` is in seconds since the epoch."""
    model = model_pb2.Model(
        id=entry.id,
        state=PUBLIC_STATES[state.phase],
        artifact_state=model_pb2.ARTIFACT_STATE_ABSENT if state.gone else model_pb2.ARTIFACT_STATE_DOWNLOADED,
        load_id=state.load_id,
        size_bytes=entry.size_bytes,
    )
    if entry.hub is not None:
        hub = model.source.hugging_face
        hub.repo_id, hub.revision, hub.file_pattern = entry.hub.repo_id, entry.hub.commit, entry.hub.file
    else:
        model.source.local.path = entry.relative_path
    if entry.facts is not None:
        model.info.CopyFrom(_info(entry.facts))
    if state.phase is not Phase.UNLOADED:
        model.runtime_options.CopyFrom((state.effective or state.options).to_proto())
    if worker is not None:
        model.worker.CopyFrom(_worker(worker, state.restart_count))
    if state.failure is not None:
        model.last_failure.CopyFrom(state.failure.to_proto(times.failed))
    if state.phase is Phase.READY:
        _set(model.load_time, times.loaded)
        idle = state.options.idle_timeout_seconds
        if idle > 0:
            used = now if state.leases else max(times.last_use, times.loaded)
            _set(model.expire_time, used + idle)
    if times.last_use:
        _set(model.last_use_time, times.last_use)
    return model


def _worker(worker: LiveWorker, restart_count: int) -> model_pb2.Worker:
    proto = model_pb2.Worker(
        pid=worker.pid, restart_count=restart_count, resident_bytes=worker.resident_bytes()
    )
    _set(proto.start_time, worker.start_time)
    heartbeat = worker.heartbeat
    if heartbeat is not None:
        proto.active_request_count = heartbeat.active_sequence_count
        proto.queued_request_count = heartbeat.queued_request_count
        proto.kv_cache_used_tokens = heartbeat.kv_cache_used_tokens
        proto.kv_cache_total_tokens = heartbeat.kv_cache_total_tokens
    return proto


def _info(facts: ModelFacts) -> model_pb2.ModelInfo:
    return model_pb2.ModelInfo(
        architecture=facts.architecture,
        quantization=facts.quantization,
        parameter_count=facts.parameter_count,
        trained_context_tokens=facts.trained_context_tokens or 0,
        embedding_dimension_count=facts.embedding_length or 0,
        has_chat_template=facts.has_chat_template,
        vocabulary_size=facts.vocabulary_size or 0,
        display_name=facts.name,
        embedding_only=facts.is_embedding_model,
    )


def _set(timestamp: Timestamp, seconds: float) -> None:
    timestamp.FromNanoseconds(int(seconds * 1e9))
