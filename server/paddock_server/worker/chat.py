"""Chat templates: a conversation becomes the text a model was trained on.

A template comes out of a model file and is untrusted: it runs in jinja2's immutable sandbox, for a bounded
time, with bounded results. jinja2 is imported with the first template; models without one never pay for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paddock.v1 import generation_pb2
from paddock_server.worker.bounded import TimeLimitExceededError, run_bounded
from paddock_server.worker.errors import Reason, WorkerError, reject

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jinja2 import Template

MOST_TEMPLATE_CHARACTERS: Final = 1024 * 1024
MOST_RENDERED_CHARACTERS: Final = 32 * 1024 * 1024
TIME_LIMIT_SECONDS: Final = 3.0

_ROLES: Final = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
    generation_pb2.ROLE_TOOL: "tool",
}

_RESERVED: Final = frozenset({"messages", "tools", "bos_token", "eos_token"})

_TEMPLATE_FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What running a template's code can raise besides jinja2's own errors."""

Value = Any
"""Whatever a template may hold: JSON values and functions."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Text of the tokens that templates mention."""

    bos: str
    eos: str


class ChatTemplate:
    """The template of a model. Any thread."""

    def __init__(
        self,
        source: str,
        tokens: SpecialTokens,
        *,
        tool_source: str = "",
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
    ) -> None:
        """Keep the sources; they are compiled on first use.

        Args:
            source: Template of the model.
            tokens: What it calls `bos_token` and `eos_token`.
            tool_source: Template for conversations with tools, when the model has one of its own.
            time_limit_seconds: How long compiling or rendering may take.
        """
        self._sources = {False: source, True: tool_source or source}
        self._tokens = tokens
        self._seconds = time_limit_seconds
        self._compiled: dict[bool, Template] = {}

    def render(self, chat: generation_pb2.ChatInput) -> str:
        """Return the prompt for a conversation, ready for the assistant's turn.

        Raises:
            WorkerError: INVALID_FIELD for a bad conversation, TEMPLATE_ERROR when the template refuses it or
                fails.
        """
        messages = [_message(message, f"chat.messages[{i}]") for i, message in enumerate(chat.messages)]
        if not messages:
            reject("chat.messages", "is empty; at least one message is required")
        tools = [_tool(tool, f"chat.tools[{index}]") for index, tool in enumerate(chat.tools)] or None
        variables: dict[str, Value] = {
            "add_generation_prompt": True,
            **_template_arguments(chat.template_arguments_json),
            "messages": messages,
            "tools": tools,
            "bos_token": self._tokens.bos,
            "eos_token": self._tokens.eos,
        }
        return self._run(lambda: self._render(variables, with_tools=tools is not None))

    def _run(self, function: Callable[[], str]) -> str:
        from paddock_server.worker import sandbox  # jinja2 is 8 MB

        try:
            return run_bounded(function, seconds=self._seconds)
        except TimeLimitExceededError as error:
            text = f"The chat template was not done after {self._seconds:g} seconds."
            raise _template_error(text) from error
        except sandbox.TemplateSyntaxError as error:
            text = f"The chat template of the model is wrong in line {error.lineno}: {error.message}"
            raise _template_error(text) from error
        except sandbox.TemplateError as error:
            text = f"The chat template refused the conversation: {error}"
            raise _template_error(text) from error
        except _TEMPLATE_FAULTS as error:
            text = f"The chat template failed: {type(error).__name__}: {error}"
            raise _template_error(text) from error

    def _render(self, variables: Mapping[str, Value], *, with_tools: bool) -> str:
        from paddock_server.worker import sandbox

        template = self._compiled.get(with_tools)
        if template is None:
            source = self._sources[with_tools]
            if len(source) > MOST_TEMPLATE_CHARACTERS:
                text = f"it has {len(source)} characters, over the limit of {MOST_TEMPLATE_CHARACTERS}"
                raise ValueError(text)
            template = self._compiled[with_tools] = sandbox.compile_template(source)
        parts: list[str] = []
        length = 0
        for part in template.generate(**variables):
            length += len(part)
            if length > MOST_RENDERED_CHARACTERS:
                text = f"it made more than {MOST_RENDERED_CHARACTERS} characters"
                raise ValueError(text)
            parts.append(part)
        return "".join(parts)


def _template_error(message: str) -> WorkerError:
    return WorkerError(Reason.TEMPLATE_ERROR, message, field="chat")


def _message(message: generation_pb2.ChatMessage, path: str) -> dict[str, Value]:
    """Return a message as OpenAI writes it, which is what templates are written for."""
    role = _ROLES.get(message.role)
    if role is None:
        reject(f"{path}.role", "is missing; one of system, user, assistant, tool is required")
    texts: list[str] = []
    for index, part in enumerate(message.content):
        kind = part.WhichOneof("part")
        if kind is None:
            reject(f"{path}.content[{index}]", "is empty; a text is required")
        if kind == "image":
            reject(f"{path}.content[{index}].image", "this model has no vision projector")
        texts.append(part.text)
    shaped: dict[str, Value] = {"role": role, "content": "".join(texts)}
    if message.tool_calls:
        if role != "assistant":
            reject(f"{path}.tool_calls", "only an assistant message has tool calls")
        shaped["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    if role == "tool":
        if not message.tool_call_id:
            reject(f"{path}.tool_call_id", "is required in a tool message")
        shaped["tool_call_id"] = message.tool_call_id
    return shaped


def _tool_call(call: generation_pb2.ToolCall, path: str) -> dict[str, Value]:
    if not call.name:
        reject(f"{path}.name", "is required")
    arguments = _json(call.arguments_json or "{}", f"{path}.arguments_json")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: generation_pb2.Tool, path: str) -> dict[str, Value]:
    if not tool.name:
        reject(f"{path}.name", "is required")
    parameters = _json_object(tool.parameters_json_schema or "{}", f"{path}.parameters_json_schema")
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _template_arguments(text: str) -> dict[str, Value]:
    if not text:
        return {}
    path = "chat.template_arguments_json"
    arguments = _json_object(text, path)
    taken = sorted(_RESERVED.intersection(arguments))
    if taken:
        reject(path, f"must not set {', '.join(taken)}; those come from the request and the model")
    return arguments


def _json_object(text: str, path: str) -> dict[str, Value]:
    value = _json(text, path)
    if not isinstance(value, dict):
        reject(path, "is not a JSON object")
    return {str(key): item for key, item in value.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _json(text: str, path: str) -> Value:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reject(path, f"is not JSON: {error}")
