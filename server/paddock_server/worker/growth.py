"""How much a chat template may make at a stroke: checks made before the text is there, and what fails them.

A template's time is bounded (`bounded`), but one call into C can fill memory long before its time is over and
cannot be interrupted. Nothing here knows jinja2 but for its namespaces, which are containers too.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import ItemsView, KeysView, ValuesView
from typing import TYPE_CHECKING, Any, Final, cast

from jinja2.utils import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_REPEATED: Final = 1024 * 1024
"""Longest sequence that `*` and the filters of lists may make, in elements."""

MOST_CHARACTERS: Final = 16 * 1024 * 1024
"""Longest text that an expression, a filter, a macro or a block may make."""

MOST_BITS: Final = 4096
"""Longest integer that `*` and `**` may make."""

MOST_DIGITS: Final = 1000
"""Most digits that `round` may round to, or away."""

_CONTAINERS: Final = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_FEW_CHARACTERS: Final = 24
"""What a number, an object or a container without its parts takes, about."""

_DIGITS: Final = re.compile(r"(\d+)")
_WIDTHS: Final = re.compile(r"%(?=(?:\([^()]*\))?[-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?)")
"""Width and precision behind every `%`: also behind the second of `%%`, so that no conversion is missed."""

_NESTED_KEY: Final = re.compile(r"%\([^()]*\(")

Value = Any
"""Whatever a template may hold: JSON values and functions."""


class TextBuffer(list[str]):
    """What a macro or a block collects before it becomes one text."""

    def __init__(self) -> None:
        super().__init__()
        self._length = 0

    def append(self, text: str, /) -> None:
        """Collect a text; ValueError when there is too much."""
        self._length += len(text)
        check_characters(self._length)
        super().append(text)

    def extend(self, texts: Iterable[str], /) -> None:
        """Collect texts; ValueError when there is too much."""
        for text in texts:
            self.append(text)


def check_characters(count: int) -> None:
    """Refuse a text of so many characters, if that is too many.

    Raises:
        ValueError: It is.
    """
    if count > MOST_CHARACTERS:
        text = f"a text of more than {MOST_CHARACTERS} characters"
        raise ValueError(text)


def check_widths(values: Iterable[Value]) -> None:
    """Refuse a text as wide as the largest number among the values, if that is too wide.

    Raises:
        ValueError: It is.
    """
    check_characters(max((value for value in values if isinstance(value, int)), default=0))


def check_elements(count: int) -> None:
    """Refuse a list of so many elements, if that is too many.

    Raises:
        ValueError: It is.
    """
    if count > MOST_REPEATED:
        text = f"a repetition of more than {MOST_REPEATED} elements"
        raise ValueError(text)


def text_length(value: Value) -> int:
    """Return about how many characters a value has when written as text.

    A container is counted once for every place it stands in: a list that holds another one twice, which holds
    another one twice, takes no memory until it is written.

    Raises:
        ValueError: There are too many.
    """
    return len(value) if isinstance(value, str | bytes) else _length(value, {})


def _length(value: Value, known: dict[int, tuple[Value, int]]) -> int:
    """Return the length of a value; `known` has those of containers by their id, and keeps them alive."""
    if isinstance(value, str | bytes):
        return len(value) + 2
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if id(value) in known:
        return known[id(value)][1]
    known[id(value)] = (value, 0)  # a namespace may hold itself
    length = _FEW_CHARACTERS
    for part in _parts(value):
        length += _length(part, known) + 2
        check_characters(length)
    known[id(value)] = (value, length)
    return length


def _parts(value: Value) -> Iterable[Value]:
    """Return what a container writes; other values write a few words."""
    if isinstance(value, dict):
        return itertools.chain(value.keys(), value.values())  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, _CONTAINERS):
        return cast("Iterable[Value]", value)
    if isinstance(value, Namespace):
        return (getattr(value, "_Namespace__attrs"),)  # noqa: B009  # written out it would be mangled
    return ()


def bounded_parts(values: Iterable[Value], separator: Value = "") -> list[Value]:
    """Return values that are about to be joined to one text, as a list.

    Raises:
        ValueError: The text would be too long.
    """
    between = text_length(separator)
    total = 0
    parts: list[Value] = []
    for value in values:
        total += between + text_length(value)
        check_characters(total)
        parts.append(value)
    return parts


def check_sum(left: Value, right: Value) -> None:
    """Refuse a sum of texts or lists whose result is huge.

    Raises:
        ValueError: It is.
    """
    if isinstance(left, str | bytes | list | tuple) and isinstance(right, str | bytes | list | tuple):
        check_characters(len(left) + len(right))  # pyright: ignore[reportUnknownArgumentType]


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
            check_elements(count * len(sequence))  # pyright: ignore[reportUnknownArgumentType]


def check_printf(text: str | bytes, values: Value) -> None:
    """Refuse `text % values` when it may be huge.

    Raises:
        ValueError: It may.
    """
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    # Where the key in `%(f(x))9d` ends is not worth a parser of our own: every number counts beside one.
    nested = _NESTED_KEY.search(text) is not None
    widths = {width for match in (_DIGITS if nested else _WIDTHS).finditer(text) for width in match.groups()}
    largest = max(text_length(values), *(int(width) for width in widths if width not in {None, "*"}), 0)
    if "*" in widths:  # which a key has no value for
        arguments = cast("tuple[Value, ...]", values) if isinstance(values, tuple) else (values,)
        largest = max(largest, *(value for value in arguments if isinstance(value, int)), 0)
    check_characters(len(text) + text.count("%") * largest)


def check_format(text: str, values: Sequence[Value]) -> None:
    """Refuse `text.format(...)` of these values when it may be huge.

    Raises:
        ValueError: It may, or it looks into values, which then cannot be told.
    """
    largest = text_length(values)
    fields = 0
    for _, name, form, _ in string.Formatter().parse(text):
        if name is None:
            continue
        if "." in name or "[" in name or "{" in (form or ""):
            message = "a format that looks into a value or takes a width from it; {} and {name} are right"
            raise ValueError(message)
        fields += 1
        for digits in _DIGITS.finditer(form or ""):
            largest = max(largest, int(digits[0]))
    check_characters(len(text) + fields * largest)


def check_replaced(text: str | bytes, old: Value, new: Value) -> None:
    """Refuse `text.replace(old, new)` when its result is huge.

    Raises:
        ValueError: It is.
    """
    if isinstance(old, str | bytes) and isinstance(new, str | bytes):
        count = text.count(old)  # pyright: ignore[reportArgumentType]  # of two kinds: a TypeError, as without it
        check_characters(len(text) + count * max(0, len(new) - len(old)))


def check_method(text: str | bytes, name: str, arguments: Sequence[Value]) -> None:
    """Refuse a method of a text that would make a huge one: padding to a width, replacing, translating.

    Raises:
        ValueError: It would.
    """
    if name in {"center", "ljust", "rjust", "zfill"}:
        check_widths(arguments)
    elif name == "expandtabs":
        tab = max((value for value in arguments if isinstance(value, int)), default=8)
        check_characters(len(text) * max(tab, 1))
    elif name == "translate":
        check_characters(len(text) * max((text_length(value) for value in arguments), default=1))
    elif name == "replace" and len(arguments) > 1:
        check_replaced(text, arguments[0], arguments[1])


def check_result(value: Value) -> Value:
    """Return what a function made, unless it is a text that is too long: upper case, escapes and the like
    make several characters of one.

    Raises:
        ValueError: It is.
    """
    if isinstance(value, str | bytes):
        check_characters(len(value))
    return value
