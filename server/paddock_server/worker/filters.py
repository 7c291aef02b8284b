"""jinja2's filters for chat templates, none of which makes a huge text or list at a stroke."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

from jinja2 import pass_eval_context
from jinja2.filters import FILTERS, make_attrgetter

from paddock_server.worker.growth import (
    MOST_DIGITS,
    bounded_parts,
    check_characters,
    check_elements,
    check_printf,
    check_replaced,
    check_result,
    text_length,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from jinja2.nodes import EvalContext


Filter = Callable[..., Any]
_FILTERS: Final = cast("Mapping[str, Filter]", FILTERS)
Value = Any
"""Whatever a template may hold: JSON values and functions."""


def bounded_filters() -> dict[str, Filter]:
    """Return the filters by name. Each raises ValueError instead of making something huge."""
    filters = {name: _bounded(function, _CHECKS.get(name)) for name, function in _FILTERS.items()}
    filters["join"] = _join
    filters["sum"] = _bounded(_sum, None)
    filters["tojson"] = _bounded(to_json, None)
    return filters


def _bounded(function: Filter, check: Callable[..., None] | None) -> Filter:
    """Return the filter with a check of its arguments before it and one of its text after it."""
    # What jinja2 passes first is no argument of the template's.
    own = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Value, **kwargs: Value) -> Value:
        if check is not None:
            check(*args[own:], **kwargs)
        return check_result(function(*args, **kwargs))

    return run


def to_json(
    value: Value,
    ensure_ascii: bool = False,  # templates pass these by position too
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as templates expect it: no HTML escapes, key order and characters kept.

    Raises:
        ValueError: It is huge.
    """
    text_length(value)
    if isinstance(indent, int):
        check_characters(indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    return "".join(bounded_parts(encoder.iterencode(value)))


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Value], d: str = "", attribute: Value = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    # Only now are there values to be counted: they may be made one by one.
    return check_result(_FILTERS["join"](context, bounded_parts(value, d), d))


@pass_eval_context
def _sum(context: EvalContext, iterable: Iterable[Value], attribute: Value = None, start: Value = 0) -> Value:
    if attribute is not None:
        iterable = map(make_attrgetter(context.environment, attribute), iterable)
    if isinstance(start, list | tuple):
        iterable = list(iterable)
        check_elements(sum(len(item) for item in iterable))
    return _FILTERS["sum"](context.environment, iterable, None, start)


def _check_written(*values: Value, **named: Value) -> None:
    """For filters that write their values as text and make little more of it."""
    text_length([*values, *named.values()])


def _check_first(value: Value, *_values: Value, **_named: Value) -> None:
    """For filters that write their value as text, with settings."""
    text_length(value)


def _check_width(value: Value, width: int = 80) -> None:
    text_length(value)
    check_characters(width)


def _check_replace(value: Value, old: Value, new: Value, count: int | None = None) -> None:
    del count
    text_length([value, old, new])
    check_replaced(str(value), str(old), str(new))


def _check_indent(value: Value, width: int | str = 4, first: bool = False, blank: bool = False) -> None:
    del first, blank
    lines = len(value.splitlines()) + 1 if isinstance(value, str) else 1
    check_characters(text_length(value) + lines * (len(width) if isinstance(width, str) else width))


def _check_format(value: Value, *args: Value, **kwargs: Value) -> None:
    text_length(value)
    check_printf(str(value), kwargs or args)


def _check_inserted(value: Value, *args: Value, **kwargs: Value) -> None:
    """For filters that may put their texts behind every character of the value."""
    texts = [text for text in (*args, *kwargs.values()) if not isinstance(text, int)]
    check_characters(text_length(value) * text_length(texts))


def _check_round(value: Value, precision: int = 0, method: str = "common") -> None:
    del value, method
    if abs(precision) > MOST_DIGITS:
        text = f"precision must be at most {MOST_DIGITS}, not {precision}"
        raise ValueError(text)


def _check_batch(value: Value, linecount: int, fill_with: Value = None) -> None:
    del value, fill_with
    check_elements(linecount)


def _check_slice(value: Value, slices: int, fill_with: Value = None) -> None:
    del value, fill_with
    check_elements(slices)


_CHECKS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {
        "attr": _check_written,
        "batch": _check_batch,
        "capitalize": _check_first,
        "center": _check_width,
        "e": _check_first,
        "escape": _check_first,
        "forceescape": _check_first,
        "format": _check_format,
        "indent": _check_indent,
        "lower": _check_first,
        "pprint": _check_first,
        "replace": _check_replace,
        "round": _check_round,
        "safe": _check_first,
        "slice": _check_slice,
        "string": _check_first,
        "striptags": _check_first,
        "title": _check_first,
        "trim": _check_first,
        "truncate": _check_written,
        "upper": _check_first,
        "urlencode": _check_first,
        "urlize": _check_inserted,
        "wordcount": _check_first,
        "wordwrap": _check_inserted,
        "xmlattr": _check_first,
    }
)
"""What is looked at before a filter runs; each names its arguments as the filter does.
The other filters write nothing."""
