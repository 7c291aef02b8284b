"""What a hostile request or template may not do to a worker."""

from __future__ import annotations

import pytest

from paddock_server.worker.constrained import check_text, schema_to_grammar
from paddock_server.worker.errors import Reason, WorkerError
from paddock_server.worker.growth import MOST_CHARACTERS
from paddock_server.worker.requests import LONGEST_RUN, check_runs
from paddock_server.worker.sandbox import compile_template

HUGE = MOST_CHARACTERS + 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x'.ljust(" + str(HUGE) + ") }}",
        "{{ 'x'.center(" + str(HUGE) + ") }}",
        "{{ text.replace('x', text) }}",
        (
            "{% set ns = namespace(s='x' * 1000000) %}"
            "{% for i in range(9) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
        ),
    ],
)
def test_a_template_cannot_make_a_huge_text_at_a_stroke(source: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        compile_template(source).render(text="x" * 10_000)


def test_ordinary_texts_are_joined_and_replaced() -> None:
    source = "{{ (a + b).replace('x', 'yy').ljust(5) }}"

    assert compile_template(source).render(a="x" * 5000, b="z" * 5000) == "yy" * 5000 + "z" * 5000


@pytest.mark.parametrize("text", ["a" * (LONGEST_RUN + 1), "a b " + "\n" * (LONGEST_RUN + 1)])
def test_a_run_that_pre_tokenizers_would_recurse_along_is_refused(text: str) -> None:
    with pytest.raises(WorkerError, match="without a break") as caught:
        check_runs(text, "prompt")

    assert caught.value.field == "prompt"


def test_a_long_text_with_breaks_is_taken() -> None:
    check_runs("word " * LONGEST_RUN, "prompt")


@pytest.mark.parametrize(
    "schema",
    ['{"type": "string", "pattern": "^\\ud800$"}', '{"$ref": "\\ud800"}'],
    ids=["pattern", "reference"],
)
def test_half_a_surrogate_pair_in_a_schema_is_the_callers_error(schema: str) -> None:
    with pytest.raises(WorkerError) as caught:
        check_text(schema_to_grammar(schema, "schema"), "schema")

    assert caught.value.reason in (Reason.INVALID_FIELD, Reason.INVALID_GRAMMAR)
    assert caught.value.to_failure().message
