"""`/v1/completions` as the OpenAI SDK uses it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import Reason, make_error
from paddock.v1 import generation_pb2 as gen
from paddock_gateway.app import GatewayOptions
from tests.gateway.clients import COMPLETION, COMPLETION_PATH, events, in_process, post, sdk
from tests.gateway.fake_api import FakeApi, deltas, end, generated, playing, saying, started, text

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock.v1 import model_manager_pb2 as pb


async def echoing(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
    """Say the prompt back in every choice, letter by letter."""
    yield started(request.prompt)
    for letter in request.prompt:
        await asyncio.sleep(0)
        yield deltas(*(text(letter, choice) for choice in range(request.choice_count)))
    yield deltas(*(end(choice=choice) for choice in range(request.choice_count)))
    yield generated(
        prompt=len(request.prompt), completion=request.choice_count * len(request.prompt), cached=0
    )


async def test_the_sdk_gets_a_completion() -> None:
    async with sdk(FakeApi(saying("upon", " a", reason=gen.FINISH_REASON_LENGTH))) as client:
        completion = await client.completions.create(model="tiny", prompt="Once", max_tokens=2)

    assert completion.object == "text_completion"
    assert completion.id == "cmpl-g1"
    (choice,) = completion.choices
    assert choice.text == "upon a"
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 7


async def test_the_sdk_streams_a_completion() -> None:
    async with sdk(FakeApi(saying("upon", " a"))) as client:
        chunks = [
            chunk async for chunk in await client.completions.create(model="tiny", prompt="x", stream=True)
        ]

    assert "".join(chunk.choices[0].text for chunk in chunks) == "upon a"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_list_of_prompts_makes_consecutive_choices() -> None:
    api = FakeApi(echoing)

    async with sdk(api) as client:
        completion = await client.completions.create(model="tiny", prompt=["ab", "c"], n=2)

    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (0, "ab"),
        (1, "ab"),
        (2, "c"),
        (3, "c"),
    ]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3
    assert completion.usage.completion_tokens == 6


async def test_a_list_of_prompts_streams_each_choice_whole() -> None:
    async with in_process(FakeApi(echoing)) as client:
        response = await post(client, COMPLETION_PATH, COMPLETION, prompt=["abc", "de"], stream=True)

    *chunks, done = events(response)
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "abc", 1: "de"}
    assert done == "[DONE]"


async def test_a_long_list_of_prompts_leaves_room_for_others() -> None:
    api = FakeApi(echoing)

    async with in_process(api, GatewayOptions(prompts_at_once=3)) as client:
        response = await post(client, COMPLETION_PATH, COMPLETION, prompt=["abcdef"] * 20)

    assert len(response.json()["choices"]) == 20
    assert api.most_running == 3


async def test_one_prompt_that_fails_ends_the_others() -> None:
    async def behave(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        if request.prompt == "bad":
            raise make_error(Reason.CONTEXT_LENGTH_EXCEEDED, "too long")
        yield started()
        await asyncio.Event().wait()

    api = FakeApi(behave)

    async with in_process(api) as client:
        response = await post(client, COMPLETION_PATH, COMPLETION, prompt=["a", "bad", "b"])

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }
    assert api.running == 0
    assert api.cancelled == 2


async def test_tokens_are_a_prompt() -> None:
    api = FakeApi()

    async with sdk(api) as client:
        await client.completions.create(model="tiny", prompt=[1, 2, 3])

    assert list(api.requests[0].tokens.token_ids) == [1, 2, 3]


async def test_legacy_logprobs_parse_in_the_sdk() -> None:
    def entry(piece: bytes) -> gen.TokenLogprob:
        return gen.TokenLogprob(token=piece, logprob=-1, top=[gen.TokenLogprob(token=b"o", logprob=-2)])

    api = FakeApi(
        playing(
            started(),
            deltas(gen.Delta(text="a", token_count=1, logprobs=[entry(b"a")])),
            deltas(gen.Delta(text="b", token_count=1, logprobs=[entry(b"b")])),
            deltas(end()),
            generated(),
        )
    )

    async with sdk(api) as client:
        completion = await client.completions.create(model="tiny", prompt="x", logprobs=1)

    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs == [{"o": -2}, {"o": -2}]


@pytest.mark.parametrize(
    ("more", "param"), [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")]
)
async def test_what_cannot_be_done_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await post(client, COMPLETION_PATH, COMPLETION, **more)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
