"""The names of fields of `paddock.v1` as callers of the HTTP API know them. Pure."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paddock_gateway.parameters import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHARED_FIELD_NAMES: Final = MappingProxyType(
    {
        "sampling.temperature": "temperature",
        "sampling.top_p": "top_p",
        "sampling.top_k": "top_k",
        "sampling.min_p": "min_p",
        "sampling.presence_penalty": "presence_penalty",
        "sampling.frequency_penalty": "frequency_penalty",
        "sampling.repetition_penalty": "repeat_penalty",
        "sampling.penalty_last_tokens": "repeat_last_n",
        "sampling.seed": "seed",
        "sampling.logit_bias": "logit_bias",
        "stop.max_tokens": "max_tokens",
        "stop.stop_sequences": "stop",
        "stop.ignore_eos": "ignore_eos",
        "constraint": "response_format",
        "constraint.json_schema": "response_format.json_schema.schema",
        "constraint.json_object": "response_format",
        "constraint.grammar": "grammar",
        "choice_count": "n",
        "report_prompt_progress": "return_progress",
    }
)
_FIELD_NAMES: Final[Mapping[Dialect, Mapping[str, str]]] = MappingProxyType(
    {
        Dialect.CHAT: {
            **_SHARED_FIELD_NAMES,
            "logprobs": "logprobs",
            "logprobs.top_count": "top_logprobs",
            "input": "messages",
            "chat": "messages",
            "chat.tool_choice": "tool_choice",
            "chat.tool_choice.tool_name": "tool_choice.function.name",
            "chat.template_arguments_json": "chat_template_kwargs",
        },
        Dialect.COMPLETION: {
            **_SHARED_FIELD_NAMES,
            "logprobs": "logprobs",
            "logprobs.top_count": "logprobs",
            "input": "prompt",
            "prompt": "prompt",
            "tokens": "prompt",
            "tokens.token_ids": "prompt",
        },
    }
)
_FIELD_PATTERNS: Final = (
    (re.compile(r"^sampling\.logit_bias\[(.*)\]$"), r"logit_bias[\1]"),
    (re.compile(r"^stop\.stop_sequences(\[\d+\])$"), r"stop\1"),
    (re.compile(r"^tokens\.token_ids(\[\d+\])$"), r"prompt\1"),
    (
        re.compile(r"^chat\.(messages\[\d+\]\.tool_calls\[\d+\])\.(name|arguments)(?:_json)?$"),
        r"\1.function.\2",
    ),
    (
        re.compile(r"^chat\.(tools\[\d+\])\.(name|description|parameters)(?:_json_schema)?$"),
        r"\1.function.\2",
    ),
    (re.compile(r"^chat\.((?:messages|tools|tool_choice)\b.*)$"), r"\1"),
)


def parameter_name(dialect: Dialect, field: str) -> str:
    """Return the parameter a dotted path of `paddock.v1` came from; the path itself when none did."""
    name = _FIELD_NAMES[dialect].get(field)
    if name is not None:
        return name
    for expression, replacement in _FIELD_PATTERNS:
        renamed, count = expression.subn(replacement, field)
        if count:
            return renamed
    return field
