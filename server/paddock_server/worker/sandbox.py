"""jinja2 as chat templates expect it: like Hugging Face's `apply_chat_template`, with limits on growth."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.runtime import Context

__all__ = ["TemplateError", "TemplateSyntaxError", "compile_template"]

MOST_REPEATED: Final = 1024 * 1024
"""Longest sequence that `*` may make, in elements."""

_GROWING_METHODS: Final = frozenset({"center", "expandtabs", "ljust", "replace", "rjust", "zfill"})

MOST_CHARACTERS: Final = 16 * 1024 * 1024
"""Longest text that `+`, padding or replacing may make."""

MOST_BITS: Final = 4096
"""Longest integer that `*` and `**` may make."""

Value = Any
"""Whatever a template may hold: JSON values and functions."""


def compile_template(source: str) -> Template:
    """Compile a chat template.

    Raises:
        TemplateSyntaxError: It is wrong.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=functions)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model was trained on; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  declared by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox keeps templates from Python's objects; this keeps them from filling memory at a stroke."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        if operator == "+":
            check_sum(left, right)
        else:
            check_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Value, /, *args: Value, **kwargs: Value) -> Value:
        """Call a function; those of strings that make long ones at a stroke are checked before."""
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ in _GROWING_METHODS:
            check_method(text, [*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)


def check_sum(left: Value, right: Value) -> None:
    """Refuse a sum of texts or lists whose result is huge.

    Raises:
        ValueError: It is.
    """
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_characters(len(left) + len(right))  # pyright: ignore[reportUnknownArgumentType]


def check_method(text: str, arguments: Iterable[Value]) -> None:
    """Refuse a method of a text that may make a huge one: padding to a width, or replacing.

    Raises:
        ValueError: It may.
    """
    for argument in arguments:
        if isinstance(argument, int):
            _check_characters(argument)
        elif isinstance(argument, str):
            _check_characters(len(text) * len(argument))


def _check_characters(count: int) -> None:
    if count > MOST_CHARACTERS:
        text = f"a text of more than {MOST_CHARACTERS} characters"
        raise ValueError(text)


def check_growth(name: str, left: Value, right: Value) -> None:
    """Refuse a product, a power or a repetition whose result is huge; `name` is the operator.

    Raises:
        ValueError: It is.
    """
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if name == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            text = f"a number of more than {MOST_BITS} bits"
            raise ValueError(text)
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            length = len(sequence)  # pyright: ignore[reportUnknownArgumentType]
            if count * length > MOST_REPEATED:
                text = f"a repetition of more than {MOST_REPEATED} elements"
                raise ValueError(text)


def to_json(
    value: Value,
    ensure_ascii: bool = False,  # templates pass these by position too
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as templates expect it: no HTML escapes, key order and characters kept."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now(UTC).astimezone().strftime(form)
