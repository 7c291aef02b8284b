"""Arguments of the client to messages of `paddock.v1`. Pure; `paddock.convert` is the other direction.

Values are passed on as they are: the server checks them, and says which field is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias, cast

from google.protobuf.duration_pb2 import Duration

from paddock.errors import InvalidFieldError
from paddock.generation import ChatMessage, GenerateOptions, Image, Messages, Prompt, Role, Tool, ToolName
from paddock.types import HuggingFaceSource, ModelSource, RuntimeOptions
from paddock.v1 import generation_pb2, model_manager_pb2, model_pb2

ConflictPolicy: TypeAlias = Literal["fail", "keep", "reload"]

_CONFLICT_POLICIES: Final[Mapping[str, model_manager_pb2.LoadConflictPolicy.ValueType]] = {
    "fail": model_manager_pb2.LOAD_CONFLICT_POLICY_FAIL,
    "keep": model_manager_pb2.LOAD_CONFLICT_POLICY_KEEP,
    "reload": model_manager_pb2.LOAD_CONFLICT_POLICY_RELOAD,
}

_ROLES: Final[Mapping[str, generation_pb2.Role.ValueType]] = {
    Role.SYSTEM: generation_pb2.ROLE_SYSTEM,
    Role.USER: generation_pb2.ROLE_USER,
    Role.ASSISTANT: generation_pb2.ROLE_ASSISTANT,
    Role.TOOL: generation_pb2.ROLE_TOOL,
}

_TOOL_CHOICES: Final[Mapping[str, generation_pb2.ToolChoiceMode.ValueType]] = {
    "auto": generation_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": generation_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generation_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def load_request(
    model: str,
    *,
    source: ModelSource | None,
    options: RuntimeOptions | None,
    on_conflict: ConflictPolicy,
    timeout_seconds: float | None,
) -> model_manager_pb2.LoadRequest:
    """Make the request of `Load`."""
    return model_manager_pb2.LoadRequest(
        model=model,
        source=_source(source) if source else None,
        runtime_options=_runtime_options(options) if options else None,
        conflict_policy=_CONFLICT_POLICIES[on_conflict],
        load_timeout=None if timeout_seconds is None else duration(timeout_seconds),
    )


def estimate_request(
    model: str, *, source: ModelSource | None, options: RuntimeOptions | None
) -> model_manager_pb2.EstimateMemoryRequest:
    """Make the request of `EstimateMemory`."""
    return model_manager_pb2.EstimateMemoryRequest(
        model=model,
        source=_source(source) if source else None,
        runtime_options=_runtime_options(options) if options else None,
    )


def download_request(model: str, *, source: ModelSource | None) -> model_manager_pb2.DownloadRequest:
    """Make the request of `Download`."""
    return model_manager_pb2.DownloadRequest(model=model, source=_source(source) if source else None)


def generate_request(
    model: str, prompt: Prompt, options: GenerateOptions
) -> model_manager_pb2.GenerateRequest:
    """Make the request of `Generate`.

    Raises:
        InvalidFieldError: A message has no known role, or an option belongs to another kind of prompt.
        TypeError: There is no option of that name.
    """
    unknown = sorted(options.keys() - GenerateOptions.__optional_keys__)
    if unknown:
        message = f"There is no option {unknown[0]!r}; see paddock.GenerateOptions."
        raise TypeError(message)
    request = model_manager_pb2.GenerateRequest(
        model=model,
        sampling=_sampling(options),
        stop=generation_pb2.StopParams(
            max_tokens=options.get("max_tokens"),
            stop_sequences=options.get("stop", ()),
            ignore_eos=options.get("ignore_eos", False),
        ),
        constraint=_constraint(options),
        logprobs=(
            generation_pb2.LogprobParams(top_count=options["top_logprobs"])
            if "top_logprobs" in options
            else None
        ),
        choice_count=options.get("choice_count", 0),
        autoload_policy=autoload_policy(options.get("autoload")),
        report_prompt_progress="on_prompt_progress" in options,
        keep_alive=duration(options["keep_alive_seconds"]) if "keep_alive_seconds" in options else None,
    )
    _set_input(request, prompt, options)
    return request


def autoload_policy(autoload: bool | None) -> model_manager_pb2.AutoloadPolicy.ValueType:
    """Return the policy: load, fail, or (`None`) the server's setting."""
    if autoload is None:
        return model_manager_pb2.AUTOLOAD_POLICY_UNSPECIFIED
    return model_manager_pb2.AUTOLOAD_POLICY_LOAD if autoload else model_manager_pb2.AUTOLOAD_POLICY_FAIL


