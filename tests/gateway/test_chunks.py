"""Events of generations to server-sent events: pure. The order is that of llama-server's recordings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_gateway.chunks import MOST_CHUNKS, StreamEncoder
from paddock_gateway.parameters import Dialect
from paddock_gateway.translate import plan_of
from tests.gateway.clients import CHAT, COMPLETION
from tests.gateway.fake_api import LOAD_ID, deltas, end, generated, started, text


class Clock:
    """A clock a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def encoder(dialect: Dialect = Dialect.CHAT, clock: Clock | None = None, **more: Any) -> StreamEncoder:
    body = CHAT if dialect is Dialect.CHAT else COMPLETION
    plan = plan_of(dialect, json.dumps({**body, "stream": True, **more}).encode())
    return StreamEncoder(plan, created=5, clock=clock or Clock())


def decoded(events: bytes) -> list[Any]:
    blocks = events.decode().split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def played(stream: StreamEncoder, *responses: pb.GenerateResponse, prompt: int = 0) -> list[Any]:
    return [chunk for response in responses for chunk in decoded(stream.encode(prompt, response))]


def choices(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]


def test_a_chat_streams_role_text_finish_and_done_in_that_order() -> None:
    chunks = played(encoder(), started(), deltas(text("Hé")), deltas(text('"\n')), deltas(end()), generated())

    assert chunks.pop() == "[DONE]"
    assert choices(chunks) == [
        {"finish_reason": None, "index": 0, "delta": {"role": "assistant", "content": None}},
        {"finish_reason": None, "index": 0, "delta": {"content": "Hé"}},
        {"finish_reason": None, "index": 0, "delta": {"content": '"\n'}},
        {"finish_reason": "stop", "index": 0, "delta": {}},
    ]
    for chunk in chunks:
        assert chunk["id"] == "chatcmpl-g1"
        assert chunk["created"] == 5
        assert chunk["model"] == "tiny"
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["system_fingerprint"] == LOAD_ID
    assert [("timings" in chunk, "usage" in chunk) for chunk in chunks] == [(False, False)] * 3 + [
        (True, False)
    ]


def test_usage_comes_in_a_chunk_without_choices_and_only_when_asked_for() -> None:
    stream = encoder(stream_options={"include_usage": True})

    *chunks, last, done = played(stream, started(), deltas(text("a")), deltas(end()), generated())

    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert last["timings"]["predicted_n"] == 2
    assert not any("timings" in chunk or "usage" in chunk for chunk in chunks)


def test_timings_have_llama_servers_names_and_leave_the_first_token_out_of_the_rate() -> None:
    *_, finish, _ = played(encoder(), started(), deltas(end()), generated(prompt=7, completion=3, cached=3))

    assert finish["timings"] == {
        "cache_n": 3,
        "prompt_n": 4,
        "prompt_ms": 8.0,
        "prompt_per_token_ms": 2.0,
        "prompt_per_second": 500.0,
        "predicted_n": 3,
        "predicted_ms": 10.0,
        "predicted_per_token_ms": 5.0,
        "predicted_per_second": 200.0,
    }


@pytest.mark.parametrize("completion", [0, 1])
def test_timings_of_a_very_short_answer_are_finite(completion: int) -> None:
    last = pb.GenerateResponse(
        generated=pb.Generated(
            usage=gen.Usage(prompt_tokens=2, cached_prompt_tokens=2, completion_tokens=completion)
        )
    )

    *_, finish, _ = played(encoder(), started(), deltas(end()), last)

    assert finish["timings"]["predicted_per_second"] == 0
    assert finish["timings"]["prompt_per_second"] == 0


def test_a_completion_streams_text_and_closes_with_usage_and_timings() -> None:
    *chunks, done = played(
        encoder(Dialect.COMPLETION),
        started(),
        deltas(text("a")),
        deltas(end(gen.FINISH_REASON_LENGTH)),
        generated(),
    )

    assert done == "[DONE]"
    assert choices(chunks) == [
        {"text": "a", "index": 0, "logprobs": None, "finish_reason": None},
        {"text": "", "index": 0, "logprobs": None, "finish_reason": "length"},
    ]
    assert chunks[0]["id"] == "cmpl-g1"
    assert chunks[0]["object"] == "text_completion"
    assert chunks[1]["usage"]["total_tokens"] == 9
    assert chunks[1]["timings"]["predicted_n"] == 2


