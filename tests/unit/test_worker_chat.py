from __future__ import annotations

import contextlib
import re
import threading
from typing import Any

import pytest
from google.protobuf import json_format

from paddock.v1 import generation_pb2
from paddock_server.worker.bounded import TimeLimitExceededError, run_bounded
from paddock_server.worker.chat import ChatTemplate, SpecialTokens
from paddock_server.worker.errors import WorkerError

TOKENS = SpecialTokens(bos="<s>", eos="</s>")


def conversation(*messages: dict[str, Any], **fields: Any) -> generation_pb2.ChatInput:
    message = generation_pb2.ChatInput()
    json_format.ParseDict({"messages": list(messages), **fields}, message)
    return message


def say(role: str, *texts: str, **fields: Any) -> dict[str, Any]:
    return {"role": f"ROLE_{role.upper()}", "content": [{"text": text} for text in texts], **fields}


def render(template: str, chat: generation_pb2.ChatInput | None = None, **options: Any) -> str:
    return ChatTemplate(template, TOKENS, **options).render(chat or conversation(say("user", "Hi")))


def refused(template: str, chat: generation_pb2.ChatInput | None = None, **options: Any) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        render(template, chat, **options)
    return caught.value


def test_messages_look_as_openai_writes_them() -> None:
    chat = conversation(say("system", "Be", " kind."), say("user", "Hi"), say("assistant", "Hello"))
    assert render("{% for m in messages %}{{ m.role }}={{ m['content'] }};{% endfor %}", chat) == (
        "system=Be kind.;user=Hi;assistant=Hello;"
    )


def test_templates_get_the_special_tokens_and_the_generation_prompt() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "<s></s>True"


def test_blocks_are_trimmed_as_hugging_face_does() -> None:
    assert render("{% if true %}\n    {% if true %}\nx\n    {% endif %}\n{% endif %}\n") == "x\n"


def test_loops_have_break_and_continue() -> None:
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}"
    )
    assert render(template) == "023"


def test_a_generation_block_is_its_body() -> None:
    assert render("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c") == "abHic"


def test_tojson_keeps_characters_and_order_and_escapes_no_html() -> None:
    arguments = '{"z": "naïve <b>&終", "a": [1, 1.0, true, null]}'
    chat = conversation(say("user", "Hi"), templateArgumentsJson='{"x": ' + arguments + "}")
    assert render("{{ x | tojson }}", chat) == arguments
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_strftime_now_knows_the_time() -> None:
    assert re.fullmatch(r"20\d\d", render("{{ strftime_now('%Y') }}"))


def test_tools_and_tool_calls_look_as_openai_writes_them() -> None:
    call = {"id": "c1", "name": "look", "argumentsJson": '{"where": "out", "n": 1}'}
    chat = conversation(
        say("user", "Hi"),
        say("assistant", toolCalls=[call]),
        say("tool", "rain", toolCallId="c1"),
        tools=[{"name": "look", "description": "Looks.", "parametersJsonSchema": '{"type": "object"}'}],
    )
    template = "{{ tools | tojson }}|{{ messages[1].tool_calls | tojson }}|{{ messages[2].tool_call_id }}"
    assert render(template, chat) == (
        '[{"type": "function", "function": '
        '{"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}]|'
        '[{"id": "c1", "type": "function", "function": '
        '{"name": "look", "arguments": {"where": "out", "n": 1}}}]'
        "|c1"
    )


def test_without_tools_templates_see_none() -> None:
    assert render("{{ tools is none }}") == "True"


def test_a_template_for_tools_is_taken_when_there_are_tools() -> None:
    chat = conversation(say("user", "Hi"), tools=[{"name": "look"}])
    assert render("plain", chat, tool_source="tools") == "tools"
    assert render("plain", tool_source="tools") == "plain"


def test_extra_arguments_reach_the_template() -> None:
    chat = conversation(say("user", "Hi"), templateArgumentsJson='{"enable_thinking": false}')
    assert render("{{ enable_thinking }}", chat) == "False"


BAD_CONVERSATIONS = {
    "nothing said": (conversation(), "chat.messages"),
    "no role": (conversation({"content": [{"text": "x"}]}), "chat.messages[0].role"),
    "empty part": (
        conversation(say("user", "a"), {"role": "ROLE_USER", "content": [{}]}),
        "chat.messages[1].content[0]",
    ),
    "image": (
        conversation({"role": "ROLE_USER", "content": [{"image": {"data": "AA=="}}]}),
        "chat.messages[0].content[0].image",
    ),
    "answer to no call": (conversation(say("tool", "x")), "chat.messages[0].tool_call_id"),
    "call by a user": (
        conversation(say("user", "x", toolCalls=[{"name": "a"}])),
        "chat.messages[0].tool_calls",
    ),
    "call without name": (
        conversation(say("assistant", toolCalls=[{}])),
        "chat.messages[0].tool_calls[0].name",
    ),
    "call with broken arguments": (
        conversation(say("assistant", toolCalls=[{"name": "a", "argumentsJson": "{"}])),
        "chat.messages[0].tool_calls[0].arguments_json",
    ),
    "tool without name": (conversation(say("user", "x"), tools=[{}]), "chat.tools[0].name"),
    "tool whose schema is a list": (
        conversation(say("user", "x"), tools=[{"name": "a", "parametersJsonSchema": "[]"}]),
        "chat.tools[0].parameters_json_schema",
    ),
    "arguments that are a list": (
        conversation(say("user", "x"), templateArgumentsJson="[1]"),
        "chat.template_arguments_json",
    ),
    "arguments that replace messages": (
        conversation(say("user", "x"), templateArgumentsJson='{"messages": []}'),
        "chat.template_arguments_json",
    ),
    "arguments nested too deep": (
        conversation(say("user", "x"), templateArgumentsJson="[" * 100_000),
        "chat.template_arguments_json",
    ),
}


@pytest.mark.parametrize(
    ("chat", "field"), [pytest.param(*value, id=name) for name, value in BAD_CONVERSATIONS.items()]
)
def test_a_bad_conversation_is_refused_by_its_field(chat: generation_pb2.ChatInput, field: str) -> None:
    error = refused("{{ messages }}", chat)
    assert (error.reason, error.field) == ("INVALID_FIELD", field)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system message, please') }}", "no system message, please"),
        ("{% for m in messages %}", "line 1"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x' * 10000000000 }}", "repetition"),
        ("{{ [0] * 10000000000 }}", "repetition"),
        ("{{ 9 ** 99999 }}", "4096 bits"),
        ("{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "bits"),
        ("{% for i in range(999999) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}", "characters"),
        ("x" * 1_048_577, "1048577 characters"),
    ],
    ids=lambda value: value[:30],
)
def test_a_template_that_refuses_or_fails_is_a_template_error(template: str, says: str) -> None:
    error = refused(template)
    assert error.reason == "TEMPLATE_ERROR"
    assert says in error.message


def test_a_template_that_loops_is_stopped() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    error = refused(loop, time_limit_seconds=0.2)
    assert error.reason == "TEMPLATE_ERROR"
    assert "0.2 seconds" in error.message
    assert not [thread for thread in threading.enumerate() if thread.name == "bounded"]


def test_bounded_work_returns_its_result_or_raises_its_error() -> None:
    assert run_bounded(lambda: 7, seconds=5) == 7
    with pytest.raises(ZeroDivisionError):
        run_bounded(lambda: 1 / 0, seconds=5)


def test_bounded_work_that_swallows_exceptions_is_stopped_all_the_same() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    with pytest.raises(TimeLimitExceededError):
        run_bounded(stubborn, seconds=0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "bounded"]
