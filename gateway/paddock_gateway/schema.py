"""OpenAI's JSON as msgspec structs: requests as they come, responses as they leave.

Requests hold what is honoured; `paddock_gateway.parameters` has already refused or accepted the rest.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class ImageUrl(Struct, forbid_unknown_fields=True):
    """An image, `data:` URLs only."""

    url: str
    detail: str | None = None


class ContentPart(Struct, forbid_unknown_fields=True):
    """A piece of a message."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class FunctionCall(Struct, forbid_unknown_fields=True):
    """What the assistant called."""

    name: str
    arguments: str


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call the assistant made in an earlier turn."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | None = None


class Message(Struct):
    """One turn. Fields that are not honoured are checked against `parameters.MESSAGE_FIELDS`."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Struct, forbid_unknown_fields=True):
    """A function the model may call; `parameters` stays text, so that its key order does."""

    name: str
    description: str | None = None
    parameters: Raw = Raw()
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """A tool."""

    type: str
    function: FunctionDefinition


class FunctionName(Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedToolChoice(Struct, forbid_unknown_fields=True):
    """The one function that must be called."""

    type: str
    function: FunctionName


class JsonSchemaFormat(Struct, forbid_unknown_fields=True):
    """A JSON Schema for the output."""

    schema: Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """The shape of the output. `schema` beside `json_object` is llama-server's."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Raw = Raw()


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationParameters(Struct, kw_only=True):
    """What both dialects have."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int32, float] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    max_tokens: Int32 | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: Int32 | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None
    return_progress: bool | None = None
    keep_alive: float | str | None = None
    generation_config: str | None = None


class ChatRequest(GenerationParameters, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Raw]
    """Each a `Message`, decoded after its fields have been checked."""
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    chat_template_kwargs: Raw = Raw()


class CompletionRequest(GenerationParameters, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | Int32 | list[Int32]]
    logprobs: Int32 | None = None
    best_of: Int32 | None = None


class GenerationConfig(Struct):
    """What is honoured of transformers' `GenerationConfig`."""

    max_new_tokens: Int32 | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_strings: str | list[str] | None = None


class PromptTokensDetails(Struct):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(Struct):
    """Where the time went, with llama-server's names. Rates of generation leave the first token out."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptProgress(Struct):
    """How far the prompt is, with llama-server's names; `processed` counts cached tokens too."""

    total: int
    cache: int
    processed: int
    time_ms: int


class TopLogprob(Struct):
    """An alternative to a token."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(Struct):
    """A token and how likely it was. A token that splits a character is whole in `bytes` only."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log probabilities of a chat choice."""

    content: list[TokenLogprob]


class CompletionLogprobs(Struct):
    """Log probabilities of a completion choice: lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class FunctionFragment(Struct, omit_defaults=True):
    """A piece of a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallFragment(Struct, omit_defaults=True):
    """A piece of a call in a stream; `id`, `type` and the name come once."""

    index: int
    function: FunctionFragment
    id: str | None = None
    type: str | None = None


class ChatDelta(Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    reasoning_content: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallFragment] | None = None


class ChatChunkChoice(Struct, omit_defaults=True):
    """A choice in a chunk that has more to say than text."""

    index: int
    delta: ChatDelta
    finish_reason: str | msgspec.UnsetType | None = msgspec.UNSET
    logprobs: ChatLogprobs | None = None


class CompletionChoice(Struct):
    """A choice of a completion, whole or in a chunk."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompleteFunction(Struct):
    """A whole call."""

    name: str
    arguments: str


class CompleteToolCall(Struct):
    """A whole call."""

    id: str
    function: CompleteFunction
    type: str = "function"


class AssistantMessage(Struct):
    """What the model said."""

    content: str | None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CompleteToolCall] | msgspec.UnsetType = msgspec.UNSET
    role: str = "assistant"


class ChatChoice(Struct):
    """A choice of a chat completion."""

    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class Response(Struct):
    """What both answers have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    timings: Timings | msgspec.UnsetType


class ChatCompletion(Response, kw_only=True):
    """The answer to a chat completion."""

    choices: list[ChatChoice]
    object: str = "chat.completion"


class Completion(Response, kw_only=True):
    """The answer to a completion."""

    choices: list[CompletionChoice]
    object: str = "text_completion"


class ModelStatus(Struct, omit_defaults=True):
    """State of a model, as llama-server's router says it."""

    value: str
    failed: bool = False


class ModelMeta(Struct):
    """Facts of a model file, with llama-server's names."""

    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_params: int
    size: int


class ModelCard(Struct):
    """A model in a listing, with what llama-server's router adds to OpenAI's."""

    id: str
    aliases: list[str]
    """Other names that requests may use."""
    tags: list[str]
    created: int
    status: ModelStatus
    meta: ModelMeta | msgspec.UnsetType = msgspec.UNSET
    object: str = "model"
    owned_by: str = "paddock"


class ModelList(Struct):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: str = "list"


class ErrorDetail(Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    """The body of every error."""

    error: ErrorDetail
