"""The models of `paddock.toml`: `[defaults]`, `[models.NAME]`, `[groups.NAME]` and `default_model`. Pure.

The other keys of the file are settings of the server (`paddock_server.config`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, cast

from paddock_server.catalog.configured import toml_lines
from paddock_server.catalog.configured.definitions import ConfiguredModels, Definition, Group, Setting
from paddock_server.catalog.configured.keys import BY_NAME, NOT_PER_MODEL, SAMPLING_BY_NAME, Key
from paddock_server.catalog.configured.kinds import checked_name, shown
from paddock_server.catalog.configured.problems import Place, Problem
from paddock_server.catalog.setup import Origin

MODEL_TABLES: Final = frozenset({"defaults", "models", "groups", "default_model"})
"""The keys at the top of the file that are read here."""

_SAMPLING: Final = "sampling"


def read_toml(text: str, file: str, folder: Path) -> ConfiguredModels:
    """What the file says of models. `file` names it in messages, relative paths in it start at `folder`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = Problem(Place(file, toml_lines.error_line(error)), "", f"is not TOML: {error}")
        return ConfiguredModels(Origin.CONFIG_FILE, folder, problems=[problem])
    return _Reader(file, toml_lines.key_lines(text)).document(document, folder)


class _Reader:
    def __init__(self, file: str, lines: Mapping[toml_lines.Path, int]) -> None:
        self._file = file
        self._lines = lines
        self._problems: list[Problem] = []

    def document(self, document: Mapping[str, Any], folder: Path) -> ConfiguredModels:
        groups = {
            name: Group(name, self._exclusive(table, ("groups", name)))
            for name, table in self._tables(document, "groups")
        }
        defaults = dict(
            self._settings(self._table(document.get("defaults", {}), ("defaults",)), ("defaults",))
        )
        for name in NOT_PER_MODEL & defaults.keys():
            self._report(("defaults", name), "belongs to one model; it cannot be a default")
        models = [
            Definition(name, self._place(("models", name)), dict(self._settings(table, ("models", name))))
            for name, table in self._tables(document, "models")
        ]
        self._check_group(("defaults",), defaults, groups)
        for model in models:
            self._check_group(("models", model.name), model.settings, groups)
        return ConfiguredModels(
            origin=Origin.CONFIG_FILE,
            folder=folder,
            defaults=defaults,
            models=models,
            groups=groups,
            default_model=self._default_model(document),
            problems=self._problems,
        )

    def _check_group(
        self, path: toml_lines.Path, settings: Mapping[str, Setting], groups: Mapping[str, Group]
    ) -> None:
        group = settings.get("group")
        if group is not None and group.value not in groups:
            known = ", ".join(groups) or "none"
            self._report((*path, "group"), f"must name a table [groups.NAME] ({known}), not {group.value!r}")

    def _default_model(self, document: Mapping[str, Any]) -> tuple[str, Place] | None:
        if "default_model" not in document:
            return None
        try:
            return checked_name(document["default_model"]), self._place(("default_model",))
        except ValueError as error:
            self._report(("default_model",), str(error))
            return None

    def _tables(self, document: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for inner, value in self._table(document.get(name, {}), (name,)).items():
            try:
                checked_name(inner)
            except ValueError as error:
                self._report((name, inner), str(error))
            yield inner, self._table(value, (name, inner))

    def _table(self, value: object, path: toml_lines.Path) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        self._report(path, f"must be a table, [{'.'.join(path)}], not {shown(value)}")
        return {}

    def _exclusive(self, table: Mapping[str, Any], path: toml_lines.Path) -> bool:
        for name in table.keys() - {"exclusive"}:
            self._report((*path, name), "is not known; a group has the key exclusive")
        exclusive = table.get("exclusive", False)
        if not isinstance(exclusive, bool):
            self._report((*path, "exclusive"), f"must be true or false, not {shown(exclusive)}")
            return False
        return exclusive

    def _settings(self, table: Mapping[str, Any], path: toml_lines.Path) -> Iterator[tuple[str, Setting]]:
        for name, value in table.items():
            if name == _SAMPLING:
                inner = self._table(value, (*path, name))
                yield from self._values(inner, (*path, name), SAMPLING_BY_NAME)
            else:
                yield from self._values({name: value}, path, BY_NAME)

    def _values(
        self, table: Mapping[str, Any], path: toml_lines.Path, keys: Mapping[str, Key]
    ) -> Iterator[tuple[str, Setting]]:
        for name, value in table.items():
            key = keys.get(name)
            if key is None:
                self._report((*path, name), _unknown(name, keys))
                continue
            try:
                checked = key.kind.checked(value)
            except ValueError as error:
                self._report((*path, name), str(error))
                continue
            yield key.dotted, Setting(key, checked, self._place((*path, name)))

    def _place(self, path: toml_lines.Path) -> Place:
        while path and path not in self._lines:
            path = path[:-1]
        return Place(self._file, self._lines.get(path, 0))

    def _report(self, path: toml_lines.Path, message: str) -> None:
        self._problems.append(Problem(self._place(path), ".".join(path), message))


def _unknown(name: str, keys: Mapping[str, Key]) -> str:
    near = get_close_matches(name, [*keys, *((_SAMPLING,) if keys is BY_NAME else ())], n=1)
    if near:
        return f"is not known; did you mean {near[0]}?"
    elsewhere = " It stands in the table sampling." if name in SAMPLING_BY_NAME else ""
    return f"is not known.{elsewhere}" if elsewhere else f"is not known; there are {', '.join(keys)}"
