"""llama-server's `--models-preset` file: an INI with a section for each model and `[*]` for all. Pure.

Read as llama-server reads it, but for what traps its users: a `#` inside a value does not cut it, a line may
be indented, and a key without a counterpart is reported and left out instead of ending the server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from paddock_server.catalog.configured.definitions import ConfiguredModels, Definition, Setting
from paddock_server.catalog.configured.keys import BY_PRESET_NAME, NOT_PER_MODEL, SERVER_SETTINGS, Key
from paddock_server.catalog.configured.kinds import checked_name, shown
from paddock_server.catalog.configured.problems import Place, Problem
from paddock_server.catalog.setup import Origin

ALL_MODELS: Final = "*"
_HEADER: Final = re.compile(r"\[\s*(?P<name>[^\]]+?)\s*\]\s*(?:[;#].*)?")
_PAIR: Final = re.compile(r"(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(?P<value>.*)")
_COMMENT: Final = re.compile(r"(?:^|[ \t])[;#].*")
_TAG: Final = re.compile(r"(?:^|[-.])([A-Za-z0-9_]+)$")


def read_preset(text: str, file: str, folder: Path) -> ConfiguredModels:
    """What a preset file says. `file` names it in messages, relative paths in it start at `folder`."""
    reader = _Reader(file)
    for number, line in enumerate(text.splitlines(), start=1):
        reader.line(line.strip(), Place(file, number))
    return ConfiguredModels(
        origin=Origin.PRESET,
        folder=folder,
        defaults=reader.sections.pop(ALL_MODELS, (Place(file, 0), {}))[1],
        models=[Definition(name, place, settings) for name, (place, settings) in reader.sections.items()],
        problems=reader.problems,
    )


class _Reader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.sections: dict[str, tuple[Place, dict[str, Setting]]] = {}
        self._section = ""

    def line(self, line: str, place: Place) -> None:
        if not line or line[0] in ";#":
            return
        header = _HEADER.fullmatch(line)
        if header is not None:
            self._begin(header["name"], place)
            return
        pair = _PAIR.fullmatch(line)
        if pair is None:
            self._report(
                place, "", f"must be [section], key = value or a comment, not {shown(line)}", error=True
            )
        else:
            self._set(pair["key"], pair["value"], place)

    def _begin(self, written: str, place: Place) -> None:
        name = canonical_name(written)
        self._section = name
        try:
            checked_name(name)
        except ValueError as error:
            self._report(place, f"[{shown(name)}]", str(error), error=True)
        earlier = self.sections.pop(name, None)
        if earlier is not None:
            what = f"stands in line {earlier[0].line} too; as in llama-server the last one counts"
            self._report(place, f"[{name}]", what)
        self.sections[name] = (place, {})

    def _set(self, written: str, raw: str, place: Place) -> None:
        if written == "version":
            return
        if not self._section:
            self._report(
                place,
                written,
                "stands before any section, so that it belongs to no model; put it "
                "under [*] or the name of a model",
            )
            return
        key = BY_PRESET_NAME.get(written)
        if key is None:
            self._report(place, written, _without_counterpart(written))
            return
        if self._section == ALL_MODELS and key.name in NOT_PER_MODEL:
            self._report(place, written, "belongs to one model; it says nothing under [*]")
            return
        value = _COMMENT.sub("", raw).strip()
        if "#" in value or ";" in value:
            self._report(
                place,
                written,
                f"is taken whole, {shown(value)}; llama-server cuts it at '#' and ';'. "
                "A comment needs a space before it",
            )
        self._keep(key, written, value, place)

    def _keep(self, key: Key, written: str, value: str, place: Place) -> None:
        if value in key.unset_texts:
            return
        try:
            checked = key.kind.checked(key.kind.parsed(value))
        except ValueError as error:
            self._report(place, written, str(error), error=True)
            return
        self.sections[self._section][1][key.dotted] = Setting(key, checked, place)

    def _report(self, place: Place, key: str, message: str, *, error: bool = False) -> None:
        section = self._section
        dotted = f"[{section}] {key}" if section and key and key[0] != "[" else key
        self.problems.append(Problem(place, dotted, message, is_error=error))


def canonical_name(name: str) -> str:
    """The name of a section as llama-server has it: what follows the last colon in upper case."""
    repository, colon, tag = name.rpartition(":")
    match = _TAG.search(tag)
    if not colon or not tag:
        return name
    return f"{repository}:{(match[1] if match else tag).upper()}"


def _without_counterpart(written: str) -> str:
    flag = SERVER_SETTINGS.get(written)
    if flag is not None:
        return f"is a setting of the server and not of a model; use {flag}. It is left out"
    return "is no option that Paddock has; it is left out"
