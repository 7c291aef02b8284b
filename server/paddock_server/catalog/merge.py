"""What is on disk and what the configuration files say, put together. Pure.

Precedence, highest first: `[models.NAME]` of paddock.toml, a preset's section of that name, `[defaults]` of
paddock.toml, `[*]` of the preset; and where two sources have a model of one id, paddock.toml before the
preset before the model directories before the hub cache. What nobody says is left to the server's settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from paddock_server.catalog.configured.definitions import ConfiguredModels, Settings
from paddock_server.catalog.configured.keys import Part
from paddock_server.catalog.configured.problems import Place, Problem
from paddock_server.catalog.entries import CatalogEntry
from paddock_server.catalog.setup import NO_DEFAULTS, ModelSetup, Origin, RequestDefaults


@dataclass(frozen=True, slots=True)
class Merged:
    """What is served: models by id, in the order of their ids, and what is wrong with the files.

    The setup of an entry has all names of its model. The default model has the empty name as well.
    """

    served: Mapping[str, CatalogEntry]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A name that a source gives to files, with all that is said of it."""

    name: str
    origin: Origin
    place: Place | None
    entry: CatalogEntry
    settings: Settings

    @property
    def load_key(self) -> object:
        """Equal for names that one worker can serve."""
        if not self.settings:
            return self.entry.path, self.entry.mmproj_path, (), ""
        setup = _setup(self)
        return self.entry.path, self.entry.mmproj_path, tuple(sorted(setup.options.items())), setup.group


def merge(
    found: Mapping[Origin, Mapping[str, CatalogEntry]],
    configured: Sequence[ConfiguredModels],
    files: Mapping[Place, CatalogEntry],
) -> Merged:
    """Put the sources together.

    Args:
        found: The models on disk, by the source that lists them and by id.
        configured: What the configuration files say, lowest precedence first.
        files: The files that sections name, by the place of the section.
    """
    problems = [problem for one in configured for problem in one.problems]
    on_disk: dict[str, tuple[Origin, CatalogEntry]] = {}
    for origin in sorted(found, key=lambda origin: origin.value):
        on_disk.update({id_: (origin, entry) for id_, entry in found[origin].items()})
    candidates = _candidates(on_disk, configured, files, problems)
    problems += _name_conflicts(candidates)
    exclusive = {group.name for one in configured for group in one.groups.values() if group.exclusive}
    shared: dict[object, list[_Candidate]] = {}
    for candidate in candidates.values():
        shared.setdefault(candidate.load_key, []).append(candidate)
    served: dict[str, CatalogEntry] = {}
    for group in shared.values():
        entry = _served(group)
        if entry.setup.group in exclusive:
            entry = replace(entry, setup=replace(entry.setup, exclusive=True))
        served[entry.id] = entry
    problems += _set_default(served, configured)
    return Merged(dict(sorted(served.items())), tuple(problems))


def _candidates(
    on_disk: Mapping[str, tuple[Origin, CatalogEntry]],
    configured: Sequence[ConfiguredModels],
    files: Mapping[Place, CatalogEntry],
    problems: list[Problem],
) -> dict[str, _Candidate]:
    common: Settings = {}
    for one in configured:
        common = {**common, **one.defaults}
    candidates = {
        id_: _Candidate(id_, origin, None, entry, common) for id_, (origin, entry) in on_disk.items()
    }
    for one in configured:
        for model in one.models:
            earlier = candidates.get(model.name)
            entry = files.get(model.place) or (earlier.entry if earlier is not None else None)
            if entry is None:
                message = "names no file and is in no model directory, so it is not served; give it a path"
                problems.append(Problem(model.place, model.name, message, is_error=False))
                continue
            candidates[model.name] = _Candidate(
                model.name,
                one.origin,
                model.place,
                replace(entry, id=model.name),
                {**(earlier.settings if earlier is not None else common), **model.settings},
            )
            if entry.problem is not None and model.place in files:
                problems.append(Problem(model.place, model.name, entry.problem.message, is_error=False))
    return candidates


