"""How models of the Hugging Face Hub are named, and which files of a repository a name means. Pure.

    hf:ORG/REPO[@REVISION][:QUANT-OR-GLOB]

Without `hf:` the same text is the id of a model from the hub's cache, for example `org/repo:Q4_K_M`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

HUB_PREFIX: Final = "hf:"
MAIN: Final = "main"
"""The branch a name without a revision means."""

DEFAULT_TAGS: Final = ("Q4_K_M", "Q8_0")
"""What a name without a quantization takes, first of all; then the first model. As llama-server's `-hf`."""

_REPO: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII | re.IGNORECASE)
_TAG: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.ASCII | re.IGNORECASE)
_SUFFIX: Final = ".gguf"
_NO_MODEL: Final = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_PROJECTOR: Final = "mmproj"
_MAX_PATTERN_CHARACTERS: Final = 256
_NAMED_FILES: Final = 5


class HubNameError(Exception):
    """A name, or a part of one, is wrong.

    Attributes:
        field: which part: `repo_id`, `revision` or `file_pattern`.
        message: what is wrong with it and what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(field, message)

    @property
    def part(self) -> str:
        """The part in words, for a name that was typed whole."""
        return {"repo_id": "repository", "file_pattern": "quantization or file"}.get(self.field, self.field)


class NoSuchFileError(Exception):
    """A repository has no model that a pattern means; the message says which it has."""


@dataclass(frozen=True, slots=True)
class HubRef:
    """What a name means: `revision` is a branch, a tag or a commit; an empty `pattern` takes the default."""

    repo_id: str
    revision: str = MAIN
    pattern: str = ""

    @property
    def name(self) -> str:
        """The reference as the id of a model, in its one form."""
        return hub_id(self.repo_id, self.revision, self.pattern)


def hub_id(repo_id: str, revision: str, suffix: str) -> str:
    """Return the id of a model: `org/repo:suffix`, with `@revision` unless that is `main`."""
    at = "" if revision == MAIN else f"@{revision}"
    return f"{repo_id}{at}" + (f":{suffix}" if suffix else "")


def parse_hub_name(name: str) -> HubRef:
    """Read a name, with `hf:` before it or without.

    Raises:
        HubNameError: it is not one.
    """
    repo_and_revision, _, pattern = name.removeprefix(HUB_PREFIX).partition(":")
    repo_id, at, revision = repo_and_revision.partition("@")
    if at and not revision:
        field = "revision"
        raise HubNameError(field, "is empty; leave '@' out, or name a branch, a tag or a commit after it")
    return hub_ref(repo_id, revision, pattern)


def hub_ref(repo_id: str, revision: str, pattern: str) -> HubRef:
    """Check the parts of a reference; an empty revision is `main`. Raises `HubNameError`."""
    if not _REPO.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        field = "repo_id"
        raise HubNameError(field, f"must be ORG/REPO as the hub writes it, not {repo_id!r}")
    if revision and (len(revision) > _MAX_PATTERN_CHARACTERS or not _is_revision(revision)):
        field = "revision"
        raise HubNameError(field, f"must be a branch, a tag or a commit, not {revision!r}")
    parts = PurePosixPath(pattern).parts
    if len(pattern) > _MAX_PATTERN_CHARACTERS or not pattern.isprintable() or ".." in parts:
        field = "file_pattern"
        raise HubNameError(
            field, f"must be a quantization such as Q4_K_M, a file name or a glob, not {pattern!r}"
        )
    # Quantizations are not told apart by case, so that one of them has one name.
    return HubRef(repo_id, revision or MAIN, pattern if _is_glob(pattern) else pattern.upper())


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash."""
    return _COMMIT.fullmatch(revision) is not None


def is_digest(text: str) -> bool:
    """Whether a text is the hash of a file: sha256 in hex, or sha1 as git computes it."""
    return _DIGEST.fullmatch(text) is not None


def _is_revision(revision: str) -> bool:
    return _REVISION.fullmatch(revision) is not None and ".." not in revision


