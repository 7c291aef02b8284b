"""What is wrong in a configuration file, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file; `line` counts from 1, and is 0 where the file as a whole is meant."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong at a place.

    `key` is the dotted name of what is wrong, `message` says what, and what would be right. With `is_error`
    the file does not validate, and nothing of it is taken over; otherwise this one thing is left out.
    """

    place: Place
    key: str
    message: str
    is_error: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class InvalidConfigError(Exception):
    """The configuration files do not validate, so nothing of them is taken over."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems if problem.is_error)


def refuse_errors(problems: Sequence[Problem]) -> None:
    """Raise InvalidConfigError with all problems when one of them is an error."""
    if any(problem.is_error for problem in problems):
        raise InvalidConfigError(problems)
