"""What becomes of every parameter a caller may send: one table.

A parameter is *honoured*, *refused* or *accepted*. Refused means: with its name, unless the value asks for
nothing (null, or one of `harmless`: what OpenAI takes as the default). Accepted parameters change nothing
about the answer of any server: they are there for somebody's accounts. A name that is not in the table is
refused too, so that a misspelt or new parameter never passes unnoticed.

Pure: the table, and the check against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec

from paddock_gateway.refusal import refuse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Dialect(Enum):
    """The two ways to ask for text."""

    CHAT = "chat"
    """`POST /v1/chat/completions`."""

    COMPLETION = "completion"
    """`POST /v1/completions`."""


class Handling(StrEnum):
    """What becomes of a parameter."""

    HONOURED = "honoured"
    REFUSED = "refused"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row of the table."""

    name: str
    handling: Handling
    note: str
    """Honoured: what OpenAI does otherwise. Refused: what to do instead. Accepted: why that is right."""

    dialects: tuple[Dialect, ...] = (Dialect.CHAT, Dialect.COMPLETION)

    harmless: tuple[object, ...] = ()
    """Values of a refused parameter that ask for nothing."""

    extension: bool = False
    """Whether OpenAI does not have it; llama-server or transformers do."""


_CHAT: Final = (Dialect.CHAT,)
_COMPLETION: Final = (Dialect.COMPLETION,)


def _honoured(
    name: str, note: str = "", dialects: tuple[Dialect, ...] = (Dialect.CHAT, Dialect.COMPLETION)
) -> Parameter:
    return Parameter(name, Handling.HONOURED, note, dialects)


def _refused(name: str, note: str, *harmless: object, dialects: tuple[Dialect, ...] = _CHAT) -> Parameter:
    return Parameter(name, Handling.REFUSED, note, dialects, harmless)


def _accepted(
    name: str, note: str, dialects: tuple[Dialect, ...] = (Dialect.CHAT, Dialect.COMPLETION)
) -> Parameter:
    return Parameter(name, Handling.ACCEPTED, note, dialects)


def _extension(
    name: str, note: str, dialects: tuple[Dialect, ...] = (Dialect.CHAT, Dialect.COMPLETION)
) -> Parameter:
    return Parameter(name, Handling.HONOURED, note, dialects, extension=True)


_ROWS: Final = (
    _honoured(
        "model", "One that is not loaded is loaded first. Left out: the default model, if there is one."
    ),
    _honoured("messages", "The role developer is system. Images as data: URLs only.", _CHAT),
    _honoured(
        "prompt", "A text, token ids, or a list of either; a list makes that many choices.", _COMPLETION
    ),
    _honoured("stream"),
    _honoured("stream_options", "include_usage. include_obfuscation is refused."),
    _honoured("n", "1 to 8."),
    _honoured("temperature", "Unset takes the model's default."),
    _honoured("top_p", "Unset takes the model's default."),
    _honoured("presence_penalty"),
    _honoured("frequency_penalty"),
    _honoured("logit_bias", "-100 or less bans the token."),
    _honoured("seed", "Choice i uses seed + i. Every prompt of a list uses the same seed."),
    _honoured("stop", "At most 16."),
    _honoured("max_completion_tokens", "-1 is no limit.", _CHAT),
    _honoured("max_tokens", "-1 is no limit, and so is leaving it out, for completions too."),
    _honoured(
        "logprobs", "Chat: whether. Completions: how many alternatives, answered as OpenAI's legacy lists."
    ),
    _honoured("top_logprobs", "0 to 20, with logprobs.", _CHAT),
    _honoured("response_format", "text, json_object, json_schema (always strict).", _CHAT),
    _honoured("tools", "Shown to the model, with tool_choice none; calls are not parsed yet.", _CHAT),
    _honoured("tool_choice", "With tools only none; calls are not parsed yet.", _CHAT),
    _honoured("best_of", "1, or the same as n: every choice is returned.", _COMPLETION),
    _refused("echo", "Put the prompt before the text yourself.", False, dialects=_COMPLETION),
    _refused("suffix", "Text cannot be inserted before a suffix.", "", dialects=_COMPLETION),
    _refused("audio", "Only text is generated."),
    _refused("modalities", "Only text is generated.", ["text"]),
    _refused("functions", "Use tools.", []),
    _refused("function_call", "Use tool_choice.", "none"),
    _refused("parallel_tool_calls", "Calls cannot be kept to one at a time.", True),
    _refused("moderation", "Nothing here moderates."),
    _refused("prediction", "Predicted output does not make this server faster."),
    _refused("web_search_options", "This server searches nothing."),
    _refused(
        "reasoning_effort",
        'Where the model\'s template reads it, send chat_template_kwargs {"reasoning_effort": "..."}.',
    ),
    _refused("verbosity", "Ask for it in a message.", "medium"),
    _refused("service_tier", "There is one tier.", "auto", "default"),
    _refused("store", "Nothing is stored.", False),
    _refused("prompt_cache_options", "No prompt is kept for later requests.", {}, {"mode": "implicit"}),
    _refused("prompt_cache_retention", "No prompt is kept for later requests.", "in_memory"),
    _accepted("user", "Names the caller's user for OpenAI's abuse detection."),
    _accepted("safety_identifier", "Names the caller's user for OpenAI's abuse detection.", _CHAT),
    _accepted("metadata", "Labels of a stored completion; without store nothing reads them.", _CHAT),
    _accepted("prompt_cache_key", "A hint for a prompt cache; no prompt is kept for later requests.", _CHAT),
    _extension("top_k", "0 keeps all."),
    _extension("min_p", "0 is off."),
    _extension("repeat_penalty", "1 is off. The same as repetition_penalty."),
    _extension("repetition_penalty", "1 is off. The same as repeat_penalty."),
    _extension("repeat_last_n", "Tokens the penalties look back on; -1 is all, 0 turns them off."),
    _extension("ignore_eos", "Goes on past the end of the text. For benchmarks."),
    _extension("grammar", "GBNF. Not together with response_format."),
    _extension("chat_template_kwargs", "Extra arguments of the chat template.", _CHAT),
    _extension(
        "keep_alive",
        'How long the idle model is kept, at least: seconds, or a text such as "5m", as Ollama has it. '
        "Below 0: 30 days. 0 is no wish: the model is not unloaded at once.",
    ),
    _extension("return_progress", "With stream: chunks with prompt_progress while the prompt is evaluated."),
    _extension(
        "generation_config", "What `transformers chat` sends: JSON as text. Plain parameters win over it."
    ),
    Parameter(
        "timings_per_token",
        Handling.REFUSED,
        "The last chunk of a stream has the timings.",
        harmless=(False,),
        extension=True,
    ),
)