def _is_glob(pattern: str) -> bool:
    return pattern.lower().endswith(_SUFFIX) or any(character in pattern for character in "*?[/")


def split_of(path: str) -> tuple[str, int, int]:
    """Return the stem of a GGUF file, and its place in its set of shards: `(stem, 1, 1)` when it is none."""
    stem = path.removesuffix(_SUFFIX)
    match = _SPLIT.fullmatch(stem)
    return (match[1], int(match[2]), int(match[3])) if match else (stem, 1, 1)


def quant_tag(path: str) -> str:
    """Return the quantization a file name ends with, in upper case; empty when it ends otherwise."""
    match = _TAG.search(PurePosixPath(split_of(path)[0]).name)
    return match[1].upper() if match else ""


def is_model_file(path: str) -> bool:
    """Whether a file is by its name a model to load, or the first shard of one."""
    name = PurePosixPath(path).name
    return path.endswith(_SUFFIX) and not any(word in name for word in _NO_MODEL) and split_of(path)[1] == 1


def choose_model(paths: Iterable[str], pattern: str) -> str:
    """Return the file, or the first shard, that a pattern means among the files of a repository.

    Raises:
        NoSuchFileError: none, or more than one.
    """
    models = sorted(path for path in paths if is_model_file(path))
    if not models:
        message = "it has no GGUF model"
        raise NoSuchFileError(message)
    if _is_glob(pattern):
        found = [path for path in models if _matches(path, pattern)]
        if len(found) > 1:
            message = f"{pattern!r} means {len(found)} models, among them {_listed(found)}; name one"
            raise NoSuchFileError(message)
        if found:
            return found[0]
    else:
        for tag in (pattern,) if pattern else DEFAULT_TAGS:
            found = [path for path in models if quant_tag(path) == tag.upper()] or [
                # As llama-server: the tag anywhere in the path, before a dot or a dash.
                path
                for path in models
                if re.search(re.escape(tag) + "[.-]", path, re.IGNORECASE)
            ]
            if found:
                return found[0]
        if not pattern:
            return models[0]
    message = f"no file matches {pattern!r}; it has {_listed(models)}"
    raise NoSuchFileError(message)


def _matches(path: str, pattern: str) -> bool:
    target = path if "/" in pattern else PurePosixPath(path).name
    # The shards of a set have one name together, that of the file they were split from.
    whole = split_of(target)[0] + _SUFFIX
    return fnmatchcase(target, pattern) or fnmatchcase(whole, pattern)


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED_FILES} more" if len(paths) > _NAMED_FILES else ""
    return ", ".join(paths[:_NAMED_FILES]) + more


def shards_of(paths: Iterable[str], model: str) -> list[str]:
    """Return all files of the set that `model` is the first of, in order; a file that is no shard alone.

    Raises:
        NoSuchFileError: some of them are missing.
    """
    stem, _, count = split_of(model)
    if count == 1:
        return [model]
    found = {
        split_of(path)[1]: path
        for path in paths
        if path.endswith(_SUFFIX) and split_of(path)[::2] == (stem, count)
    }
    if sorted(found) != list(range(1, count + 1)):
        message = f"it has {len(found)} of the {count} shards of {model}"
        raise NoSuchFileError(message)
    return [found[number] for number in sorted(found)]


def choose_projector(paths: Iterable[str], model: str) -> str | None:
    """Return the projector that belongs to a model: of those in its folder or above it, the nearest one,
    and of several there the one whose quantization has the number of bits closest to the model's."""
    folder = PurePosixPath(model).parent
    best: tuple[int, int, str] | None = None
    for path in sorted(paths):
        place = PurePosixPath(path).parent
        if not path.endswith(_SUFFIX) or _PROJECTOR not in PurePosixPath(path).name:
            continue
        if place != folder and place not in folder.parents:
            continue
        rank = (-len(place.parts), abs(_bits(path) - _bits(model)), path)
        best = rank if best is None else min(best, rank)
    return best[2] if best else None


def _bits(path: str) -> int:
    match = re.search(r"\d+", quant_tag(path), re.ASCII)
    return int(match[0][:4]) if match else 0