def duration(seconds: float) -> Duration:
    """Return a protobuf duration."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _source(source: ModelSource) -> model_pb2.ModelSource:
    if isinstance(source, HuggingFaceSource):
        return model_pb2.ModelSource(
            hugging_face=model_pb2.HuggingFaceSource(
                repo_id=source.repo_id, file_pattern=source.file_pattern, revision=source.revision
            )
        )
    return model_pb2.ModelSource(local=model_pb2.LocalSource(path=source.path))


def _runtime_options(options: RuntimeOptions) -> model_pb2.RuntimeOptions:
    idle, sleep = options.idle_timeout_seconds, options.sleep_timeout_seconds
    return model_pb2.RuntimeOptions(
        context_size_tokens=options.context_size_tokens,
        gpu_layer_count=options.gpu_layer_count,
        slot_count=options.slot_count,
        idle_timeout=None if idle is None else duration(idle),
        sleep_timeout=None if sleep is None else duration(sleep),
        thread_count=options.thread_count,
        batch_size_tokens=options.batch_size_tokens,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        replica_count=options.replica_count,
    )


def _sampling(options: GenerateOptions) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        repetition_penalty=options.get("repetition_penalty"),
        penalty_last_tokens=options.get("penalty_last_tokens"),
        seed=options.get("seed"),
        logit_bias=options.get("logit_bias", {}),
    )


def _constraint(options: GenerateOptions) -> generation_pb2.OutputConstraint | None:
    given = sorted({"json_schema", "grammar", "json_object"} & options.keys())
    if not given:
        return None
    if len(given) > 1:
        field = "constraint"
        raise InvalidFieldError.of(field, f"only one of {' and '.join(given)} can be given")
    if "json_schema" in options:
        return generation_pb2.OutputConstraint(json_schema=_json_text(options["json_schema"]))
    if "grammar" in options:
        return generation_pb2.OutputConstraint(grammar=options["grammar"])
    return generation_pb2.OutputConstraint(json_object=options.get("json_object", False))


def _set_input(request: model_manager_pb2.GenerateRequest, prompt: Prompt, options: GenerateOptions) -> None:
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], int):
        request.tokens.token_ids.extend(cast("Sequence[int]", prompt))
    else:
        request.chat.CopyFrom(_chat(cast("Messages", prompt), options))
        return
    chat_only = sorted({"tools", "tool_choice", "template_arguments"} & options.keys())
    if chat_only:
        field = f"chat.{chat_only[0]}"
        raise InvalidFieldError.of(field, "needs a conversation; a plain prompt was given")


def _chat(messages: Messages, options: GenerateOptions) -> generation_pb2.ChatInput:
    chat = generation_pb2.ChatInput(
        messages=[_message(index, message) for index, message in enumerate(messages)],
        tools=[_tool(tool) for tool in options.get("tools", ())],
    )
    choice = options.get("tool_choice")
    if isinstance(choice, ToolName):
        chat.tool_choice.tool_name = choice.name
    elif choice is not None:
        chat.tool_choice.mode = _TOOL_CHOICES[choice]
    if "template_arguments" in options:
        chat.template_arguments_json = json.dumps(dict(options["template_arguments"]), ensure_ascii=False)
    return chat


def _message(index: int, message: ChatMessage | Mapping[str, str]) -> generation_pb2.ChatMessage:
    path = f"chat.messages[{index}]"
    if not isinstance(message, ChatMessage):
        if set(message) != {"role", "content"}:
            raise InvalidFieldError.of(
                path,
                f"has the keys {', '.join(message) or 'none'}, needs role and content; "
                "use ChatMessage for images and tool calls",
            )
        message = ChatMessage(message["role"], message["content"])
    if message.role not in _ROLES:
        path = f"{path}.role"
        raise InvalidFieldError.of(path, f"is {message.role!r}, must be one of {', '.join(_ROLES)}")
    parts = (message.content,) if isinstance(message.content, str) else message.content
    if message.tool_calls and not message.content:
        parts = ()
    return generation_pb2.ChatMessage(
        role=_ROLES[message.role],
        content=[_part(part) for part in parts],
        tool_calls=[
            generation_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def _part(part: str | Image) -> generation_pb2.ContentPart:
    if isinstance(part, str):
        return generation_pb2.ContentPart(text=part)
    return generation_pb2.ContentPart(image=generation_pb2.Image(data=part.data, media_type=part.media_type))


def _tool(tool: Tool) -> generation_pb2.Tool:
    return generation_pb2.Tool(
        name=tool.name, description=tool.description, parameters_json_schema=_json_text(tool.parameters)
    )


def _json_text(value: Mapping[str, object] | str) -> str:
    return value if isinstance(value, str) else json.dumps(dict(value), ensure_ascii=False)
