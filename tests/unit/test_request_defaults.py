"""What a request takes for fields it leaves unset."""

from __future__ import annotations

import dataclasses
import json

from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import NO_DEFAULTS, RequestDefaults
from paddock_server.catalog.configured.keys import KEYS, Part
from paddock_server.rpc import defaults as module
from paddock_server.rpc.defaults import with_defaults

DEFAULTS = RequestDefaults(
    sampling={"temperature": 0.5, "top_k": 7},
    max_tokens=9,
    system_prompt="Be brief.",
    template_arguments_json='{"a": 1, "b": 2}',
)


def chat(*roles: gen.Role.ValueType) -> pb.GenerateRequest:
    messages = [gen.ChatMessage(role=role, content=[gen.ContentPart(text="x")]) for role in roles]
    return pb.GenerateRequest(model="m", chat=gen.ChatInput(messages=messages))


def test_unset_fields_are_filled_and_the_request_stays_as_it_was() -> None:
    request = chat(gen.ROLE_USER)
    filled = with_defaults(request, DEFAULTS)

    assert request == chat(gen.ROLE_USER)
    assert (filled.sampling.temperature, filled.sampling.top_k, filled.stop.max_tokens) == (0.5, 7, 9)
    assert [message.role for message in filled.chat.messages] == [gen.ROLE_SYSTEM, gen.ROLE_USER]
    assert filled.chat.messages[0].content[0].text == "Be brief."
    assert json.loads(filled.chat.template_arguments_json) == {"a": 1, "b": 2}


def test_what_a_request_sets_stays_even_when_it_is_zero() -> None:
    request = chat(gen.ROLE_SYSTEM, gen.ROLE_USER)
    request.sampling.temperature = 0
    request.stop.max_tokens = 3
    request.chat.template_arguments_json = '{"a": 5}'
    filled = with_defaults(request, DEFAULTS)

    assert filled.sampling.HasField("temperature")
    assert (filled.sampling.temperature, filled.stop.max_tokens) == (0, 3)
    assert len(filled.chat.messages) == 2
    assert json.loads(filled.chat.template_arguments_json) == {"a": 5, "b": 2}


def test_a_prompt_takes_no_part_of_a_conversation() -> None:
    filled = with_defaults(pb.GenerateRequest(prompt="x"), DEFAULTS)

    assert filled.WhichOneof("input") == "prompt"
    assert filled.sampling.top_k == 7


def test_without_defaults_the_request_is_passed_on_as_it_is() -> None:
    request = pb.GenerateRequest(prompt="x")

    assert with_defaults(request, NO_DEFAULTS) is request


def test_every_default_has_a_rule_and_every_sampling_key_a_field() -> None:
    assert len(module._FILLS) == len(dataclasses.fields(RequestDefaults))
    fields = gen.SamplingParams.DESCRIPTOR.fields_by_name
    assert {key.field for key in KEYS if key.part is Part.SAMPLING} == set(fields) - {"logit_bias"}
