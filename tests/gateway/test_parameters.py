"""The table of parameters against OpenAI's own types, and every row of it against the translation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from paddock.errors import InvalidFieldError
from paddock_gateway.parameters import GENERATION_CONFIG_FIELDS, MESSAGE_FIELDS, PARAMETERS, Dialect, Handling
from paddock_gateway.schema import ChatRequest, CompletionRequest, GenerationConfig, Message
from paddock_gateway.translate import Plan, plan_of
from tests.gateway.clients import CHAT, COMPLETION

if TYPE_CHECKING:
    from paddock_gateway.parameters import Parameter

BODIES = {Dialect.CHAT: CHAT, Dialect.COMPLETION: COMPLETION}
STRUCTS = {Dialect.CHAT: ChatRequest, Dialect.COMPLETION: CompletionRequest}
SDK_TYPES = {
    Dialect.CHAT: (
        chat_params.CompletionCreateParamsStreaming,
        chat_params.CompletionCreateParamsNonStreaming,
    ),
    Dialect.COMPLETION: (
        completion_params.CompletionCreateParamsStreaming,
        completion_params.CompletionCreateParamsNonStreaming,
    ),
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# For each honoured parameter a value that asks for something, and what must stand beside it to make sense.
ASKING: dict[str, tuple[object, dict[str, object]]] = {
    "model": ("other", {}),
    "messages": ([{"role": "user", "content": "other"}], {}),
    "prompt": ("other", {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "n": (2, {}),
    "temperature": (0.0, {}),
    "top_p": (0.5, {}),
    "presence_penalty": (0.5, {}),
    "frequency_penalty": (0.5, {}),
    "logit_bias": ({"5": -100}, {}),
    "seed": (0, {}),
    "stop": ("end", {}),
    "max_completion_tokens": (3, {}),
    "max_tokens": (3, {}),
    "logprobs": (True, {}),
    "top_logprobs": (2, {"logprobs": True}),
    "response_format": ({"type": "json_object"}, {}),
    "tools": ([TOOL], {"tool_choice": "none"}),
    "tool_choice": ("none", {"tools": [TOOL]}),
    "best_of": (2, {"n": 2}),
    "top_k": (5, {}),
    "min_p": (0.5, {}),
    "repeat_penalty": (1.5, {}),
    "repetition_penalty": (1.5, {}),
    "repeat_last_n": (16, {}),
    "ignore_eos": (True, {}),
    "grammar": ('root ::= "ab"', {}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "keep_alive": ("5m", {}),
    "return_progress": (True, {"stream": True}),
    "generation_config": ('{"max_new_tokens": 4}', {}),
}
ASKING_COMPLETION: dict[str, tuple[object, dict[str, object]]] = {"logprobs": (2, {})}

REFUSED_VALUES: dict[str, object] = {
    "echo": True,
    "suffix": "end",
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "parallel_tool_calls": False,
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "service_tier": "flex",
    "store": True,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "timings_per_token": True,
}


def rows(*handlings: Handling) -> list[Any]:
    return [
        pytest.param(dialect, row, id=f"{dialect.value}-{row.name}")
        for dialect, table in PARAMETERS.items()
        for row in table.values()
        if row.handling in handlings
    ]


def plan(dialect: Dialect, **more: object) -> Plan:
    return plan_of(dialect, json.dumps({**BODIES[dialect], **more}).encode())


@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_parameter_openai_documents_is_in_the_table(dialect: Dialect) -> None:
    documented = {name for params in SDK_TYPES[dialect] for name in get_type_hints(params)}

    assert documented - set(PARAMETERS[dialect]) == set()


@pytest.mark.parametrize("dialect", list(Dialect))
def test_what_is_not_an_extension_is_documented_by_openai(dialect: Dialect) -> None:
    documented = {name for params in SDK_TYPES[dialect] for name in get_type_hints(params)}
    ours = {row.name for row in PARAMETERS[dialect].values() if not row.extension}

    assert ours - documented == set()


@pytest.mark.parametrize(
    ("table", "struct"),
    [
        (PARAMETERS[Dialect.CHAT], ChatRequest),
        (PARAMETERS[Dialect.COMPLETION], CompletionRequest),
        (MESSAGE_FIELDS, Message),
        (GENERATION_CONFIG_FIELDS, GenerationConfig),
    ],
)
def test_the_structs_hold_what_is_honoured_and_nothing_else(
    table: dict[str, Parameter], struct: type[Any]
) -> None:
    honoured = {row.name for row in table.values() if row.handling is Handling.HONOURED}

    assert honoured == set(struct.__struct_fields__)


@pytest.mark.parametrize(("dialect", "row"), rows(Handling.HONOURED))
def test_an_honoured_parameter_changes_what_is_asked_of_the_server(dialect: Dialect, row: Parameter) -> None:
    table = {**ASKING, **ASKING_COMPLETION} if dialect is Dialect.COMPLETION else ASKING
    value, beside = table[row.name]
    if row.name == "best_of":
        # Every choice is returned, so asking for the best n of n is honoured by doing nothing more.
        assert plan(dialect, best_of=value, **beside) == plan(dialect, **beside)
        return

    if row.name == "tool_choice":
        # Without it tools are refused: the model might call one.
        with pytest.raises(InvalidFieldError):
            plan(dialect, **beside)
        assert plan(dialect, **beside, tool_choice=value)
        return

    assert plan(dialect, **beside, **{row.name: value}) != plan(dialect, **beside)


@pytest.mark.parametrize(("dialect", "row"), rows(Handling.REFUSED))
def test_a_refused_parameter_is_refused_by_name(dialect: Dialect, row: Parameter) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        plan(dialect, **{row.name: REFUSED_VALUES[row.name]})

    assert caught.value.violations[0].field == row.name
    assert row.note in caught.value.message


@pytest.mark.parametrize(("dialect", "row"), rows(Handling.REFUSED))
def test_a_refused_parameter_that_asks_for_nothing_is_let_through(dialect: Dialect, row: Parameter) -> None:
    for harmless in (None, *row.harmless):
        assert plan(dialect, **{row.name: harmless}) == plan(dialect)


@pytest.mark.parametrize(("dialect", "row"), rows(Handling.ACCEPTED))
def test_an_accepted_parameter_changes_nothing_and_says_why(dialect: Dialect, row: Parameter) -> None:
    value = {"a": "b"} if row.name == "metadata" else "x"

    assert plan(dialect, **{row.name: value}) == plan(dialect)
    assert row.note


@pytest.mark.parametrize("dialect", list(Dialect))
def test_null_is_the_same_as_leaving_a_parameter_out(dialect: Dialect) -> None:
    optional = dict.fromkeys(set(PARAMETERS[dialect]) - set(BODIES[dialect]))

    assert plan(dialect, **optional) == plan(dialect)


@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_unknown_parameter_is_refused_by_name(dialect: Dialect) -> None:
    with pytest.raises(InvalidFieldError, match="heat: this server has no such parameter"):
        plan(dialect, heat=0)


def test_a_parameter_of_one_dialect_is_unknown_to_the_other() -> None:
    with pytest.raises(InvalidFieldError, match="messages: this server has no such parameter"):
        plan(Dialect.COMPLETION, messages=[])
    with pytest.raises(InvalidFieldError, match="prompt: this server has no such parameter"):
        plan(Dialect.CHAT, prompt="x")


@pytest.mark.parametrize(
    "values",
    [
        {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "store": False},
        {"service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "tools": []},
        {"max_tokens": -1},
    ],
)
def test_openais_defaults_are_accepted_when_they_are_spelt_out(values: dict[str, object]) -> None:
    assert plan(Dialect.CHAT, **values) == plan(Dialect.CHAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (row.name, {"refusal": "no", "name": "bob", "audio": {"id": "x"}}.get(row.name, [{"a": 1}]))
        for row in MESSAGE_FIELDS.values()
        if row.handling is Handling.REFUSED
    ],
)
def test_a_refused_field_of_a_message_is_refused_by_its_path(field: str, value: object) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", field: value}]

    with pytest.raises(InvalidFieldError) as caught:
        plan(Dialect.CHAT, messages=messages)

    assert caught.value.violations[0].field == f"messages[1].{field}"


def test_a_message_as_the_sdk_dumps_it_can_be_sent_back() -> None:
    dumped: dict[str, object] = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "hm",
    }

    back = plan(Dialect.CHAT, messages=[*CHAT["messages"], dumped]).requests[0].chat.messages[1]

    assert [part.text for part in back.content] == ["b"]


@pytest.mark.parametrize(
    "row", [row for row in GENERATION_CONFIG_FIELDS.values() if row.handling is Handling.REFUSED]
)
def test_a_refused_field_of_generation_config_is_refused_by_its_path(row: Parameter) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        plan(Dialect.CHAT, generation_config=json.dumps({row.name: 7}))

    assert caught.value.violations[0].field == f"generation_config.{row.name}"
    for harmless in (None, *row.harmless):
        config = json.dumps({row.name: harmless})
        assert plan(Dialect.CHAT, generation_config=config) == plan(Dialect.CHAT)
