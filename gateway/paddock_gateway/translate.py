"""OpenAI requests to `GenerateRequest`s, and the names of fields back again. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from paddock.durations import keep_alive_seconds
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_gateway.decode import check_encoding, decode_object
from paddock_gateway.names import parameter_name
from paddock_gateway.parameters import GENERATION_CONFIG_FIELDS, MESSAGE_FIELDS, PARAMETERS, Dialect
from paddock_gateway.refusal import refuse
from paddock_gateway.schema import (
    ChatRequest,
    CompletionRequest,
    ContentPart,
    GenerationConfig,
    GenerationParameters,
    Message,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

R = TypeVar("R", bound=GenerationParameters)

MAX_PROMPTS: Final = 256
"""Prompts in one completion request."""

_CHAT: Final = msgspec.json.Decoder(ChatRequest)
_COMPLETION: Final = msgspec.json.Decoder(CompletionRequest)
_MESSAGE: Final = msgspec.json.Decoder(Message)
_GENERATION_CONFIG: Final = msgspec.json.Decoder(GenerationConfig)

_ROLES: Final[Mapping[str, gen.Role.ValueType]] = MappingProxyType(
    {
        "system": gen.ROLE_SYSTEM,
        "developer": gen.ROLE_SYSTEM,
        "user": gen.ROLE_USER,
        "assistant": gen.ROLE_ASSISTANT,
        "tool": gen.ROLE_TOOL,
    }
)
_TOOL_CHOICE_MODES: Final[Mapping[str, gen.ToolChoiceMode.ValueType]] = MappingProxyType(
    {
        "auto": gen.TOOL_CHOICE_MODE_AUTO,
        "none": gen.TOOL_CHOICE_MODE_NONE,
        "required": gen.TOOL_CHOICE_MODE_REQUIRED,
    }
)
_DATA_URL: Final = re.compile(r"data:(?P<media_type>[\w.+-]+/[\w.+-]+);base64,", re.ASCII)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one HTTP request asks for."""

    dialect: Dialect
    model: str
    requests: tuple[pb.GenerateRequest, ...]
    """One per prompt; a chat has exactly one."""

    choice_count: int
    """Choices of each of `requests`. Choice i of request k is choice `k * choice_count + i` of the answer."""

    stream: bool
    include_usage: bool
    names: Mapping[str, str]
    """Names the caller used for fields that have several."""

    def name_of(self, field: str) -> str:
        """Return the parameter a dotted path of `paddock.v1` came from; the path itself when none did."""
        return self.names.get(field) or parameter_name(self.dialect, field)


def plan_of(dialect: Dialect, body: bytes) -> Plan:
    """Read the body of a request.

    Raises:
        InvalidFieldError: a parameter is missing, wrong, unknown or refused.
        RequestRefusedError: the body is not JSON.
    """
    check_encoding(body)
    if dialect is Dialect.CHAT:
        return _chat_plan(decode_object(_CHAT, PARAMETERS[dialect], body))
    return _completion_plan(decode_object(_COMPLETION, PARAMETERS[dialect], body))


def _chat_plan(request: ChatRequest) -> Plan:
    request = _with_generation_config(request)
    _check_shared(request)
    limit, limit_name = _token_limit(request)
    message = pb.GenerateRequest(model=request.model)
    _set_shared(message, request, limit)
    chat = message.chat
    chat.messages.extend(_messages(request.messages))
    _set_tools(chat, request)
    template_arguments = _raw_text(request.chat_template_kwargs)
    if template_arguments is not None:
        chat.template_arguments_json = template_arguments
    if request.response_format is not None:
        _set_response_format(message, request.response_format, request.grammar)
    if request.logprobs:
        message.logprobs.top_count = request.top_logprobs or 0
        message.logprobs.SetInParent()
    elif request.top_logprobs is not None:
        refuse("top_logprobs", "needs logprobs to be true")
    return _plan(Dialect.CHAT, request, (message,), limit_name)


def _completion_plan(request: CompletionRequest) -> Plan:
    request = _with_generation_config(request)
    _check_shared(request)
    if request.best_of is not None and request.best_of != (request.n or 1):
        refuse("best_of", "must be 1 or the same as n: every choice is returned")
    shared = pb.GenerateRequest(model=request.model)
    _set_shared(shared, request, None if request.max_tokens == -1 else request.max_tokens)
    if request.logprobs is not None:
        shared.logprobs.top_count = request.logprobs
        shared.logprobs.SetInParent()
    messages: list[pb.GenerateRequest] = []
    for prompt in _prompts(request.prompt):
        message = pb.GenerateRequest()
        message.CopyFrom(shared)
        if isinstance(prompt, str):
            message.prompt = prompt
        else:
            message.tokens.token_ids.extend(prompt)
            message.tokens.SetInParent()
        messages.append(message)
    return _plan(Dialect.COMPLETION, request, tuple(messages), "max_tokens")