def _table(rows: Iterable[Parameter]) -> Mapping[str, Parameter]:
    return MappingProxyType({row.name: row for row in rows})


PARAMETERS: Final[Mapping[Dialect, Mapping[str, Parameter]]] = MappingProxyType(
    {dialect: _table(row for row in _ROWS if dialect in row.dialects) for dialect in Dialect}
)
"""Every top-level parameter, by dialect and name."""

MESSAGE_FIELDS: Final = _table(
    (
        _honoured("role"),
        _honoured("content"),
        _honoured("tool_calls"),
        _honoured("tool_call_id"),
        _refused("name", "Say who speaks in the content.", ""),
        _refused("audio", "Only text is read and written."),
        _refused("function_call", "Use tool_calls."),
        _refused("refusal", "Put it into the content.", ""),
        _refused("annotations", "They cannot be shown to the model.", []),
        _accepted("reasoning_content", "Reasoning of an earlier turn: templates leave it out of the prompt."),
    )
)
"""Every field of a message."""

GENERATION_CONFIG_FIELDS: Final = _table(
    (
        _honoured("max_new_tokens"),
        _honoured("do_sample"),
        _honoured("temperature"),
        _honoured("top_p"),
        _honoured("top_k"),
        _honoured("min_p"),
        _honoured("repetition_penalty"),
        _honoured("stop_strings"),
        _refused("eos_token_id", "The model's own end tokens always stop; use stop for others."),
        _refused("num_beams", "There is no beam search.", 1),
        _refused("num_return_sequences", "Use n.", 1),
        _accepted("transformers_version", "Says who wrote it."),
        _accepted("_from_model_config", "Says where it came from."),
        _accepted("pad_token_id", "Describes the model; nothing is padded here."),
        _accepted("bos_token_id", "Describes the model; its file says the same."),
    )
)
"""Every field of `generation_config` that is not simply unknown."""


def check(table: Mapping[str, Parameter], members: Mapping[str, msgspec.Raw], prefix: str = "") -> None:
    """Refuse the first member of a JSON object that is unknown or asks for what is not done here.

    Args:
        table: What is known.
        members: The object, values undecoded.
        prefix: Dotted path of the object, for the message, with its final dot.
    """
    for name, raw in members.items():
        row = table.get(name)
        if row is None:
            refuse(prefix + name, "this server has no such parameter")
        if row.handling is Handling.REFUSED:
            value: object = msgspec.json.decode(raw)
            if not _asks_for_nothing(row, value):
                refuse(prefix + name, f"is not supported. {row.note}")


def _asks_for_nothing(row: Parameter, value: object) -> bool:
    return value is None or any(
        type(value) is type(harmless) and value == harmless for harmless in row.harmless
    )