def contents(chunks: list[Any]) -> list[tuple[int, str]]:
    return [(choice["index"], choice["delta"]["content"]) for choice in choices(chunks)]


def test_deltas_that_came_together_are_a_chunk_each_as_clients_count_them() -> None:
    stream = encoder()
    played(stream, started())

    together = played(stream, deltas(text("a"), text("b"), text("c", tokens=2)))

    assert contents(together) == [(0, "a"), (0, "b"), (0, "c")]
    assert stream.generated_tokens == 4


@pytest.mark.parametrize("count", [2 * MOST_CHUNKS, 2 * MOST_CHUNKS + 1])
def test_more_deltas_than_that_have_piled_up_and_leave_as_one_chunk_a_choice(count: int) -> None:
    stream = encoder(n=2)
    played(stream, started())
    pile = [text(f"{number},", number % 2) for number in range(count)]

    together = contents(played(stream, deltas(*pile)))

    assert len(together) == (count if count == 2 * MOST_CHUNKS else 2)
    for choice in (0, 1):
        told = "".join(content for index, content in together if index == choice)
        assert told == "".join(f"{number}," for number in range(choice, count, 2))
    assert stream.generated_tokens == count


def test_choices_are_interleaved_one_per_chunk() -> None:
    stream = encoder(n=2)

    opening = played(stream, started())
    together = played(stream, deltas(text("a", 0), text("x", 1), text("b", 0)))

    assert [(choice["index"], choice["delta"]["role"]) for choice in choices(opening)] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert contents(together) == [(0, "a"), (1, "x"), (0, "b")]


def test_a_choice_that_ends_early_says_so_before_the_next_output_of_the_others() -> None:
    stream = encoder(n=2)
    played(stream, started())

    rest = played(
        stream,
        deltas(end(choice=1)),
        deltas(text("a", 0)),
        deltas(end(gen.FINISH_REASON_LENGTH, choice=0)),
        generated(),
    )

    assert [(choice["index"], choice["finish_reason"]) for choice in choices(rest)] == [
        (1, "stop"),
        (0, None),
        (0, "length"),
    ]


def test_choices_that_end_in_one_step_all_say_so() -> None:
    stream = encoder(n=2)
    played(stream, started())

    rest = played(stream, deltas(end(choice=0), end(choice=1)), generated())

    assert [(choice["index"], choice["finish_reason"]) for choice in choices(rest)] == [
        (0, "stop"),
        (1, "stop"),
    ]


def test_text_and_finish_in_one_delta_are_two_chunks_and_the_finish_has_no_content() -> None:
    stream = encoder()
    played(stream, started())

    rest = played(stream, deltas(end(text="z")), generated())

    assert [choice["delta"] for choice in choices(rest)] == [{"content": "z"}, {}]


def test_a_delta_that_only_counts_a_token_sends_nothing() -> None:
    stream = encoder()
    played(stream, started())

    assert stream.encode(0, deltas(text("", tokens=1))) == b""
    assert stream.generated_tokens == 1


def test_an_event_newer_than_the_gateway_is_skipped() -> None:
    assert encoder().encode(0, pb.GenerateResponse()) == b""


