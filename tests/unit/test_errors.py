from __future__ import annotations

import pytest

from paddock import errors
from paddock.errors import DEFAULT_RETRY_SECONDS, TABLE, Code, PaddockError, Reason, error_class, make_error


def test_every_reason_has_exactly_one_row() -> None:
    assert set(TABLE) == set(Reason)


@pytest.mark.parametrize("reason", TABLE)
def test_rows_are_consistent(reason: str) -> None:
    row = TABLE[reason]

    assert 400 <= row.http_status <= 599
    # What a client may retry blindly must not look like the client's own fault, and the other way round.
    assert row.retryable == (row.http_status in {429, 503} and row.code is not Code.RESOURCE_EXHAUSTED) or (
        reason == Reason.RATE_LIMITED
    )


@pytest.mark.parametrize("reason", TABLE)
def test_only_retryable_errors_suggest_a_wait(reason: str) -> None:
    error = make_error(reason, "Sentence.")

    assert error.retry_after_seconds == (DEFAULT_RETRY_SECONDS if TABLE[reason].retryable else None)


@pytest.mark.parametrize("reason", TABLE)
def test_errors_are_made_in_the_class_of_their_reason(reason: str) -> None:
    error = make_error(reason, "Sentence.")

    assert type(error) is error_class(reason)
    assert isinstance(error, PaddockError)
    assert str(error) == "Sentence."


def test_every_class_is_in_the_tree_of_the_docstring() -> None:
    classes = {
        c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PaddockError)
    }

    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    assert classes == drawn


def test_an_unknown_reason_has_the_row_of_a_bug_and_keeps_its_name() -> None:
    error = make_error("FROM_THE_FUTURE", "New.")

    assert (error.reason, error.row, type(error)) == (
        "FROM_THE_FUTURE",
        TABLE[Reason.INTERNAL],
        PaddockError,
    )