def _name_conflicts(candidates: Mapping[str, _Candidate]) -> list[Problem]:
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for candidate in candidates.values():
        setting = candidate.settings.get("aliases")
        if setting is None:
            continue
        for alias in cast("tuple[str, ...]", setting.value):
            if alias in candidates:
                if alias != candidate.name:
                    message = f"{alias!r} is an alias of {candidate.name!r}, and the id of another model"
                    problems.append(Problem(setting.place, "aliases", f"{message}; rename one of them"))
            elif alias in owners:
                message = f"{alias!r} is an alias of both {owners[alias]!r} and {candidate.name!r}"
                problems.append(Problem(setting.place, "aliases", f"{message}; take it from one of them"))
            owners.setdefault(alias, candidate.name)
    return problems


def _served(group: Sequence[_Candidate]) -> CatalogEntry:
    """The one model that serves all names of a group, whose files and load options are equal.

    Its id is that of the file in a model directory, else the first that a configuration file gives it, else
    that of the hub: the last so that a model keeps its id when what its section names has been downloaded.
    What is kept for the model as a whole is the most that any of its names asks for.
    """
    group = sorted(group, key=lambda candidate: candidate.origin is Origin.HUB_CACHE)
    first = group[0]
    if len(group) == 1 and not first.settings and first.origin is Origin.MODELS_DIR:
        return first.entry
    setups = [_setup(candidate) for candidate in group]
    names: dict[str, RequestDefaults] = {}
    aliases: list[str] = []
    for candidate, setup in zip(group, setups, strict=True):
        names[candidate.name] = setup.names[candidate.name]
        shown = () if candidate is first or setup.hidden else (candidate.name,)
        aliases += [*shown, *setup.aliases]
        for alias in setup.aliases:
            names.setdefault(alias, setup.names[candidate.name])
    setup = replace(
        setups[0],
        names=names,
        aliases=tuple(dict.fromkeys(alias for alias in aliases if alias != first.name)),
        tags=tuple(dict.fromkeys(tag for one in setups for tag in one.tags)),
        pinned=any(one.pinned for one in setups),
        priority=max(one.priority for one in setups),
        load_on_startup=any(one.load_on_startup for one in setups),
        hidden=all(one.hidden for one in setups),
        description=next((one.description for one in setups if one.description), ""),
        idle_timeout_seconds=_longest([one.idle_timeout_seconds for one in setups]),
        sleep_timeout_seconds=_longest([one.sleep_timeout_seconds for one in setups]),
        drain_seconds=_longest([one.drain_seconds for one in setups], zero_is_for_ever=False),
    )
    return replace(first.entry, id=first.name, setup=setup)


def _setup(candidate: _Candidate) -> ModelSetup:
    """What is said of one name, without the names it shares a worker with."""
    parts: dict[Part, dict[str, Any]] = {part: {} for part in Part}
    for setting in candidate.settings.values():
        parts[setting.key.part][setting.key.field] = setting.value
    model = parts[Part.MODEL]
    for used_elsewhere in ("path", "hf", "mmproj"):
        model.pop(used_elsewhere, None)
    defaults = _request_defaults(parts[Part.SAMPLING], parts[Part.REQUEST])
    return ModelSetup(
        origin=candidate.origin, names={candidate.name: defaults}, options=parts[Part.OPTION], **model
    )


def _request_defaults(sampling: dict[str, float], request: dict[str, Any]) -> RequestDefaults:
    if request.pop("reasoning_budget", None) == 0:
        arguments = json.loads(request.get("template_arguments_json", "{}"))
        request["template_arguments_json"] = json.dumps(
            {"enable_thinking": False, **arguments}, ensure_ascii=False
        )
    return RequestDefaults(sampling=sampling, **request)


def _longest(seconds: Sequence[float | None], *, zero_is_for_ever: bool = True) -> float | None:
    """The longest of the times that are set; None where one is left to the server."""
    given = [one for one in seconds if one is not None]
    if len(given) < len(seconds):
        return None
    return 0.0 if zero_is_for_ever and 0 in given else max(given)


def _set_default(served: dict[str, CatalogEntry], configured: Sequence[ConfiguredModels]) -> list[Problem]:
    wanted = next((one.default_model for one in reversed(configured) if one.default_model), None)
    if wanted is None:
        return []
    name, place = wanted
    for id_, entry in served.items():
        defaults = entry.setup.names.get(name, NO_DEFAULTS if name == id_ else None)
        if defaults is not None:
            names = {**entry.setup.names, "": defaults}
            served[id_] = replace(entry, setup=replace(entry.setup, names=names))
            return []
    return [Problem(place, "default_model", f"there is no model named {name!r}", is_error=False)]
