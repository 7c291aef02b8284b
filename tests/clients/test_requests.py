from __future__ import annotations

import pytest

from paddock.errors import InvalidFieldError
from paddock.generation import ChatMessage, GenerateOptions, Image, Prompt, Tool, ToolCall
from paddock.requests import generate_request, load_request
from paddock.types import LocalSource
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2


def chat(prompt: Prompt, **options: object) -> gen.ChatInput:
    return generate_request("m", prompt, GenerateOptions(**options)).chat  # pyright: ignore[reportArgumentType]


def test_what_is_left_out_stays_unset() -> None:
    assert generate_request("m", "text", {}) == pb.GenerateRequest(
        model="m", prompt="text", sampling=gen.SamplingParams(), stop=gen.StopParams()
    )


def test_an_explicit_zero_is_sent() -> None:
    request = generate_request("m", "text", {"temperature": 0, "top_k": 0, "seed": 0})

    assert all(request.sampling.HasField(name) for name in ("temperature", "top_k", "seed"))


def test_an_empty_prompt_is_a_prompt() -> None:
    assert generate_request("m", "", {}).WhichOneof("input") == "prompt"


def test_an_empty_conversation_is_a_conversation() -> None:
    """The server then says that it needs a message, which names the field."""
    assert generate_request("m", [], {}).WhichOneof("input") == "chat"


def test_a_message_can_hold_images_and_tool_calls() -> None:
    messages = chat(
        [
            ChatMessage("user", ["Look:", Image(b"png", "image/png")]),
            ChatMessage("assistant", tool_calls=[ToolCall("c-1", "f", '{"a": 1}')]),
            ChatMessage("tool", "42", tool_call_id="c-1"),
        ]
    ).messages

    assert list(messages) == [
        gen.ChatMessage(
            role=gen.ROLE_USER,
            content=[
                gen.ContentPart(text="Look:"),
                gen.ContentPart(image=gen.Image(data=b"png", media_type="image/png")),
            ],
        ),
        gen.ChatMessage(
            role=gen.ROLE_ASSISTANT,
            tool_calls=[gen.ToolCall(id="c-1", name="f", arguments_json='{"a": 1}')],
        ),
        gen.ChatMessage(role=gen.ROLE_TOOL, content=[gen.ContentPart(text="42")], tool_call_id="c-1"),
    ]


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ("auto", gen.TOOL_CHOICE_MODE_AUTO),
        ("none", gen.TOOL_CHOICE_MODE_NONE),
        ("required", gen.TOOL_CHOICE_MODE_REQUIRED),
    ],
)
def test_every_tool_choice_has_its_mode(choice: str, mode: gen.ToolChoiceMode.ValueType) -> None:
    sent = chat([ChatMessage("user", "Hi")], tools=[Tool("f")], tool_choice=choice)

    assert sent.tool_choice.mode == mode
    assert sent.tools[0] == gen.Tool(name="f", parameters_json_schema="{}")


def test_json_keeps_its_order_and_its_characters() -> None:
    request = generate_request("m", "x", {"json_schema": {"z": "ü", "a": 1}})

    assert request.constraint.json_schema == '{"z": "ü", "a": 1}'
    assert generate_request("m", "x", {"json_schema": "{ }"}).constraint.json_schema == "{ }"
    assert generate_request("m", "x", {"grammar": "root ::= x"}).constraint.grammar == "root ::= x"
    assert generate_request("m", "x", {"json_object": True}).constraint.json_object


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([{"role": "user"}], {}, "chat.messages[0]"),
        ([{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}], {}, "chat.messages[1].role"),
        ([{"role": "user", "content": "x", "name": "y"}], {}, "chat.messages[0]"),
        ("text", {"tools": [Tool("f")]}, "chat.tools"),
        ([1, 2], {"template_arguments": {}}, "chat.template_arguments"),
        ("text", {"grammar": "x", "json_object": True}, "constraint"),
    ],
)
def test_what_no_message_can_carry_is_refused_with_its_field(
    prompt: Prompt, options: GenerateOptions, field: str
) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        generate_request("m", prompt, options)

    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="'heat'"):
        generate_request("m", "x", {"heat": 1})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("policy", "sent"),
    [
        ("fail", pb.LOAD_CONFLICT_POLICY_FAIL),
        ("keep", pb.LOAD_CONFLICT_POLICY_KEEP),
        ("reload", pb.LOAD_CONFLICT_POLICY_RELOAD),
    ],
)
def test_every_conflict_policy_has_its_value(policy: str, sent: pb.LoadConflictPolicy.ValueType) -> None:
    request = load_request(
        "m",
        source=LocalSource(path="a.gguf"),
        options=None,
        on_conflict=policy,  # pyright: ignore[reportArgumentType]
        timeout_seconds=None,
    )

    assert request == pb.LoadRequest(
        model="m",
        source=model_pb2.ModelSource(local=model_pb2.LocalSource(path="a.gguf")),
        conflict_policy=sent,
    )
