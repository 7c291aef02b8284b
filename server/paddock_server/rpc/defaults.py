"""What a request takes for fields it leaves unset, by the name of the model it asks for. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import NO_DEFAULTS

if TYPE_CHECKING:
    from paddock_server.catalog import RequestDefaults


def with_defaults(request: pb.GenerateRequest, defaults: RequestDefaults) -> pb.GenerateRequest:
    """Return the request with the fields it leaves unset filled in; the request itself is not changed."""
    if defaults == NO_DEFAULTS:
        return request
    filled = pb.GenerateRequest()
    filled.CopyFrom(request)
    for fill in _FILLS:
        fill(filled, defaults)
    return filled


def _sampling(request: pb.GenerateRequest, defaults: RequestDefaults) -> None:
    for name, value in defaults.sampling.items():
        if not request.sampling.HasField(name):  # pyright: ignore[reportArgumentType]  # it wants a literal
            setattr(request.sampling, name, value)


def _max_tokens(request: pb.GenerateRequest, defaults: RequestDefaults) -> None:
    if defaults.max_tokens is not None and not request.stop.HasField("max_tokens"):
        request.stop.max_tokens = defaults.max_tokens


def _system_prompt(request: pb.GenerateRequest, defaults: RequestDefaults) -> None:
    """Put the system prompt before a conversation that has none."""
    if not defaults.system_prompt or not request.HasField("chat"):
        return
    if any(message.role == gen.ROLE_SYSTEM for message in request.chat.messages):
        return
    first = gen.ChatMessage(role=gen.ROLE_SYSTEM, content=[gen.ContentPart(text=defaults.system_prompt)])
    messages = [first, *request.chat.messages]
    del request.chat.messages[:]
    request.chat.messages.extend(messages)


def _template_arguments(request: pb.GenerateRequest, defaults: RequestDefaults) -> None:
    """Take each argument of the template that the request does not set itself."""
    if not defaults.template_arguments_json or not request.HasField("chat"):
        return
    own = json.loads(request.chat.template_arguments_json or "{}")
    arguments = {**json.loads(defaults.template_arguments_json), **own}
    request.chat.template_arguments_json = json.dumps(arguments, ensure_ascii=False)


_FILLS: Final[tuple[Callable[[pb.GenerateRequest, RequestDefaults], None], ...]] = (
    _sampling,
    _max_tokens,
    _system_prompt,
    _template_arguments,
)
"""One for each field of `RequestDefaults`."""
