"""The error table, walked through HTTP."""

from __future__ import annotations

import pytest

from paddock.errors import TABLE, InvalidFieldError, Reason, make_error
from tests.gateway.clients import CHAT, CHAT_PATH, COMPLETION, COMPLETION_PATH, events, in_process, post
from tests.gateway.fake_api import FakeApi, failing, started


@pytest.mark.parametrize("reason", list(TABLE))
async def test_every_reason_has_its_status_type_and_code(reason: str) -> None:
    row = TABLE[reason]

    async with in_process(FakeApi(failing(make_error(reason, "it went wrong")))) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert response.status_code == row.http_status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == "it went wrong"
    assert error["type"] == row.openai_type
    assert error["code"] == (row.openai_code or reason.lower())
    assert ("retry-after" in response.headers) == row.retryable
    assert response.headers["x-should-retry"] == ("true" if row.retryable else "false")


@pytest.mark.parametrize("reason", list(TABLE))
async def test_every_reason_can_end_a_stream(reason: str) -> None:
    async with in_process(FakeApi(failing(make_error(reason, "it went wrong"), started()))) as client:
        response = await post(client, CHAT_PATH, CHAT, stream=True)

    assert response.status_code == 200
    assert events(response)[-1]["error"]["code"] == (TABLE[reason].openai_code or reason.lower())


async def test_a_reason_newer_than_the_gateway_is_a_server_error_that_keeps_its_name() -> None:
    async with in_process(FakeApi(failing(make_error("NEW_REASON", "new")))) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "new_reason"


@pytest.mark.parametrize(
    ("field", "param", "message"),
    [
        ("sampling.top_p", "top_p", "top_p: must be above 0 and at most 1"),
        ("stop.max_tokens", "max_tokens", "max_tokens: must be above 0 and at most 1"),
        ("chat.messages[0].role", "messages[0].role", "messages[0].role: must be above 0 and at most 1"),
        ("model", "model", "model: must be above 0 and at most 1"),
    ],
)
async def test_a_field_of_the_service_is_named_as_the_caller_knows_it(
    field: str, param: str, message: str
) -> None:
    error = InvalidFieldError.of(field, "must be above 0 and at most 1")

    async with in_process(FakeApi(failing(error))) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("field", "message", "told"),
    [
        ("chat", "chat: this model has no chat template", "messages: this model has no chat template"),
        ("chat", "The chat template is wrong", "The chat template is wrong"),
        ("sampling.top_p", "Lower sampling.top_p.", "Lower top_p."),
        ("sampling.top_p", "sampling.top_p_x is something else", "sampling.top_p_x is something else"),
    ],
)
async def test_only_what_is_certain_to_be_a_field_is_renamed_in_a_message(
    field: str, message: str, told: str
) -> None:
    error = make_error(Reason.INVALID_FIELD, message, metadata={"field": field})

    async with in_process(FakeApi(failing(error))) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert response.json()["error"]["message"] == told


async def test_a_prompt_that_is_too_long_is_blamed_on_the_prompt() -> None:
    error = make_error(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        "The prompt has 300 tokens, the context 256.",
        metadata={"prompt_tokens": "300", "context_tokens": "256"},
    )

    async with in_process(FakeApi(failing(error))) as client:
        chat = await post(client, CHAT_PATH, CHAT)
        completion = await post(client, COMPLETION_PATH, COMPLETION)

    assert chat.json()["error"]["param"] == "messages"
    assert completion.json()["error"]["param"] == "prompt"


async def test_an_unknown_model_is_404_with_openais_code() -> None:
    async with in_process(FakeApi()) as client:
        response = await client.get("/v1/models/nobody/knows:it")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"
    assert "nobody/knows:it" in response.json()["error"]["message"]


async def test_retry_after_is_whole_seconds_and_never_zero() -> None:
    for seconds, header in ((0.0, "1"), (0.2, "1"), (2.0, "2"), (2.1, "3")):
        error = make_error(Reason.QUEUE_FULL, "full", retry_after_seconds=seconds)
        async with in_process(FakeApi(failing(error))) as client:
            response = await post(client, CHAT_PATH, CHAT)

        assert response.headers["retry-after"] == header


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_bug_says_nothing_of_itself_but_the_request_id(*, streaming: bool) -> None:
    error = RuntimeError("secret")

    async with in_process(FakeApi(failing(error, *([started()] if streaming else [])))) as client:
        response = await client.post(
            CHAT_PATH, json={**CHAT, "stream": streaming}, headers={"x-request-id": "find-me"}
        )

    body = events(response)[-1] if streaming else response.json()
    assert "secret" not in response.text
    assert "find-me" in body["error"]["message"]
    assert body["error"]["type"] == "server_error"