def _plan(
    dialect: Dialect,
    request: GenerationParameters,
    messages: tuple[pb.GenerateRequest, ...],
    limit_name: str,
) -> Plan:
    options = request.stream_options
    return Plan(
        dialect=dialect,
        model=request.model,
        requests=messages,
        choice_count=request.n or 1,
        stream=bool(request.stream),
        include_usage=options is not None and bool(options.include_usage),
        names=_names_used(request, limit_name),
    )


def _names_used(request: GenerationParameters, limit_name: str) -> dict[str, str]:
    """Return the names the caller chose for fields that have several."""
    names = {"stop.max_tokens": limit_name}
    if request.repetition_penalty is not None:
        names["sampling.repetition_penalty"] = "repetition_penalty"
    if request.grammar is not None:
        names["constraint"] = "grammar"
    response_format = request.response_format if isinstance(request, ChatRequest) else None
    if response_format is not None and response_format.type == "json_object":
        names["constraint.json_schema"] = "response_format.schema"
    return names


def _check_shared(request: GenerationParameters) -> None:
    """Refuse combinations that contradict each other."""
    options = request.stream_options
    if options is not None:
        if not request.stream:
            refuse("stream_options", "is only for requests with stream: true")
        if options.include_obfuscation:
            refuse("stream_options.include_obfuscation", "is not supported")
    if request.return_progress and not request.stream:
        refuse("return_progress", "is only for requests with stream: true")
    if (
        request.repeat_penalty is not None
        and request.repetition_penalty is not None
        and request.repeat_penalty != request.repetition_penalty
    ):
        refuse("repeat_penalty", "is the same as repetition_penalty; send one of them")


def _set_shared(message: pb.GenerateRequest, request: GenerationParameters, limit: int | None) -> None:
    """Fill in what both dialects have, except the token limit's name."""
    message.choice_count = request.n or 1
    message.report_prompt_progress = bool(request.return_progress)
    _set_keep_alive(message, request.keep_alive)
    repetition_penalty = request.repetition_penalty
    if repetition_penalty is None:
        repetition_penalty = request.repeat_penalty
    message.sampling.MergeFrom(
        gen.SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=repetition_penalty,
            penalty_last_tokens=request.repeat_last_n,
            seed=request.seed,
            logit_bias=request.logit_bias,
        )
    )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    message.stop.MergeFrom(
        gen.StopParams(max_tokens=limit, stop_sequences=stop, ignore_eos=bool(request.ignore_eos))
    )
    if request.grammar is not None:
        message.constraint.grammar = request.grammar


def _set_keep_alive(message: pb.GenerateRequest, wanted: float | str | None) -> None:
    if wanted is None:
        return
    try:
        seconds = keep_alive_seconds(wanted)
    except ValueError as error:
        refuse("keep_alive", str(error))
    if seconds:
        message.keep_alive.FromNanoseconds(round(seconds * 1e9))


def _token_limit(request: ChatRequest) -> tuple[int | None, str]:
    """Return the limit of a chat, None for none, and the name it was given under.

    -1 is how llama-server's clients say none.
    """
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        refuse(
            "max_completion_tokens", f"is {new} but max_tokens is {old}; send one, or the same value in both"
        )
    limit, name = (old, "max_tokens") if new is None else (new, "max_completion_tokens")
    return None if limit == -1 else limit, name


def _messages(raw_messages: list[msgspec.Raw]) -> Iterator[gen.ChatMessage]:
    for index, raw in enumerate(raw_messages):
        path = f"messages[{index}]"
        yield _message(decode_object(_MESSAGE, MESSAGE_FIELDS, raw, f"{path}."), path)


