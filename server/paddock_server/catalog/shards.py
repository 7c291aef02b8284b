"""Files that belong together: one GGUF, or the shards that gguf-split makes of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from paddock_server.catalog.cursor import displayed
from paddock_server.catalog.roots import MODEL_SUFFIX, FoundPath

if TYPE_CHECKING:
    from paddock_server.catalog.facts import ModelFacts

_SHARD_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?i:\.gguf)", re.DOTALL | re.ASCII
)


@dataclass(frozen=True, slots=True)
class FileGroup:
    """The files of one model, in order.

    `count` is how many there must be; a file that is no shard is one of one. `numbers` are those of the
    files, from 1.
    """

    stem: str
    count: int
    numbers: tuple[int, ...]
    files: tuple[FoundPath, ...]

    @property
    def first(self) -> FoundPath:
        """The first file there is, which stands for the group where one file must."""
        return self.files[0]

    @property
    def load_path(self) -> Path:
        """The file that llama.cpp is given: the first shard, even where it is missing."""
        if self.count == 1 or self.numbers[0] == 1:
            return self.first.path
        return self.first.path.with_name(self._shard_name(1))

    @property
    def relative_load_path(self) -> str:
        """`load_path` from the model directory, as text."""
        return displayed(PurePath(self.first.relative).with_name(self.load_path.name))

    def set_fault(self) -> str | None:
        """What is wrong with the set of files by their names alone."""
        if not 1 <= self.numbers[0] <= self.numbers[-1] <= self.count:
            return f"is numbered {self.numbers[0]} to {self.numbers[-1]} of {self.count}; shards count from 1"
        missing = self.count - len(self.numbers)
        if not missing:
            return None
        present = frozenset(self.numbers)
        absent = next(number for number in range(1, self.count + 1) if number not in present)
        return f"{missing} of {self.count} shards are missing, the first of them {self._shard_name(absent)!r}"

    def _shard_name(self, number: int) -> str:
        return f"{self.stem}-{number:05}-of-{self.count:05}{MODEL_SUFFIX}"


def grouped(files: Sequence[FoundPath]) -> list[FileGroup]:
    """The files of one folder by the model they belong to, in the order of their first files."""
    groups: list[FileGroup] = []
    shard_sets: dict[tuple[str, int], dict[int, FoundPath]] = {}
    for file in files:
        match = _SHARD_NAME.fullmatch(file.path.name)
        if match is None:
            groups.append(FileGroup(file.path.name[: -len(MODEL_SUFFIX)], 1, (1,), (file,)))
        else:
            shard_sets.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = file
    for (stem, count), shards in shard_sets.items():
        numbers = tuple(sorted(shards))
        groups.append(FileGroup(stem, count, numbers, tuple(shards[number] for number in numbers)))
    return sorted(groups, key=lambda group: group.first.path)


def split_fault(group: FileGroup, facts: Sequence[ModelFacts]) -> tuple[FoundPath, str] | None:
    """The file of a full set whose header does not fit its place in the set, and what it says instead."""
    count = group.count
    for number, file, fact in zip(group.numbers, group.files, facts, strict=True):
        claimed = (fact.split.number + 1, fact.split.count) if fact.split else (1, 1)
        if claimed != (number, count):
            by_header = f"is shard {claimed[0]} of {claimed[1]} by its header"
            return file, f"{by_header}, and {number} of {count} by its name"
    expected = facts[0].split.tensor_count if facts[0].split else None
    found = sum(fact.tensor_count for fact in facts)
    if expected is not None and expected != found:
        return group.first, f"has {expected} tensors in all its shards by its header, and {found} are there"
    return None
