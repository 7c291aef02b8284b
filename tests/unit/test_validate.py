"""Requests are refused before anything is done for them, and the field is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from paddock.errors import InvalidFieldError, PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc import validate

UNKNOWN: Any = 9
UNSPECIFIED: Any = 0
USER = gen.ChatMessage(role=gen.ROLE_USER, content=[gen.ContentPart(text="hi")])


def _generate(**fields: Any) -> pb.GenerateRequest:
    defaults: dict[str, Any] = {"model": "m", "prompt": "hi"}
    return pb.GenerateRequest(**(defaults | fields))


def _chat(**fields: Any) -> pb.GenerateRequest:
    defaults: dict[str, Any] = {"messages": [USER]}
    return pb.GenerateRequest(model="m", chat=gen.ChatInput(**(defaults | fields)))


def _message(**fields: Any) -> pb.GenerateRequest:
    return _chat(messages=[gen.ChatMessage(**fields)])


BAD_GENERATIONS = [
    ("model", pb.GenerateRequest(prompt="hi")),
    ("model", _generate(model="m" * 513)),
    ("input", pb.GenerateRequest(model="m")),
    ("tokens.token_ids", pb.GenerateRequest(model="m", tokens=gen.TokenInput())),
    ("tokens.token_ids[1]", pb.GenerateRequest(model="m", tokens=gen.TokenInput(token_ids=[1, -1]))),
    ("chat.messages", pb.GenerateRequest(model="m", chat=gen.ChatInput())),
    ("chat.messages[0].role", _message(content=[gen.ContentPart(text="hi")])),
    ("chat.messages[0].tool_calls", _message(role=gen.ROLE_USER, tool_calls=[gen.ToolCall(name="f")])),
    ("chat.messages[0].tool_call_id", _message(role=gen.ROLE_TOOL)),
    ("chat.messages[0].content[0]", _message(role=gen.ROLE_USER, content=[gen.ContentPart()])),
    (
        "chat.messages[0].tool_calls[0].arguments_json",
        _message(role=gen.ROLE_ASSISTANT, tool_calls=[gen.ToolCall(name="f", arguments_json="[")]),
    ),
    ("chat.tools[0].name", _chat(tools=[gen.Tool(name="a b")])),
    ("chat.tools[0].parameters_json_schema", _chat(tools=[gen.Tool(name="f", parameters_json_schema="1")])),
    ("chat.tool_choice.tool_name", _chat(tool_choice=gen.ToolChoice(tool_name="g"))),
    ("chat.template_arguments_json", _chat(template_arguments_json="[" * 100_000)),
    ("choice_count", _generate(choice_count=9)),
    ("choice_count", _generate(choice_count=-1)),
    ("autoload_policy", _generate(autoload_policy=7)),
    ("sampling.temperature", _generate(sampling=gen.SamplingParams(temperature=-0.1))),
    ("sampling.temperature", _generate(sampling=gen.SamplingParams(temperature=math.nan))),
    ("sampling.temperature", _generate(sampling=gen.SamplingParams(temperature=math.inf))),
    ("sampling.top_p", _generate(sampling=gen.SamplingParams(top_p=0))),
    ("sampling.top_k", _generate(sampling=gen.SamplingParams(top_k=-1))),
    ("sampling.min_p", _generate(sampling=gen.SamplingParams(min_p=1.5))),
    ("sampling.presence_penalty", _generate(sampling=gen.SamplingParams(presence_penalty=3))),
    ("sampling.frequency_penalty", _generate(sampling=gen.SamplingParams(frequency_penalty=-3))),
    ("sampling.repetition_penalty", _generate(sampling=gen.SamplingParams(repetition_penalty=0))),
    ("sampling.penalty_last_tokens", _generate(sampling=gen.SamplingParams(penalty_last_tokens=-2))),
    ("sampling.logit_bias[-1]", _generate(sampling=gen.SamplingParams(logit_bias={-1: 1}))),
    ("sampling.logit_bias[3]", _generate(sampling=gen.SamplingParams(logit_bias={3: math.nan}))),
    (
        "sampling.logit_bias",
        _generate(sampling=gen.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ),
    ("stop.max_tokens", _generate(stop=gen.StopParams(max_tokens=0))),
    ("stop.stop_sequences", _generate(stop=gen.StopParams(stop_sequences=["a"] * 17))),
    ("stop.stop_sequences[0]", _generate(stop=gen.StopParams(stop_sequences=[""]))),
    ("logprobs.top_count", _generate(logprobs=gen.LogprobParams(top_count=21))),
    ("constraint", _generate(constraint=gen.OutputConstraint())),
    ("constraint.json_schema", _generate(constraint=gen.OutputConstraint(json_schema="{"))),
    ("constraint.grammar", _generate(constraint=gen.OutputConstraint(grammar=" "))),
]


@pytest.mark.parametrize(
    ("field", "request_"),
    BAD_GENERATIONS,
    ids=[f"{index}-{field}" for index, (field, _) in enumerate(BAD_GENERATIONS)],
)
def test_a_bad_field_of_generate_is_named(field: str, request_: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        validate.generate(request_)

    assert [field] == [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    "request_",
    [
        _generate(),
        _generate(prompt=""),
        _chat(template_arguments_json='{"enable_thinking": false}'),
        _generate(
            sampling=gen.SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, logit_bias={5: -math.inf})
        ),
        _chat(tools=[gen.Tool(name="f")], tool_choice=gen.ToolChoice(mode=gen.TOOL_CHOICE_MODE_NONE)),
        _generate(choice_count=8, stop=gen.StopParams(max_tokens=1, stop_sequences=["\n"])),
    ],
    ids=["prompt", "empty-prompt", "template-arguments", "edges", "tools", "choices"],
)
def test_a_good_generate_passes(request_: pb.GenerateRequest) -> None:
    validate.generate(request_)


@pytest.mark.parametrize("mode", [gen.TOOL_CHOICE_MODE_UNSPECIFIED, gen.TOOL_CHOICE_MODE_REQUIRED])
def test_tools_the_model_might_call_are_refused_before_a_model_is_loaded(
    mode: gen.ToolChoiceMode.ValueType,
) -> None:
    with pytest.raises(PaddockError) as caught:
        validate.generate(_chat(tools=[gen.Tool(name="f")], tool_choice=gen.ToolChoice(mode=mode)))

    assert caught.value.reason == Reason.NOT_IMPLEMENTED
    assert caught.value.metadata == {"field": "chat.tools"}


BAD_REQUESTS = [
    ("model", validate.load, pb.LoadRequest()),
    ("conflict_policy", validate.load, pb.LoadRequest(model="m", conflict_policy=UNKNOWN)),
    ("load_timeout", validate.load, pb.LoadRequest(model="m", load_timeout=Duration())),
    ("mode", validate.unload, pb.UnloadRequest(model="m", mode=UNKNOWN)),
    ("drain_timeout", validate.unload, pb.UnloadRequest(model="m", drain_timeout=Duration(seconds=-1))),
    ("page_size", validate.list_models, pb.ListRequest(page_size=-1)),
    ("states[0]", validate.list_models, pb.ListRequest(states=[UNSPECIFIED])),
    ("texts", validate.embed, pb.EmbedRequest(model="m")),
    ("texts", validate.embed, pb.EmbedRequest(model="m", texts=["a"] * 65)),
    ("token_ids[0]", validate.detokenize, pb.DetokenizeRequest(model="m", token_ids=[-5])),
    ("tail_line_count", validate.stream_logs, pb.StreamLogsRequest(model="m", tail_line_count=-1)),
]


@pytest.mark.parametrize(
    ("field", "check", "request_"),
    BAD_REQUESTS,
    ids=[f"{i}-{field}" for i, (field, _, _) in enumerate(BAD_REQUESTS)],
)
def test_a_bad_field_of_any_request_is_named(field: str, check: Any, request_: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check(request_)

    assert [field] == [violation.field for violation in caught.value.violations]
