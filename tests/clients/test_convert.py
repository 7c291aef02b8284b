from __future__ import annotations

import pytest

from paddock import convert
from paddock.generation import FinishReason
from paddock.types import ArtifactState, HuggingFaceSource, ModelState, Stage
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

UNKNOWN = 999
"""A value of a newer server."""


def values(prefix: str, names: list[str]) -> list[tuple[str, str]]:
    """Pair every value of an enumeration with the name the client gives it; unspecified is never sent."""
    return [(name, name.removeprefix(prefix).lower()) for name in names if not name.endswith("UNSPECIFIED")]


@pytest.mark.parametrize(("name", "text"), values("MODEL_STATE_", model_pb2.ModelState.keys()))
def test_every_model_state_has_its_name(name: str, text: str) -> None:
    message = model_pb2.Model(state=model_pb2.ModelState.Value(name))

    assert convert.model(message).state is ModelState(text)


@pytest.mark.parametrize(("name", "text"), values("ARTIFACT_STATE_", model_pb2.ArtifactState.keys()))
def test_every_artifact_state_has_its_name(name: str, text: str) -> None:
    message = model_pb2.Model(artifact_state=model_pb2.ArtifactState.Value(name))

    assert convert.model(message).artifact_state is ArtifactState(text)


@pytest.mark.parametrize(("name", "text"), values("STAGE_", pb.Stage.keys()))
def test_every_stage_has_its_name(name: str, text: str) -> None:
    event = pb.ProgressEvent(stage=pb.Stage.Value(name), finished=pb.StageFinished())

    progress = convert.load_progress(event)

    assert progress is not None
    assert progress.stage is Stage(text)


@pytest.mark.parametrize(("name", "text"), values("FINISH_REASON_", gen.FinishReason.keys()))
def test_every_finish_reason_has_its_name(name: str, text: str) -> None:
    delta = gen.Delta(finish_reason=gen.FinishReason.Value(name))

    assert convert.chunk(delta).finish_reason is FinishReason(text)


def test_values_of_a_newer_server_are_unknown_and_no_error() -> None:
    model = convert.model(model_pb2.Model(state=UNKNOWN, artifact_state=UNKNOWN))  # pyright: ignore[reportArgumentType]
    delta = gen.Delta(finish_reason=UNKNOWN)  # pyright: ignore[reportArgumentType]

    assert (model.state, model.artifact_state) == (ModelState.UNKNOWN, ArtifactState.UNKNOWN)
    assert convert.chunk(delta).finish_reason is FinishReason.UNKNOWN
    assert convert.load_progress(pb.ProgressEvent(stage=pb.STAGE_SPAWN)) is None
    assert convert.watch_event(pb.WatchResponse(revision=1)) is None


@pytest.mark.parametrize(
    "name", [name for name in list(model_pb2.ModelOrigin.keys()) if "UNSPEC" not in name]
)
def test_every_origin_has_a_name(name: str) -> None:
    message = model_pb2.Model(origin=model_pb2.ModelOrigin.Value(name))

    assert convert.model(message).origin.name == name.removeprefix("MODEL_ORIGIN_")


@pytest.mark.parametrize("name", [name for name in list(model_pb2.Modality.keys()) if "UNSPEC" not in name])
def test_every_modality_has_a_name(name: str) -> None:
    info = model_pb2.ModelInfo(input_modalities=[model_pb2.Modality.Value(name)])
    converted = convert.model(model_pb2.Model(info=info)).info

    assert converted is not None
    assert [modality.name for modality in converted.input_modalities] == [name.removeprefix("MODALITY_")]


def test_an_empty_model_has_nothing_the_server_did_not_say() -> None:
    model = convert.model(model_pb2.Model(id="m"))

    assert model.source is None
    assert model.runtime_options is model.info is model.worker is model.last_failure is None
    assert model.load_time is model.last_use_time is model.expire_time is None


def test_a_hub_source_is_told_apart_from_a_local_one() -> None:
    message = model_pb2.Model()
    message.source.hugging_face.repo_id = "a/b"
    message.source.hugging_face.file_pattern = "*q4*"

    assert convert.model(message).source == HuggingFaceSource(repo_id="a/b", file_pattern="*q4*")


def test_a_chunk_carries_log_probabilities_and_tool_calls() -> None:
    delta = gen.Delta(
        choice_index=1,
        reasoning_text="hm",
        tool_calls=[gen.ToolCallDelta(call_index=2, id="c", name="f", arguments_json="{")],
        logprobs=[
            gen.TokenLogprob(
                token_id=5, token=b"\xc3", logprob=-0.5, top=[gen.TokenLogprob(token_id=6, logprob=-1)]
            )
        ],
    )

    chunk = convert.chunk(delta)

    assert (chunk.choice_index, chunk.reasoning_text, chunk.finish_reason) == (1, "hm", None)
    assert (chunk.tool_calls[0].call_index, chunk.tool_calls[0].arguments_json) == (2, "{")
    assert (chunk.logprobs[0].token, chunk.logprobs[0].top[0].logprob) == (b"\xc3", -1.0)


def test_zero_of_an_optional_field_is_zero_and_not_unknown() -> None:
    message = model_pb2.Model()
    message.last_failure.exit_code = 0
    message.runtime_options.context_size_tokens = 0
    message.runtime_options.idle_timeout.FromSeconds(0)

    model = convert.model(message)

    assert model.last_failure is not None
    assert model.last_failure.exit_code == 0
    assert model.runtime_options is not None
    assert model.runtime_options.context_size_tokens == 0
    assert model.runtime_options.idle_timeout_seconds == 0
    assert model.runtime_options.slot_count is None
