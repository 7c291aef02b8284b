"""Which grammars are refused before llama.cpp reads them: those it would never be done with, no others."""

from __future__ import annotations

import json

import pytest

from paddock_server.worker.constrained import MOST_GRAMMAR_BYTES, schema_to_grammar
from paddock_server.worker.errors import Reason, WorkerError
from paddock_server.worker.grammars import DEEPEST_BEGINNING, MOST_BEGINNINGS, check_beginnings

LEVELS = range(40)


def levels(body: str) -> str:
    """Return rules that each begin with the next, `>`, as `body` says."""
    rules = [f"r{level} ::= {body.replace('>', f'r{level + 1}')}" for level in LEVELS]
    return "\n".join(["root ::= r0", *rules, f'r{len(rules)} ::= "a"'])


@pytest.mark.parametrize(
    "grammar",
    [
        levels("> | >"),
        levels('> "b" | > "c"'),
        levels('(> "b" | > "c")'),
        levels('(\n> "b"  # or\n| > "c" )'),
        levels("(>)? >"),
        levels('[x\\]"]? > | >'),
        levels('"\\""? > | >'),
        levels("> | >").replace("root ::= r0", 'root ::= "a" r0'),
        levels("(>?){2}").replace('"a"', '"a"?'),
        levels('"a"* > | ("b" | )>'),
        levels('"" > | "" >'),
        levels("[] > | [] >"),
        levels('("" | "b") > | "" >'),
    ],
)
def test_a_grammar_whose_rules_double_with_every_level_is_refused(grammar: str) -> None:
    with pytest.raises(WorkerError, match="more than 100000 ways") as caught:
        check_beginnings(grammar, "constraint.grammar")

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "constraint.grammar")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_chain_of_beginnings_that_is_too_deep_is_refused_in_any_order(*, reverse: bool) -> None:
    rules = [f"r{level} ::= r{level + 1}" for level in range(DEEPEST_BEGINNING)]
    rules.append(f'r{len(rules)} ::= "a"')
    if reverse:
        rules.reverse()

    with pytest.raises(WorkerError, match=f"at most {DEEPEST_BEGINNING}"):
        check_beginnings("\n".join(rules), "grammar")
    check_beginnings("\n".join(rules[1:] if not reverse else rules[:-1]), "grammar")


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no, " [0-9] [0-9] "!"',
        levels('> (("+" | "-") >)*'),
        levels('"a"? [b]* "c"{0,2000} ("d" | "e")? >'),
        levels('"(" > ")" | "[" > "]"'),
        "root ::= " + "|".join(['"a"'] * (MOST_BEGINNINGS // 2)),
        "root ::= [a-z]+ [ \\t\\n]* # a comment with ( and | and a 'quote\"\n| <think> !<[1]> .",
        "root ::= ((((",
        'root ::= )))) "',
        "| ? * {9",
        "",
        "\\" * 9 + '"' * 9,
    ],
)
def test_a_sensible_grammar_and_what_is_none_are_left_to_llama_cpp(grammar: str) -> None:
    check_beginnings(grammar, "grammar")


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= root",
        'root ::= root "a" | "b"',
        'root ::= e root "x" | "y"\ne ::= f\nf ::= | "c"',
        'root ::= "a"? root | "b"',
        'root ::= "" root | "b"',
        'root ::= a "x"\na ::= ("b" | )* c\nc ::= "d"* a | "e"',
    ],
)
def test_a_rule_that_begins_with_itself_is_refused_however_it_comes_back(grammar: str) -> None:
    with pytest.raises(WorkerError, match="begins with itself") as caught:
        check_beginnings(grammar, "constraint.grammar")

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_GRAMMAR, "constraint.grammar")


def test_schemas_of_a_few_hundred_optional_properties_and_of_many_values_are_taken() -> None:
    properties = {f"p{index}": {"type": ["string", "null"]} for index in range(200)}
    values = {"enum": [f"value {index}" for index in range(5000)]}
    nested = {"anyOf": [{"type": "object", "properties": properties}, {"type": "array", "items": values}]}

    check_beginnings(schema_to_grammar(json.dumps(nested), "schema"), "schema")


@pytest.mark.parametrize(
    "part", ['"', '"\\', "[", "[\\", "<", "{", ")(", "((a", "a ", "a|", "a?", "# ", "\\\\", "a::="]
)
def test_any_text_is_read_in_one_pass(part: str) -> None:
    text = part * (MOST_GRAMMAR_BYTES // len(part))

    check_beginnings(text, "grammar")  # a second pass for every part would last for minutes
