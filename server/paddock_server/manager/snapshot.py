"""What the world sees of a model. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import DEFAULT_SETUP, Origin
from paddock_server.manager.admission import device_bytes
from paddock_server.manager.residency import Stage
from paddock_server.manager.state import PUBLIC_STATES, Phase

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from paddock_server.catalog import CatalogEntry, ModelFacts, ModelSetup
    from paddock_server.manager.residency import Holding
    from paddock_server.manager.run import LiveWorker
    from paddock_server.manager.state import ActorState
    from paddock_server.supervisor import LogBatch


_ORIGINS: Final[Mapping[Origin, model_pb2.ModelOrigin.ValueType]] = {
    Origin.HUB_CACHE: model_pb2.MODEL_ORIGIN_HUB_CACHE,
    Origin.MODELS_DIR: model_pb2.MODEL_ORIGIN_MODELS_DIR,
    Origin.PRESET: model_pb2.MODEL_ORIGIN_PRESET,
    Origin.CONFIG_FILE: model_pb2.MODEL_ORIGIN_CONFIG_FILE,
}


class Listing(NamedTuple):
    """Models that can be listed, each made only when it is shown."""

    ids: Sequence[str]
    """In their order."""

    state_of: Callable[[str], model_pb2.ModelState.ValueType]
    model_of: Callable[[str], model_pb2.Model]
    revision: int


@dataclass(frozen=True, slots=True)
class Times:
    """When things happened, in seconds since the epoch; 0 for never."""

    loaded: float = 0.0
    last_use: float = 0.0
    failed: float = 0.0


@dataclass(frozen=True, slots=True)
class Clocks:
    """Now, by two clocks."""

    epoch: float
    """Seconds since the epoch."""

    loop: float
    """Seconds of the event loop's clock, which the state's times are of."""


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
        state.terms,
    )


def model_proto(
    entry: CatalogEntry,
    state: ActorState,
    worker: LiveWorker | None,
    times: Times,
    held: Holding | None,
    now: Clocks,
) -> model_pb2.Model:
    """Return the model as `List` shows it."""
    model = model_pb2.Model(
        id=entry.id,
        state=PUBLIC_STATES[state.phase],
        artifact_state=(
            model_pb2.ARTIFACT_STATE_ABSENT
            if state.gone or entry.is_absent
            else model_pb2.ARTIFACT_STATE_DOWNLOADED
        ),
        load_id=state.load_id,
        size_bytes=entry.size_bytes,
        lease_count=state.leases,
        waiting_request_count=len(state.waiters),
        pinned=state.terms.pinned,
        priority=state.terms.priority,
    )
    if entry.absent is not None:
        hub, absent = model.source.hugging_face, entry.absent
        hub.repo_id, hub.revision, hub.file_pattern = absent.repo_id, absent.revision, absent.pattern
    elif entry.hub is not None:
        hub = model.source.hugging_face
        hub.repo_id, hub.revision, hub.file_pattern = entry.hub.repo_id, entry.hub.commit, entry.hub.file
    else:
        model.source.local.path = entry.relative_path
    _add_setup(model, entry.setup)
    if entry.facts is not None:
        model.info.CopyFrom(_info(entry.facts, entry.projector))
    if state.phase is not Phase.UNLOADED:
        model.runtime_options.CopyFrom((state.effective or state.options).to_proto())
    if worker is not None:
        model.worker.CopyFrom(_worker(worker, state))
        model.workers.add().CopyFrom(model.worker)
    if state.failure is not None:
        model.last_failure.CopyFrom(state.failure.to_proto(times.failed))
    if state.phase is Phase.READY:
        _set(model.load_time, times.loaded)
        expire = _expire_time(state, now)
        if expire is not None:
            _set(model.expire_time, expire)
    if held is not None:
        model.memory.phase = _PHASES[held.stage]
        model.memory.bytes.update(device_bytes(held.cost))
    if times.last_use:
        _set(model.last_use_time, times.last_use)
    return model


def _expire_time(state: ActorState, now: Clocks) -> float | None:
    """Return when the model goes or falls asleep, if nobody uses it; None: it does not."""
    options = state.options
    bounds = [seconds for seconds in (options.idle_timeout_seconds, options.sleep_timeout_seconds) if seconds]
    if not bounds or state.terms.pinned:
        return None
    begun = now.loop if state.leases else state.idle_since
    return max(begun + min(bounds), state.keep_until) - now.loop + now.epoch


_PHASES: Final = {
    Stage.RESERVED: model_pb2.MEMORY_PHASE_PREDICTED,
    Stage.COMMITTED: model_pb2.MEMORY_PHASE_MEASURED,
    Stage.RELEASING: model_pb2.MEMORY_PHASE_RELEASING,
}


def _worker(worker: LiveWorker, state: ActorState) -> model_pb2.Worker:
    proto = model_pb2.Worker(
        pid=worker.pid, restart_count=state.restart_count, resident_bytes=worker.resident_bytes()
    )
    if state.effective is not None:  # known with the load; what is used of it comes with heartbeats
        proto.kv_cache_total_tokens = state.effective.context_size_tokens
    _set(proto.start_time, worker.start_time)
    heartbeat = worker.heartbeat
    if heartbeat is not None:
        proto.active_request_count = heartbeat.active_sequence_count
        proto.queued_request_count = heartbeat.queued_request_count
        proto.kv_cache_used_tokens = heartbeat.kv_cache_used_tokens
    return proto


def forgotten(name: str) -> model_pb2.Model:
    """Return a model of which there was nothing but what was remembered."""
    return model_pb2.Model(
        id=name, state=model_pb2.MODEL_STATE_UNLOADED, artifact_state=model_pb2.ARTIFACT_STATE_ABSENT
    )


def logs_response(batch: LogBatch) -> pb.StreamLogsResponse:
    """Return lines of a log as they are streamed."""
    response = pb.StreamLogsResponse(dropped_line_count=batch.dropped_line_count)
    for line in batch.lines:
        added = response.lines.add(load_id=line.load_id, pid=line.pid, text=line.text)
        added.read_time.FromNanoseconds(int(line.read_time * 1e9))
    return response


def _add_setup(model: model_pb2.Model, setup: ModelSetup) -> None:
    model.origin = _ORIGINS[setup.origin]
    if setup is DEFAULT_SETUP:
        return
    model.aliases.extend(setup.aliases)
    model.tags.extend(setup.tags)
    model.description = setup.description
    model.group = setup.group
    model.load_on_startup = setup.load_on_startup


def _info(facts: ModelFacts, projector: ModelFacts | None) -> model_pb2.ModelInfo:
    modalities = [model_pb2.MODALITY_TEXT]
    if projector is not None and projector.has_vision_encoder:
        modalities.append(model_pb2.MODALITY_IMAGE)
    if projector is not None and projector.has_audio_encoder:
        modalities.append(model_pb2.MODALITY_AUDIO)
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
        input_modalities=modalities,
        template_has_tools=facts.template_has_tools,
        template_has_thinking=facts.template_has_thinking,
    )


def _set(timestamp: Timestamp, seconds: float) -> None:
    timestamp.FromNanoseconds(int(seconds * 1e9))