def test_reasoning_and_tool_calls_have_the_shape_of_llama_server() -> None:
    stream = encoder()
    played(stream, started())
    first = gen.ToolCallDelta(call_index=0, id="c1", name="f", arguments_json="{")
    more = gen.ToolCallDelta(call_index=0, arguments_json="}")

    chunks = played(
        stream,
        deltas(gen.Delta(reasoning_text="hm ")),
        deltas(gen.Delta(tool_calls=[first])),
        deltas(gen.Delta(tool_calls=[more])),
        deltas(end(gen.FINISH_REASON_TOOL_CALLS)),
        generated(),
    )

    assert [choice["delta"] for choice in choices(chunks)] == [
        {"reasoning_content": "hm "},
        {
            "tool_calls": [
                {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {},
    ]
    assert choices(chunks)[-1]["finish_reason"] == "tool_calls"


def test_prompt_progress_repeats_the_role_and_counts_cached_tokens_as_processed() -> None:
    clock = Clock()
    stream = encoder(clock=clock, return_progress=True)
    played(stream, started(prompt_tokens=21))
    clock.now += 0.25

    (chunk,) = played(
        stream,
        pb.GenerateResponse(prompt_progress=pb.PromptProgress(evaluated_tokens=4, total_tokens=14)),
    )

    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert chunk["prompt_progress"] == {"total": 21, "cache": 7, "processed": 11, "time_ms": 250}


def token(piece: bytes, logprob: float, *top: tuple[bytes, float]) -> gen.TokenLogprob:
    return gen.TokenLogprob(
        token_id=1,
        token=piece,
        logprob=logprob,
        top=[gen.TokenLogprob(token=other, logprob=other_logprob) for other, other_logprob in top],
    )


def test_chat_logprobs_carry_text_and_bytes_even_of_half_a_character() -> None:
    stream = encoder(logprobs=True, top_logprobs=1)
    played(stream, started())

    (chunk,) = played(
        stream, deltas(gen.Delta(text="", token_count=1, logprobs=[token(b"\xe2\x82", -1, (b"a", -0.5))]))
    )

    assert chunk["choices"][0] == {
        "index": 0,
        "delta": {},
        "finish_reason": None,
        "logprobs": {
            "content": [
                {
                    "token": "\ufffd",
                    "bytes": [0xE2, 0x82],
                    "logprob": -1,
                    "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}],
                }
            ]
        },
    }


def test_completion_logprobs_are_lists_whose_offsets_count_characters() -> None:
    stream = encoder(Dialect.COMPLETION, logprobs=1)
    played(stream, started())

    chunks = played(
        stream,
        deltas(gen.Delta(text="é", token_count=1, logprobs=[token("é".encode(), -1, (b"e", -2))])),
        deltas(
            gen.Delta(
                text="€b",
                token_count=3,
                logprobs=[token(b"\xe2\x82", -3), token(b"\xac", -4), token(b"b", -5)],
            )
        ),
    )

    assert [choice["logprobs"] for choice in choices(chunks)] == [
        {"tokens": ["é"], "token_logprobs": [-1], "top_logprobs": [{"e": -2}], "text_offset": [0]},
        {
            "tokens": ["bytes:\\xe2\\x82", "bytes:\\xac", "b"],
            "token_logprobs": [-3, -4, -5],
            "top_logprobs": None,
            "text_offset": [1, 1, 2],
        },
    ]


def test_several_prompts_make_consecutive_choices_and_one_usage() -> None:
    stream = encoder(Dialect.COMPLETION, prompt=["a", "b"], n=2)

    played(stream, started("g1"), prompt=0)
    played(stream, started("g2"), prompt=1)
    second = played(stream, deltas(text("x", 1)), deltas(end(choice=0), end(choice=1)), generated(), prompt=1)
    first = played(stream, deltas(text("y", 0)), deltas(end(choice=0), end(choice=1)), generated(), prompt=0)

    assert [choice["index"] for choice in choices(second)] == [3, 2, 3]
    assert [choice["index"] for choice in choices(first)] == [0, 0, 1]
    assert first[-1] == "[DONE]"
    assert first[-2]["usage"]["total_tokens"] == 18
    assert "timings" not in first[-2]
    assert {chunk["id"] for chunk in [*second, *first[:-1]]} == {"cmpl-g1"}


def test_a_choice_without_a_finish_reason_is_an_error_and_never_done() -> None:
    stream = encoder(n=2)
    played(stream, started(), deltas(text("a")), deltas(end(choice=0)))

    with pytest.raises(PaddockError) as caught:
        stream.encode(0, generated())

    assert caught.value.reason == Reason.INTERNAL
