from __future__ import annotations

import pytest

from paddock.errors import TABLE
from paddock_server.worker.errors import Reason, WorkerError, context_length_exceeded, reject


def test_every_reason_of_a_worker_is_in_the_table() -> None:
    assert set(Reason) <= set(TABLE)


def test_a_rejected_field_is_named_in_field_message_and_metadata() -> None:
    with pytest.raises(WorkerError) as caught:
        reject("stop.max_tokens", "is 0; must be 1 or more")
    failure = caught.value.to_failure()
    assert failure.reason == "INVALID_FIELD"
    assert failure.field == failure.metadata["field"] == "stop.max_tokens"
    assert failure.message == "stop.max_tokens: is 0; must be 1 or more"


def test_a_prompt_too_long_carries_both_lengths() -> None:
    failure = context_length_exceeded("chat", 5000, 4096).to_failure()
    assert dict(failure.metadata) == {"prompt_tokens": "5000", "context_tokens": "4096"}
    assert "5000" in failure.message
    assert "4096" in failure.message