def _message(message: Message, path: str) -> gen.ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        refuse(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    turn = gen.ChatMessage(role=role, tool_call_id=message.tool_call_id or "")
    if isinstance(message.content, str):
        turn.content.add(text=message.content)
    elif message.content is not None:
        turn.content.extend(
            _part(part, f"{path}.content[{index}]") for index, part in enumerate(message.content)
        )
    elif role != gen.ROLE_ASSISTANT or not message.tool_calls:
        refuse(f"{path}.content", "is required")
    for index, call in enumerate(message.tool_calls or ()):
        if call.type != "function":
            refuse(f"{path}.tool_calls[{index}].type", "must be function")
        turn.tool_calls.add(id=call.id, name=call.function.name, arguments_json=call.function.arguments)
    return turn


def _part(part: ContentPart, path: str) -> gen.ContentPart:
    if part.type == "text":
        if part.text is None:
            refuse(f"{path}.text", "is required")
        return gen.ContentPart(text=part.text)
    if part.type != "image_url":
        refuse(f"{path}.type", "must be text or image_url")
    if part.image_url is None:
        refuse(f"{path}.image_url", "is required")
    if part.image_url.detail not in (None, "auto"):
        refuse(f"{path}.image_url.detail", "must be auto")
    return gen.ContentPart(image=_image(part.image_url.url, f"{path}.image_url.url"))


def _image(url: str, path: str) -> gen.Image:
    found = _DATA_URL.match(url)
    if found is None:
        refuse(path, "must be a data: URL with base64, such as data:image/png;base64,...; nothing is fetched")
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
    except ValueError as error:  # binascii.Error is one; characters beyond ASCII raise another
        refuse(path, f"is not base64: {error}")
    return gen.Image(data=data, media_type=found["media_type"])


def _set_tools(chat: gen.ChatInput, request: ChatRequest) -> None:
    chat.tools.extend(_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ()))
    _set_tool_choice(chat, request)
    if request.tools and request.tool_choice != "none":
        refuse("tools", "are only shown to the model, with tool_choice none: tool calls are not parsed yet")


def _set_tool_choice(chat: gen.ChatInput, request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if isinstance(choice, NamedToolChoice):
        if choice.type != "function":
            refuse("tool_choice.type", "must be function")
        chat.tool_choice.tool_name = choice.function.name
        return
    mode = _TOOL_CHOICE_MODES.get(choice)
    if mode is None:
        refuse("tool_choice", "must be auto, none, required or a function")
    if mode == gen.TOOL_CHOICE_MODE_REQUIRED and not request.tools:
        refuse("tool_choice", "needs tools to choose from")
    if request.tools:
        chat.tool_choice.mode = mode


def _tool(tool: Tool, path: str) -> gen.Tool:
    if tool.type != "function":
        refuse(f"{path}.type", "must be function")
    if tool.function.strict:
        refuse(f"{path}.function.strict", "is not supported")
    return gen.Tool(
        name=tool.function.name,
        description=tool.function.description or "",
        parameters_json_schema=_raw_text(tool.function.parameters) or "",
    )


def _set_response_format(
    message: pb.GenerateRequest, response_format: ResponseFormat, grammar: str | None
) -> None:
    if response_format.type == "text":
        return
    if grammar is not None:
        refuse("grammar", "cannot be combined with response_format")
    match response_format.type:
        case "json_object":
            schema = _raw_text(response_format.schema)
            if schema is None:
                message.constraint.json_object = True
            else:
                message.constraint.json_schema = schema
        case "json_schema":
            wanted = response_format.json_schema
            if wanted is None:
                refuse("response_format.json_schema", "is required")
            if wanted.description:
                refuse("response_format.json_schema.description", "is not supported. Say it in a message.")
            message.constraint.json_schema = _raw_text(wanted.schema) or "null"
        case _:
            refuse("response_format.type", "must be text, json_object or json_schema")


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the prompts of a completion request, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    if tokens and len(tokens) == len(prompt):
        return [tokens]
    prompts = [entry for entry in prompt if not isinstance(entry, int)]
    if len(prompts) != len(prompt) or len({type(entry) for entry in prompts}) > 1:
        refuse("prompt", "must be texts or token ids, not some of each")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        refuse("prompt", f"must hold 1 to {MAX_PROMPTS} prompts, not {len(prompts)}")
    return prompts


def _with_generation_config(request: R) -> R:
    """Fill in what transformers' client says in `generation_config` and nowhere else."""
    if request.generation_config is None:
        return request
    text = request.generation_config.encode()
    config = decode_object(_GENERATION_CONFIG, GENERATION_CONFIG_FIELDS, text, "generation_config.")
    wanted: dict[str, object] = {
        "max_tokens": config.max_new_tokens,
        "temperature": 0.0 if config.do_sample is False else config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "stop": config.stop_strings,
    }
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        del wanted["max_tokens"]
    if request.repeat_penalty is not None:
        del wanted["repetition_penalty"]
    changes = {
        name: value for name, value in wanted.items() if value is not None and getattr(request, name) is None
    }
    return msgspec.structs.replace(request, **changes)


def _raw_text(raw: msgspec.Raw) -> str | None:
    """Return a JSON value as the text it came as; None when it was left out or null."""
    text = bytes(raw)
    return None if text in (b"", b"null") else text.decode()
