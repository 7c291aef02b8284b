"""What a request must look like before anything is done for it. Pure; each problem names its field.

Only what needs no model is checked here. What depends on the vocabulary, the context or the template is
checked by the worker, which answers with the same field names.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final

from paddock.durations import MAX_KEEP_ALIVE_SECONDS
from paddock.errors import InvalidFieldError, Reason, make_error
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.duration_pb2 import Duration

MAX_MODEL_NAME_CHARACTERS: Final = 512
MAX_CHOICES: Final = 8
MAX_STOP_SEQUENCES: Final = 16
MAX_STOP_SEQUENCE_CHARACTERS: Final = 256
MAX_LOGIT_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_EMBED_TEXTS: Final = 64
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 50
MAX_TOOLS: Final = 256
MAX_JSON_CHARACTERS: Final = 256 * 1024
MAX_TOKEN_ID: Final = 2**31 - 1
TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def model_name(model: str) -> None:
    """Check the `model` field every request about a model has."""
    if not model:
        msg = "model"
        raise InvalidFieldError.of(msg, "must name a model; List shows the models there are")
    if len(model) > MAX_MODEL_NAME_CHARACTERS:
        msg = "model"
        raise InvalidFieldError.of(msg, f"must be at most {MAX_MODEL_NAME_CHARACTERS} characters long")


def load(request: pb.LoadRequest) -> None:
    """Check a `LoadRequest`."""
    model_name(request.model)
    _known_enum("conflict_policy", request.conflict_policy, pb.LoadConflictPolicy.values())
    if request.HasField("load_timeout"):
        _positive_duration("load_timeout", request.load_timeout)


def download(request: pb.DownloadRequest) -> None:
    """Check a `DownloadRequest`. Names of the hub are checked where they are read."""
    if request.model or not request.HasField("source"):
        model_name(request.model)


def stop_download(request: pb.StopDownloadRequest) -> None:
    """Check a `StopDownloadRequest`."""
    model_name(request.model)
    _known_enum("mode", request.mode, pb.StopDownloadMode.values(), unspecified=False)


def unload(request: pb.UnloadRequest) -> None:
    """Check an `UnloadRequest`."""
    model_name(request.model)
    _known_enum("mode", request.mode, pb.UnloadMode.values())
    if request.HasField("drain_timeout") and request.drain_timeout.ToNanoseconds() < 0:
        msg = "drain_timeout"
        raise InvalidFieldError.of(msg, "must not be negative")


def list_models(request: pb.ListRequest) -> None:
    """Check a `ListRequest`."""
    if request.page_size < 0:
        msg = "page_size"
        raise InvalidFieldError.of(msg, "must not be negative; 0 takes the default of 50")
    for index, state in enumerate(request.states):
        _known_enum(f"states[{index}]", state, model_pb2.ModelState.values(), unspecified=False)


def generate(request: pb.GenerateRequest) -> None:
    """Check a `GenerateRequest`."""
    model_name(request.model)
    match request.WhichOneof("input"):
        case None:
            msg = "input"
            raise InvalidFieldError.of(msg, "one of chat, prompt and tokens is required")
        case "chat":
            _chat(request.chat)
        case "tokens":
            _token_ids("tokens.token_ids", request.tokens.token_ids)
            if not request.tokens.token_ids:
                msg = "tokens.token_ids"
                raise InvalidFieldError.of(msg, "must hold at least one token id")
        case "prompt":
            pass  # Any text will do; an empty one is the beginning-of-sequence token alone.
    if not 0 <= request.choice_count <= MAX_CHOICES:
        msg = "choice_count"
        raise InvalidFieldError.of(msg, f"must be 1 to {MAX_CHOICES}; 0 takes the default of 1")
    _known_enum("autoload_policy", request.autoload_policy, pb.AutoloadPolicy.values())
    _sampling(request.sampling)
    _stop(request.stop)
    if request.HasField("logprobs") and not 0 <= request.logprobs.top_count <= MAX_TOP_LOGPROBS:
        msg = "logprobs.top_count"
        raise InvalidFieldError.of(msg, f"must be 0 to {MAX_TOP_LOGPROBS}")
    if request.HasField("constraint"):
        _constraint(request.constraint)
    _keep_alive(request.keep_alive)


def generation_command(command: pb.GenerationCommand, last_number: int) -> None:
    """Check a command of `GenerateMany`, apart from the request it may hold; that fails its generation alone.

    Args:
        command: The command.
        last_number: The highest number started on its stream; 0 before the first.
    """
    kind = command.WhichOneof("command")
    if kind is None:
        msg = "commands.command"
        raise InvalidFieldError.of(msg, "must hold start, grant or cancel")
    if kind == "start":
        if command.number <= last_number:
            msg = "commands.number"
            raise InvalidFieldError.of(
                msg, f"must be higher than {last_number}, the last one started; it was {command.number}"
            )
    elif not 0 < command.number <= last_number:
        msg = "commands.number"
        raise InvalidFieldError.of(msg, f"must have been started on this stream; {command.number} was not")
    if kind == "start" and command.start.credit < 1:
        msg = "commands.start.credit"
        raise InvalidFieldError.of(msg, "must be at least 1")
    if kind == "grant" and command.grant.credit < 1:
        msg = "commands.grant.credit"
        raise InvalidFieldError.of(msg, "must be at least 1")


def embed(request: pb.EmbedRequest) -> None:
    """Check an `EmbedRequest`."""
    model_name(request.model)
    _keep_alive(request.keep_alive)
    _known_enum("autoload_policy", request.autoload_policy, pb.AutoloadPolicy.values())
    if not 1 <= len(request.texts) <= MAX_EMBED_TEXTS:
        msg = "texts"
        raise InvalidFieldError.of(
            msg,
            f"must hold 1 to {MAX_EMBED_TEXTS} texts, not {len(request.texts)}; send more in several calls",
        )


def detokenize(request: pb.DetokenizeRequest) -> None:
    """Check a `DetokenizeRequest`."""
    model_name(request.model)
    _token_ids("token_ids", request.token_ids)


def stream_logs(request: pb.StreamLogsRequest) -> None:
    """Check a `StreamLogsRequest`."""
    model_name(request.model)
    if request.tail_line_count < 0:
        msg = "tail_line_count"
        raise InvalidFieldError.of(msg, "must not be negative; 0 starts with every line held")


def _chat(chat: gen.ChatInput) -> None:
    if not chat.messages:
        msg = "chat.messages"
        raise InvalidFieldError.of(msg, "must hold at least one message")
    for index, message in enumerate(chat.messages):
        path = f"chat.messages[{index}]"
        _known_enum(f"{path}.role", message.role, gen.Role.values(), unspecified=False)
        if message.tool_calls and message.role != gen.ROLE_ASSISTANT:
            msg = f"{path}.tool_calls"
            raise InvalidFieldError.of(msg, "belongs to messages of the assistant only")
        if message.role == gen.ROLE_TOOL and not message.tool_call_id:
            msg = f"{path}.tool_call_id"
            raise InvalidFieldError.of(msg, "is required in a message of a tool")
        for part_index, part in enumerate(message.content):
            if part.WhichOneof("part") is None:
                msg = f"{path}.content[{part_index}]"
                raise InvalidFieldError.of(msg, "must hold a text or an image")
        for call_index, call in enumerate(message.tool_calls):
            _json_object(f"{path}.tool_calls[{call_index}].arguments_json", call.arguments_json or "{}")
    if len(chat.tools) > MAX_TOOLS:
        msg = "chat.tools"
        raise InvalidFieldError.of(msg, f"must hold at most {MAX_TOOLS} tools")
    for index, tool in enumerate(chat.tools):
        if not TOOL_NAME.fullmatch(tool.name):
            msg = f"chat.tools[{index}].name"
            raise InvalidFieldError.of(msg, f"must match {TOOL_NAME.pattern}")
        if tool.parameters_json_schema:
            _json_object(f"chat.tools[{index}].parameters_json_schema", tool.parameters_json_schema)
    if chat.tool_choice.tool_name and chat.tool_choice.tool_name not in {tool.name for tool in chat.tools}:
        msg = "chat.tool_choice.tool_name"
        raise InvalidFieldError.of(msg, "must be the name of one of chat.tools")
    if chat.tools and chat.tool_choice.mode != gen.TOOL_CHOICE_MODE_NONE:
        raise make_error(
            Reason.NOT_IMPLEMENTED,
            "chat.tools: tool calls are not parsed yet; set tool_choice to none to only show the tools",
            metadata={"field": "chat.tools"},
        )
    if chat.template_arguments_json:
        _json_object("chat.template_arguments_json", chat.template_arguments_json)


def _sampling(sampling: gen.SamplingParams) -> None:
    _in_range(sampling, "temperature", 0, 100)
    _in_range(sampling, "top_p", 0, 1, low_open=True)
    _in_range(sampling, "top_k", 0, MAX_TOKEN_ID)
    _in_range(sampling, "min_p", 0, 1)
    _in_range(sampling, "presence_penalty", -2, 2)
    _in_range(sampling, "frequency_penalty", -2, 2)
    _in_range(sampling, "repetition_penalty", 0, 10, low_open=True)
    _in_range(sampling, "penalty_last_tokens", -1, MAX_TOKEN_ID)
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        msg = "sampling.logit_bias"
        raise InvalidFieldError.of(msg, f"must hold at most {MAX_LOGIT_BIASES} tokens")
    for token_id, bias in sampling.logit_bias.items():
        if token_id < 0:
            msg = f"sampling.logit_bias[{token_id}]"
            raise InvalidFieldError.of(msg, "must be a token id, not negative")
        if math.isnan(bias):
            msg = f"sampling.logit_bias[{token_id}]"
            raise InvalidFieldError.of(msg, "must be a number")


def _stop(stop: gen.StopParams) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        msg = "stop.max_tokens"
        raise InvalidFieldError.of(msg, "must be at least 1; leave it unset for no limit")
    if len(stop.stop_sequences) > MAX_STOP_SEQUENCES:
        msg = "stop.stop_sequences"
        raise InvalidFieldError.of(msg, f"must hold at most {MAX_STOP_SEQUENCES} strings")
    for index, text in enumerate(stop.stop_sequences):
        if not 1 <= len(text) <= MAX_STOP_SEQUENCE_CHARACTERS:
            msg = f"stop.stop_sequences[{index}]"
            raise InvalidFieldError.of(
                msg,
                f"must be 1 to {MAX_STOP_SEQUENCE_CHARACTERS} characters long",
            )


def _constraint(constraint: gen.OutputConstraint) -> None:
    match constraint.WhichOneof("constraint"):
        case None:
            msg = "constraint"
            raise InvalidFieldError.of(msg, "one of json_schema, grammar and json_object is required")
        case "json_schema":
            _json_object("constraint.json_schema", constraint.json_schema)
        case "grammar":
            if not constraint.grammar.strip():
                msg = "constraint.grammar"
                raise InvalidFieldError.of(msg, "must be a GBNF grammar with a rule named root")
        case "json_object":
            pass


def _in_range(
    sampling: gen.SamplingParams, name: str, low: float, high: float, *, low_open: bool = False
) -> None:
    """Check one optional number. NaN fails both comparisons, so it is refused too."""
    if not sampling.HasField(name):  # pyright: ignore[reportArgumentType]  # the stub wants a literal
        return
    value: float = getattr(sampling, name)
    above = value > low if low_open else value >= low
    if not (above and value <= high):
        low_text = f"more than {low}" if low_open else f"at least {low}"
        msg = f"sampling.{name}"
        raise InvalidFieldError.of(msg, f"must be {low_text} and at most {high}, not {value:g}")


def _known_enum(field: str, value: int, known: Sequence[int], *, unspecified: bool = True) -> None:
    if value not in known or (value == 0 and not unspecified):
        raise InvalidFieldError.of(field, f"{value} is not a value this server knows")


def _positive_duration(field: str, duration: Duration) -> None:
    if duration.ToNanoseconds() <= 0:
        raise InvalidFieldError.of(field, "must be more than zero")


def _keep_alive(duration: Duration) -> None:
    """Check how long a request wants its model kept; unset is 0."""
    if not 0 <= duration.seconds + duration.nanos / 1e9 <= MAX_KEEP_ALIVE_SECONDS:
        msg = "keep_alive"
        raise InvalidFieldError.of(
            msg,
            f"must be from 0 to {MAX_KEEP_ALIVE_SECONDS} seconds; 0 leaves the idle time-outs as they are",
        )


def _token_ids(field: str, token_ids: Iterable[int]) -> None:
    for index, token_id in enumerate(token_ids):
        if token_id < 0:
            msg = f"{field}[{index}]"
            raise InvalidFieldError.of(msg, "must be a token id, not negative")


def _json_object(field: str, text: str) -> None:
    if len(text) > MAX_JSON_CHARACTERS:
        raise InvalidFieldError.of(field, f"must be at most {MAX_JSON_CHARACTERS} characters long")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFieldError.of(field, f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFieldError.of(field, "must be one JSON object")
