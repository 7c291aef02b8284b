"""The lines of a TOML document, which `tomllib` does not tell. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

Path = tuple[str, ...]

_ERROR_LINE: Final = re.compile(r"\(at line (\d+), column \d+\)$")


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, at which each table and each key of a valid document is first mentioned.

    Splits the document into its statements: lines are joined until `tomllib` takes them for one. Only a value
    over several lines is read more than once.
    """
    lines: dict[Path, int] = {}
    table: Path = ()
    statement: list[str] = []
    begin = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            begin = number
        statement.append(line)
        parsed = _parsed("\n".join(statement))
        if parsed is None:
            continue
        is_header = statement[0].lstrip().startswith("[")
        statement = []
        base: Path = () if is_header else table
        deepest: Path = ()
        for path in _paths(parsed):
            lines.setdefault(base + path, begin)
            deepest = path
        if is_header:
            table = deepest
    return lines


def error_line(error: tomllib.TOMLDecodeError) -> int:
    """The line a syntax error is at; 0 where it is at the end of the document."""
    match = _ERROR_LINE.search(str(error))
    return int(match[1]) if match else 0


def _parsed(statement: str) -> Mapping[str, Any] | None:
    try:
        return tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return None


def _paths(value: object, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, list):
        for element in cast("list[object]", value):
            if isinstance(element, dict):
                yield from _paths(cast("object", element), path)
        return
    if isinstance(value, dict):
        for key, inner in cast("dict[str, object]", value).items():
            yield (*path, key)
            yield from _paths(inner, (*path, key))
