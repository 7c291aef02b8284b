"""What generating takes and gives: plain dataclasses, no protobuf. `paddock.types` has the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias, TypedDict


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    """End-of-sequence token or stop sequence."""
    LENGTH = "length"
    """`max_tokens` or the context limit."""
    TOOL_CALLS = "tool_calls"
    UNKNOWN = "unknown"


class Role(StrEnum):
    """Who speaks in a chat message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a chat message."""

    data: bytes
    media_type: str
    """For example `image/png`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made."""

    id: str
    name: str
    arguments_json: str
    """Exactly as generated: not always valid JSON."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role | str
    content: str | Sequence[str | Image] = ""
    tool_calls: Sequence[ToolCall] = ()
    """Only with `Role.ASSISTANT`."""
    tool_call_id: str = ""
    """The call this turn answers. Required with `Role.TOOL`."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] | str = field(default_factory=dict[str, object])
    """JSON Schema of the arguments, as an object or as JSON text."""


@dataclass(frozen=True, slots=True)
class ToolName:
    """The one tool that must be called."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """How far the evaluation of a prompt is, over all choices."""

    evaluated_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token."""

    token_id: int
    token: bytes
    """Not always valid UTF-8 on its own."""
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[TokenLogprob, ...] = ()
    """The most likely alternatives, most likely first."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of a tool call: `id` and `name` come once, `arguments_json` concatenates."""

    call_index: int
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Part of the output of one choice."""

    choice_index: int
    text: str
    """Text to append; whole characters."""
    reasoning_text: str
    tool_calls: tuple[ToolCallDelta, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One per token, when asked for with `top_logprobs`."""
    finish_reason: FinishReason | None
    """Set in the last chunk of the choice, and only there."""
    stop_sequence: str
    """The stop sequence that ended the choice; empty otherwise."""
    token_count: int
    """Tokens generated since the previous chunk of this choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens consumed and produced."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens whose state was reused."""
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in seconds."""

    load_seconds: float
    queue_seconds: float
    prompt_seconds: float
    generation_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole answer."""

    text: str
    reasoning_text: str
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_sequence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished generation."""

    generation_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    seed: int

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors, one per text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """Tokens of a text."""

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    """Bytes of each token, when asked for; empty otherwise. Not always valid UTF-8 on their own."""


Messages: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation. A mapping has the keys `role` and `content`."""

Prompt: TypeAlias = str | Sequence[int] | Messages
"""Text or token ids, continued as they are, or a conversation for the model's chat template."""


class GenerateOptions(TypedDict, total=False):
    """Options of `Client.generate` and `Client.complete`. What is left out takes the model's default."""

    temperature: float
    """0 decodes greedily."""
    top_p: float
    """Nucleus threshold, (0, 1]."""
    top_k: int
    """Candidates kept; 0 keeps all."""
    min_p: float
    """Minimum probability relative to the best candidate, [0, 1]."""
    presence_penalty: float
    """[-2, 2]."""
    frequency_penalty: float
    """[-2, 2]."""
    repetition_penalty: float
    """1 is off."""
    penalty_last_tokens: int
    """Tokens the penalties look back on; -1 looks back on all, 0 turns them off."""
    seed: int
    """Choice `i` uses `seed + i`. Left out, the server draws one and reports it."""
    logit_bias: Mapping[int, float]
    """Added to the logit of each token id; -100 or less bans the token."""
    max_tokens: int
    """Left out, only the context limits the length."""
    stop: Sequence[str]
    """Strings that end generation; at most 16, of at most 256 characters."""
    ignore_eos: bool
    """Keep going past the end-of-sequence token; for benchmarks."""
    json_schema: Mapping[str, object] | str
    """Shape the output must have: a JSON Schema, as an object or as JSON text."""
    grammar: str
    """Shape the output must have: a GBNF grammar."""
    json_object: bool
    """Whether the output must be a JSON object."""
    top_logprobs: int
    """Return log probabilities, with so many alternatives, 0 to 20. Left out, none are returned."""
    choice_count: int
    """Answers to generate, 1 to 8; default 1."""
    autoload: bool
    """Whether to load the model when it is not loaded. Left out, the server's setting decides."""
    keep_alive_seconds: float
    """Keep the idle model awake and loaded for at least so long after the request."""
    tools: Sequence[Tool]
    """Functions the model may call. Only with a conversation."""
    tool_choice: Literal["auto", "none", "required"] | ToolName
    """How the model chooses among `tools`; default "auto"."""
    template_arguments: Mapping[str, object]
    """Extra arguments of the chat template, for example `{"enable_thinking": False}`."""
    on_prompt_progress: Callable[[PromptProgress], None]
    """Called while a long prompt is evaluated."""
