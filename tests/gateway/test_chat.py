"""`/v1/chat/completions` as the OpenAI SDK uses it, over a real socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import openai
import pytest

from paddock.errors import Reason, make_error
from paddock.v1 import generation_pb2 as gen
from tests.gateway.clients import CHAT, CHAT_PATH, events, in_process, post, sdk
from tests.gateway.fake_api import FakeApi, deltas, end, failing, generated, playing, saying, started, text

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk


async def complete(client: openai.AsyncOpenAI, **more: Any) -> ChatCompletion:
    return cast("ChatCompletion", await client.chat.completions.create(**CHAT, **more))


async def stream(client: openai.AsyncOpenAI, **more: Any) -> list[ChatCompletionChunk]:
    chunks = await client.chat.completions.create(**CHAT, stream=True, **more)
    return [chunk async for chunk in chunks]


async def test_the_sdk_gets_an_answer_with_the_canonical_model_and_usage() -> None:
    api = FakeApi(playing(started(model="canonical"), deltas(text("Hi")), deltas(end()), generated()))

    async with sdk(api) as client:
        completion = await complete(client)

    assert completion.id == "chatcmpl-g1"
    assert completion.model == "canonical"
    assert completion.object == "chat.completion"
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hi"
    assert choice.finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 9
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 3


async def test_the_sdk_streams_the_same_answer() -> None:
    async with sdk(FakeApi(saying("He", "llo", " €"))) as client:
        chunks = await stream(client)

    assert [chunk.choices[0].delta.content for chunk in chunks] == [None, "He", "llo", " €", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"


async def test_the_sdks_own_accumulator_takes_the_stream() -> None:
    async with (
        sdk(FakeApi(saying("a", "b"))) as client,
        client.chat.completions.stream(model="tiny", messages=CHAT["messages"]) as events,
    ):
        async for _ in events:
            pass
        completion = await events.get_final_completion()

    assert completion.choices[0].message.content == "ab"
    assert completion.choices[0].finish_reason == "stop"


async def test_the_sdk_gets_usage_when_it_asks() -> None:
    async with sdk(FakeApi()) as client:
        *chunks, last = await stream(client, stream_options={"include_usage": True})

    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks)


async def test_n_choices_each_have_their_text() -> None:
    behaviour = playing(
        started(),
        deltas(text("a", 0), text("x", 1)),
        deltas(text("b", 0)),
        deltas(end(choice=0), end(gen.FINISH_REASON_LENGTH, choice=1, text="y")),
        generated(),
    )

    async with sdk(FakeApi(behaviour)) as client:
        completion = await complete(client, n=2)

    assert [
        (choice.index, choice.message.content, choice.finish_reason) for choice in completion.choices
    ] == [
        (0, "ab", "stop"),
        (1, "xy", "length"),
    ]


async def test_tool_calls_come_whole() -> None:
    calls = [
        gen.ToolCallDelta(call_index=0, id="c1", name="f", arguments_json='{"x":'),
        gen.ToolCallDelta(call_index=1, id="c2", name="g", arguments_json="{}"),
    ]
    behaviour = playing(
        started(),
        deltas(gen.Delta(tool_calls=calls, reasoning_text="hm")),
        deltas(gen.Delta(tool_calls=[gen.ToolCallDelta(call_index=0, arguments_json=" 1}")])),
        deltas(end(gen.FINISH_REASON_TOOL_CALLS)),
        generated(),
    )
    tool = {"type": "function", "function": {"name": "f"}}

    async with sdk(FakeApi(behaviour)) as client:
        completion = await complete(client, tools=[tool], tool_choice="none")

    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.model_dump()["reasoning_content"] == "hm"
    assert choice.message.tool_calls is not None
    assert [call.model_dump() for call in choice.message.tool_calls] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


async def test_logprobs_parse_in_the_sdk() -> None:
    entry = gen.TokenLogprob(token=b"Hi", logprob=-1, top=[gen.TokenLogprob(token=b"Ho", logprob=-2)])
    delta = gen.Delta(text="Hi", token_count=1, logprobs=[entry])
    api = FakeApi(playing(started(), deltas(delta), deltas(end()), generated()))

    async with sdk(api) as client:
        completion = await complete(client, logprobs=True, top_logprobs=1)

    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].token == "Hi"
    assert logprobs.content[0].top_logprobs[0].bytes == list(b"Ho")
    assert api.requests[0].logprobs.top_count == 1


async def test_an_error_before_the_first_event_is_an_http_error_for_a_stream_too() -> None:
    api = FakeApi(failing(make_error(Reason.QUEUE_FULL, "no room", retry_after_seconds=2.5)))

    async with sdk(api) as client:
        for kwargs in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError) as caught:
                await complete(client, **kwargs)

            assert caught.value.status_code == 429
            assert caught.value.response.headers["retry-after"] == "3"
            assert caught.value.type == "rate_limit_error"


async def test_an_error_after_the_first_event_makes_the_sdk_raise() -> None:
    error = make_error(Reason.WORKER_CRASHED, "the worker died")
    api = FakeApi(failing(error, started(), deltas(text("a"))))

    async with sdk(api) as client:
        chunks = aiter(await client.chat.completions.create(**CHAT, stream=True))
        received = [(await anext(chunks)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="the worker died") as caught:
            await anext(chunks)

    assert received == [None, "a"]
    assert caught.value.code == "worker_crashed"


async def test_a_broken_stream_ends_with_an_error_event_and_without_done() -> None:
    error = make_error(Reason.MODEL_UNLOADED, "unloaded by force")

    async with in_process(FakeApi(failing(error, started(), deltas(text("a"))))) as client:
        response = await post(client, CHAT_PATH, CHAT, stream=True)

    assert response.status_code == 200
    *_, last = events(response)
    assert last == {
        "error": {
            "message": "unloaded by force",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_unloaded",
        }
    }


async def test_an_error_after_the_first_event_of_a_document_is_an_http_error() -> None:
    api = FakeApi(failing(make_error(Reason.WORKER_CRASHED, "the worker died"), started(), deltas(text("a"))))

    async with in_process(api) as client:
        response = await post(client, CHAT_PATH, CHAT)

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "worker_crashed"


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_stream_that_ends_without_a_result_is_a_bug_that_shows(*, streaming: bool) -> None:
    api = FakeApi(playing(started(), deltas(text("a"))))

    async with in_process(api) as client:
        response = await post(client, CHAT_PATH, CHAT, stream=streaming)

    last = events(response)[-1] if streaming else response.json()
    assert last["error"]["code"] == "internal"


async def test_the_headers_of_a_stream_keep_proxies_from_holding_it_back() -> None:
    async with in_process(FakeApi()) as client:
        response = await post(client, CHAT_PATH, CHAT, stream=True)

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


async def test_a_refused_field_is_named_as_the_caller_named_it() -> None:
    error = make_error(
        Reason.NOT_IMPLEMENTED,
        "chat.tools: this engine calls no tools yet",
        metadata={"field": "chat.tools"},
    )
    tool = {"type": "function", "function": {"name": "f"}}

    async with in_process(FakeApi(failing(error))) as client:
        response = await post(client, CHAT_PATH, CHAT, tools=[tool], tool_choice="none")

    assert response.status_code == 501
    assert response.json()["error"]["param"] == "tools"
    assert response.json()["error"]["message"] == "tools: this engine calls no tools yet"
    assert response.headers["x-should-retry"] == "false"
