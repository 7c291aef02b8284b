"""In how many ways a GBNF grammar may go on: what llama.cpp has to try before it takes a character.

llama.cpp follows every reference a rule can begin with, again for every way that leads there. Thirty rules
that each begin in two ways with the next are a billion ways, and a call into C that nothing can interrupt.
What grows with the output instead, such as a rule that doubles with every character, is not seen here.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from paddock_server.worker.errors import Reason, WorkerError, reject

MOST_BEGINNINGS: Final = 100_000
"""More than a list of alternates has in the longest text, and thousands of times what grammars of languages
have. llama.cpp compares each with all others: 60,000 take it five seconds."""

DEEPEST_BEGINNING: Final = 500
"""Rules that may begin with each other in a chain: llama.cpp recurses along it, and so does this module."""

_LEXEMES: Final = re.compile(
    r"""
    \#[^\r\n]*
    | (?P<terminal> "(?:\\.|[^"\\])*"? | \[(?:\\.|[^\]\\])*\]? | !?<[^>]*>? | \. )
    | (?P<name> [a-zA-Z0-9-]+ ) [ \t]* (?P<defined> ::= )?
    | (?P<mark> [()|*?] | \{[^}]*\}? )
    """,
    re.VERBOSE | re.DOTALL,
)
"""What matters here of the syntax. Every part matches without its end too, so that no text is read twice."""

_EMPTY_TERMINALS: Final = frozenset({'""', "[]", "[^]"})
"""llama.cpp makes nothing of these: what follows them begins the sequence."""


class _Item(NamedTuple):
    """A part of a sequence: what it refers to, empty for a terminal, and how often it is repeated."""

    rule: str
    times: int = 1


_Rules = dict[str, list[list[_Item]]]
"""Alternates, each a sequence, by the rule's name. Groups and what may be left out are rules of their own."""


def check_beginnings(text: str, field: str) -> None:
    """Refuse a grammar with a rule that can begin in too many ways.

    What is no grammar is let through: llama.cpp says what is wrong with it.

    Raises:
        WorkerError: INVALID_FIELD, naming the field; INVALID_GRAMMAR for a rule that begins with itself,
            which llama.cpp follows for ever where it does not see it.
    """
    rules = _read_rules(text)
    counter = _Counter(rules, field)
    for rule in rules:
        counter.count(rule)


def _read_rules(text: str) -> _Rules:
    rules: _Rules = {}
    open_rules: list[list[list[_Item]]] = [[[]]]
    for match in _LEXEMES.finditer(text):
        sequence = open_rules[-1][-1]
        name, mark = match["name"], match["mark"]
        if match["defined"]:
            rules[name] = [[]]
            open_rules = [rules[name]]
        elif name or match["terminal"]:
            if match["terminal"] not in _EMPTY_TERMINALS:
                sequence.append(_Item(name or ""))
        elif mark == "(":
            group = f"({len(rules)}"
            rules[group] = [[]]
            sequence.append(_Item(group))
            open_rules.append(rules[group])
        elif mark == ")":
            if len(open_rules) > 1:
                open_rules.pop()
        elif mark == "|":
            open_rules[-1].append([])
        elif mark and sequence:
            _repeat(mark, sequence, rules)
    return rules


def _repeat(mark: str, sequence: list[_Item], rules: _Rules) -> None:
    """Apply `*`, `?` or a count in braces to the last item."""
    counts = [int(digits) for digits in re.findall(r"\d{1,6}", mark)]
    item = _Item(sequence.pop().rule, max([1, *counts]))
    if mark in "*?" or counts[:1] == [0]:
        optional = f"?{len(rules)}"
        rules[optional] = [[item], []]
        item = _Item(optional)
    sequence.append(item)


class _Beginnings(NamedTuple):
    """How a rule can begin."""

    ways: int = 1
    depth: int = 1
    """Longest chain of rules that begin with each other, from this one on."""
    may_be_empty: bool = False


class _Counter:
    """Counts the beginnings of each rule once."""

    def __init__(self, rules: _Rules, field: str) -> None:
        self._rules = rules
        self._field = field
        self._known: dict[str, _Beginnings] = {}
        self._open: set[str] = set()

    def count(self, rule: str, chain: int = 1) -> _Beginnings:
        """Return how a rule can begin. Raises `WorkerError` when that is too much."""
        if rule in self._known:
            return self._known[rule]
        self._check_depth(chain)
        if rule in self._open:
            raise WorkerError(
                Reason.INVALID_GRAMMAR,
                f"{self._field}: has a rule that begins with itself, or with what may be empty and then "
                "itself; have it begin with something else",
                field=self._field,
                metadata={"field": self._field},
            )
        self._open.add(rule)
        ways, depth, may_be_empty = 0, 0, False
        for sequence in self._rules[rule]:
            ways += 1
            for item in sequence:
                if item.rule not in self._rules:
                    break
                first = self.count(item.rule, chain + 1)
                ways += first.ways * (item.times if first.may_be_empty else 1)
                depth = max(depth, first.depth)
                if not first.may_be_empty:
                    break
            else:
                may_be_empty = True
        self._check_depth(depth + 1)
        if ways > MOST_BEGINNINGS:
            reject(
                self._field,
                f"has a rule that can begin in more than {MOST_BEGINNINGS} ways; "
                "alternates that begin alike should begin with one rule that they share",
            )
        self._open.remove(rule)
        self._known[rule] = _Beginnings(ways, depth + 1, may_be_empty)
        return self._known[rule]

    def _check_depth(self, depth: int) -> None:
        if depth > DEEPEST_BEGINNING:
            reject(
                self._field,
                f"has a chain of rules, each the start of the one before, of {depth} or more; "
                f"at most {DEEPEST_BEGINNING} are allowed",
            )
