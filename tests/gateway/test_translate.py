"""OpenAI requests to `GenerateRequest`s, and names back: pure."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from paddock.errors import InvalidFieldError
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_gateway.parameters import Dialect
from paddock_gateway.refusal import RequestRefusedError
from paddock_gateway.translate import MAX_PROMPTS, Plan, plan_of
from tests.gateway.clients import CHAT, COMPLETION


def chat_plan(**more: Any) -> Plan:
    return plan_of(Dialect.CHAT, json.dumps({**CHAT, **more}).encode())


def chat(**more: Any) -> pb.GenerateRequest:
    (request,) = chat_plan(**more).requests
    return request


def completions(**more: Any) -> tuple[pb.GenerateRequest, ...]:
    return plan_of(Dialect.COMPLETION, json.dumps({**COMPLETION, **more}).encode()).requests


def test_a_request_that_names_no_model_leaves_the_choice_to_the_server() -> None:
    body = {name: value for name, value in CHAT.items() if name != "model"}
    (request,) = plan_of(Dialect.CHAT, json.dumps(body).encode()).requests

    assert request.model == chat(model="").model == ""


def refused(dialect: Dialect, **more: Any) -> InvalidFieldError:
    body = CHAT if dialect is Dialect.CHAT else COMPLETION
    with pytest.raises(InvalidFieldError) as caught:
        plan_of(dialect, json.dumps({**body, **more}).encode())
    return caught.value


def test_every_sampling_parameter_reaches_its_field() -> None:
    request = chat(
        temperature=0,
        top_p=0.25,
        top_k=3,
        min_p=0.5,
        presence_penalty=-1,
        frequency_penalty=2,
        repeat_penalty=1.5,
        repeat_last_n=-1,
        seed=2**40,
        logit_bias={"7": -100, "8": 2.5},
        n=3,
        ignore_eos=True,
        stop=["a", "b"],
    )

    assert request.sampling == gen.SamplingParams(
        temperature=0,
        top_p=0.25,
        top_k=3,
        min_p=0.5,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.5,
        penalty_last_tokens=-1,
        seed=2**40,
        logit_bias={7: -100, 8: 2.5},
    )
    assert request.stop == gen.StopParams(stop_sequences=["a", "b"], ignore_eos=True)
    assert request.choice_count == 3


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(300, 300), (1.5, 1.5), ("5m", 300), ("1h30m", 5400), (-1, 2_592_000), ("-1m", 2_592_000)],
)
def test_keep_alive_is_seconds_or_a_duration(keep_alive: float | str, seconds: float) -> None:
    for request in (chat(keep_alive=keep_alive), *completions(keep_alive=keep_alive)):
        assert request.keep_alive.ToNanoseconds() == seconds * 1e9


@pytest.mark.parametrize("keep_alive", [0, -0.0, "+0", "0s"])
def test_a_keep_alive_of_0_is_no_wish(keep_alive: float | str) -> None:
    assert not chat(keep_alive=keep_alive).HasField("keep_alive")


@pytest.mark.parametrize("keep_alive", ["", "5", "5 m", "m", "1d", 2_592_001, "721h", True, [1], {"s": 1}])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_any_other_keep_alive_is_refused_by_name(dialect: Dialect, keep_alive: object) -> None:
    assert refused(dialect, keep_alive=keep_alive).violations[0].field == "keep_alive"


def test_what_is_left_out_stays_unset_so_that_the_models_defaults_apply() -> None:
    request = chat()

    assert request.sampling == gen.SamplingParams()
    assert not request.stop.HasField("max_tokens")
    assert not request.HasField("logprobs")
    assert not request.HasField("constraint")


def test_developer_is_system_and_content_may_be_text_or_parts() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ]
    )

    assert list(request.chat.messages) == [
        gen.ChatMessage(role=gen.ROLE_SYSTEM, content=[gen.ContentPart(text="be brief")]),
        gen.ChatMessage(role=gen.ROLE_USER, content=[gen.ContentPart(text="a"), gen.ContentPart(text="b")]),
        gen.ChatMessage(
            role=gen.ROLE_ASSISTANT,
            tool_calls=[gen.ToolCall(id="c1", name="f", arguments_json='{"x": 1}')],
        ),
        gen.ChatMessage(role=gen.ROLE_TOOL, content=[gen.ContentPart(text="done")], tool_call_id="c1"),
    ]


def test_an_image_as_a_data_url_travels_as_bytes() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()

    request = chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])

    assert request.chat.messages[0].content[0].image == gen.Image(data=b"\x89PNG", media_type="image/png")


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, ".image_url.url"),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,", "detail": "low"}},
            ".image_url.detail",
        ),
        ({"type": "image_url"}, ".image_url"),
        ({"type": "text"}, ".text"),
        ({"type": "video"}, ".type"),
        ({"type": "input_audio", "input_audio": {}}, ".input_audio"),
        ({"type": "text", "text": "a", "prompt_cache_breakpoint": {}}, ".prompt_cache_breakpoint"),
    ],
)
def test_content_that_cannot_be_shown_to_the_model_is_refused_by_its_path(
    part: dict[str, Any], path: str
) -> None:
    error = refused(
        Dialect.CHAT,
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, part]}],
    )

    assert error.violations[0].field == f"messages[0].content[1]{path}"


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ("hello", "messages[0]"),
    ],
)
def test_a_message_that_is_wrong_is_refused_by_its_path(message: object, path: str) -> None:
    assert refused(Dialect.CHAT, messages=[message]).violations[0].field == path


def test_max_completion_tokens_wins_and_contradiction_is_refused_naming_both() -> None:
    assert chat(max_completion_tokens=5).stop.max_tokens == 5
    assert chat(max_tokens=6).stop.max_tokens == 6
    assert chat(max_tokens=7, max_completion_tokens=7).stop.max_tokens == 7

    error = refused(Dialect.CHAT, max_tokens=1, max_completion_tokens=2)

    assert error.violations[0].field == "max_completion_tokens"
    assert "max_tokens is 1" in error.message


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_blamed_by_the_name_it_was_given_under(name: str) -> None:
    assert chat_plan(**{name: 5}).name_of("stop.max_tokens") == name


def test_either_name_of_the_repetition_penalty_works_and_is_remembered() -> None:
    assert chat(repetition_penalty=1.5) == chat(repeat_penalty=1.5)
    assert chat_plan(repetition_penalty=1).name_of("sampling.repetition_penalty") == "repetition_penalty"
    assert chat_plan(repeat_penalty=1).name_of("sampling.repetition_penalty") == "repeat_penalty"
    assert (
        refused(Dialect.CHAT, repeat_penalty=1, repetition_penalty=2).violations[0].field == "repeat_penalty"
    )


def test_a_schema_beside_json_object_is_blamed_where_it_stands() -> None:
    plan = chat_plan(response_format={"type": "json_object", "schema": {"type": "null"}})

    assert plan.name_of("constraint.json_schema") == "response_format.schema"


@pytest.mark.parametrize(
    ("dialect", "field", "name"),
    [
        (Dialect.CHAT, "sampling.top_p", "top_p"),
        (Dialect.CHAT, "sampling.logit_bias[12]", "logit_bias[12]"),
        (Dialect.CHAT, "stop.stop_sequences[3]", "stop[3]"),
        (Dialect.CHAT, "choice_count", "n"),
        (Dialect.CHAT, "logprobs.top_count", "top_logprobs"),
        (Dialect.COMPLETION, "logprobs.top_count", "logprobs"),
        (Dialect.CHAT, "chat.messages[2].role", "messages[2].role"),
        (Dialect.CHAT, "chat.messages", "messages"),
        (
            Dialect.CHAT,
            "chat.messages[1].tool_calls[0].arguments_json",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (Dialect.CHAT, "chat.tools", "tools"),
        (Dialect.CHAT, "chat.tools[1].name", "tools[1].function.name"),
        (Dialect.CHAT, "chat.tools[0].parameters_json_schema", "tools[0].function.parameters"),
        (Dialect.CHAT, "chat.tool_choice.tool_name", "tool_choice.function.name"),
        (Dialect.CHAT, "chat.template_arguments_json", "chat_template_kwargs"),
        (Dialect.CHAT, "constraint.json_schema", "response_format.json_schema.schema"),
        (Dialect.CHAT, "constraint.grammar", "grammar"),
        (Dialect.COMPLETION, "tokens.token_ids[4]", "prompt[4]"),
        (Dialect.COMPLETION, "prompt", "prompt"),
        (Dialect.CHAT, "input", "messages"),
        (Dialect.COMPLETION, "input", "prompt"),
        (Dialect.CHAT, "model", "model"),
        (Dialect.CHAT, "something.new", "something.new"),
    ],
)
def test_fields_of_the_service_have_the_names_callers_know(dialect: Dialect, field: str, name: str) -> None:
    body = CHAT if dialect is Dialect.CHAT else COMPLETION

    assert plan_of(dialect, json.dumps(body).encode()).name_of(field) == name


def test_a_json_schema_travels_as_the_text_it_came_as() -> None:
    schema = '{"type":"object", "properties":{"z":{"type":"number"},"a":{"minimum":1.0}}}'
    body = json.dumps({**CHAT, "response_format": "@"}).replace(
        '"@"', '{"type":"json_schema","json_schema":{"name":"x","strict":true,"schema":' + schema + "}}"
    )

    (request,) = plan_of(Dialect.CHAT, body.encode()).requests

    assert request.constraint.json_schema == schema


@pytest.mark.parametrize(
    ("response_format", "constraint"),
    [
        ({"type": "json_object"}, gen.OutputConstraint(json_object=True)),
        (
            {"type": "json_object", "schema": {"type": "null"}},
            gen.OutputConstraint(json_schema='{"type": "null"}'),
        ),
        ({"type": "text"}, gen.OutputConstraint()),
    ],
)
def test_response_format_becomes_a_constraint(
    response_format: dict[str, Any], constraint: gen.OutputConstraint
) -> None:
    assert chat(response_format=response_format).constraint == constraint


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "description": "x"}}},
            "response_format.json_schema.description",
        ),
        ({"response_format": {"type": "json_object"}, "grammar": "x"}, "grammar"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "x", "function": {"name": "x"}}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "strict": True}}]},
            "tools[0].function.strict",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.allowed_tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"return_progress": True}, "return_progress"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**40): 1}}, "logit_bias"),
        ({"model": None}, "model"),
        ({"generation_config": "{"}, "generation_config"),
        ({"generation_config": '{"top_k": "x"}'}, "generation_config.top_k"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_path(values: dict[str, Any], path: str) -> None:
    assert refused(Dialect.CHAT, **values).violations[0].field == path


def test_tools_are_passed_on_with_their_schema_as_text() -> None:
    request = chat(
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "d",
                    "parameters": {"type": "object", "b": 1, "a": 2},
                },
            }
        ],
        tool_choice="none",
    )

    assert list(request.chat.tools) == [
        gen.Tool(name="f", description="d", parameters_json_schema='{"type": "object", "b": 1, "a": 2}')
    ]
    assert request.chat.tool_choice == gen.ToolChoice(mode=gen.TOOL_CHOICE_MODE_NONE)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        *({"tool_choice": c} for c in ("auto", "required", {"type": "function", "function": {"name": "f"}})),
    ],
)
def test_tools_the_model_might_call_are_refused_by_name(choice: dict[str, Any]) -> None:
    error = refused(Dialect.CHAT, tools=[{"type": "function", "function": {"name": "f"}}], **choice)

    assert [violation.field for violation in error.violations] == ["tools"]


def test_logprobs_ask_for_alternatives() -> None:
    assert chat(logprobs=True).logprobs.top_count == 0
    assert chat(logprobs=True).HasField("logprobs")
    assert chat(logprobs=True, top_logprobs=4).logprobs.top_count == 4
    (request,) = completions(logprobs=0)
    assert request.HasField("logprobs")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [pb.GenerateRequest(prompt="a")]),
        (["a", "b"], [pb.GenerateRequest(prompt="a"), pb.GenerateRequest(prompt="b")]),
        ([1, 2], [pb.GenerateRequest(tokens=gen.TokenInput(token_ids=[1, 2]))]),
        (
            [[1, 2], [3]],
            [
                pb.GenerateRequest(tokens=gen.TokenInput(token_ids=[1, 2])),
                pb.GenerateRequest(tokens=gen.TokenInput(token_ids=[3])),
            ],
        ),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(
    prompt: object, expected: list[pb.GenerateRequest]
) -> None:
    inputs = [
        pb.GenerateRequest(prompt=request.prompt)
        if request.WhichOneof("input") == "prompt"
        else pb.GenerateRequest(tokens=request.tokens)
        for request in completions(prompt=prompt)
    ]

    assert inputs == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], ["a", [1]], [1, [1]], ["a"] * (MAX_PROMPTS + 1), None, {}])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    assert refused(Dialect.COMPLETION, prompt=prompt).violations[0].field == "prompt"


def test_best_of_must_be_n() -> None:
    assert completions(best_of=1) == completions()
    assert refused(Dialect.COMPLETION, best_of=3, n=2).violations[0].field == "best_of"


def test_generation_config_fills_in_what_was_not_said_plainly() -> None:
    config = json.dumps(
        {
            "max_new_tokens": 256,
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 10,
            "stop_strings": ["x"],
            "repetition_penalty": 1.5,
            "transformers_version": "5.23.0",
        }
    )

    request = chat(generation_config=config, top_k=20)

    assert request == chat(max_tokens=256, temperature=0.5, top_k=20, stop=["x"], repetition_penalty=1.5)
    assert chat(generation_config='{"do_sample": false, "temperature": 0.7}').sampling.temperature == 0
    assert chat(generation_config=config, max_completion_tokens=4).stop.max_tokens == 4
    assert chat(generation_config=config, repeat_penalty=2).sampling.repetition_penalty == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": nope}', "byte 11"),
        (b'{"model": "x"', "byte 13"),
        (b"", "byte 0"),
        (b'{"model": "\xff"}', "byte 11"),
        (b"[1]", "must be a JSON object"),
        (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_the_position(body: bytes, words: str) -> None:
    with pytest.raises(RequestRefusedError, match=words) as caught:
        plan_of(Dialect.CHAT, body)

    assert caught.value.status == 400
