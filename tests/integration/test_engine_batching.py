"""Many generations at once give what each gives alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format

from paddock.v1 import model_manager_pb2
from paddock_server.worker import llama
from paddock_server.worker.engine import SEQUENCES_PER_FRAME
from tests.integration.engines import Lab, Output, lab, request

if TYPE_CHECKING:
    from pathlib import Path

    from paddock_server.worker.v1 import worker_pb2

WORDS = ("The lamp", "A small boat", "Nobody", "In the morning", "They drink", "Ropes", "It is", "Fish")
LOGPROBS = {"topCount": 0}  # brings the token ids along

SAMPLERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.2, "topK": 0, "topP": 1, "minP": 0},
    {"temperature": 0.7, "topP": 0.8},
    {"temperature": 1, "topK": 5, "presencePenalty": 0.5, "frequencyPenalty": 0.5},
    {"temperature": 0, "repetitionPenalty": 1.3, "penaltyLastTokens": -1},
    {},
)


def greedy_requests() -> list[model_manager_pb2.GenerateRequest]:
    return [
        request(f"{WORDS[index % len(WORDS)]} {index}", stop={"maxTokens": 48}, logprobs=LOGPROBS)
        for index in range(32)
    ]


def mixed_requests() -> list[model_manager_pb2.GenerateRequest]:
    """32 requests with prompts of 1 to 300 tokens, all kinds of samplers, lengths and seeds."""
    rng = random.Random(7)
    requests: list[model_manager_pb2.GenerateRequest] = []
    for index in range(32):
        message = request(
            " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 3, 20, 100]))),
            stop={"maxTokens": rng.randint(1, 60), "ignoreEos": index % 5 == 0},
            logprobs=LOGPROBS,
        )
        message.ClearField("sampling")
        json_format.ParseDict({**SAMPLERS[index % len(SAMPLERS)], "seed": index * 11}, message.sampling)
        requests.append(message)
    return requests


def same(together: list[Output], alone: list[Output]) -> None:
    for one, other in zip(together, alone, strict=True):
        assert one.tokens() == other.tokens()
        assert [delta.text for delta in one.deltas] == [delta.text for delta in other.deltas]
        assert one.end() == other.end()
        assert one.finished.usage == other.finished.usage


@pytest.mark.parametrize("threads", [1, 2])
def test_32_greedy_generations_at_once_give_token_for_token_what_each_gives_alone(
    models_dir: Path, threads: int
) -> None:
    with lab(models_dir / "noise.gguf", thread_count=threads) as bench:
        alone = bench.alone(greedy_requests())
        together = bench.generate(*greedy_requests())
        same(together, alone)
        assert all(len(output.tokens()) > 1 for output in together)
        assert len({tuple(output.tokens()) for output in together}) == 32


def test_mixed_prompts_lengths_samplers_and_seeds_give_what_each_gives_alone(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", context_size_tokens=16384) as bench:
        same(bench.generate(*mixed_requests()), bench.alone(mixed_requests()))


def test_what_others_cancel_midway_changes_nothing(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", context_size_tokens=16384) as bench:
        alone = bench.alone(mixed_requests())
        numbers = [bench.submit(message) for message in mixed_requests()]
        cancelled = set(numbers[::3])
        for step, number in enumerate(sorted(cancelled)):
            bench.run(until=lambda step=step: len(bench.frames) % 97 > 3 * step)
            bench.cancel(number)
            bench.engine.step()
        bench.run()
        kept = [number for number in numbers if number not in cancelled]
        same([bench.outputs[number] for number in kept], [alone[number - numbers[0]] for number in kept])


def test_a_cancelled_generation_says_nothing_more_and_frees_its_slot(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", slot_count=1) as bench:
        first = bench.submit(request("A", stop={"ignoreEos": True}))
        second = bench.submit(request("B", stop={"maxTokens": 3}))
        bench.run(until=lambda: first in bench.outputs and len(bench.outputs[first].deltas) == 5)
        bench.cancel(first)
        bench.run()
        assert len(bench.outputs[first].deltas) == 5
        assert not bench.outputs[first].updates[-1].HasField("finished")
        assert bench.outputs[second].finished.usage.completion_tokens == 3


def test_a_request_cancelled_in_the_queue_never_starts(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", slot_count=1) as bench:
        bench.submit(request("A", stop={"maxTokens": 5}))
        second = bench.submit(request("B"))
        bench.cancel(second)
        bench.cancel(999)
        bench.run()
        assert second not in bench.outputs


def test_a_full_queue_refuses_and_serves_the_others(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", slot_count=2, queue_limit=1) as bench:
        outputs = bench.generate(*[request("A", stop={"maxTokens": 4}) for _ in range(5)])
        failures = [output.failure.reason if output.failure else "" for output in outputs]
        assert failures == ["", "", "", "QUEUE_FULL", "QUEUE_FULL"]


def test_preemption_changes_no_output_and_no_count(models_dir: Path) -> None:
    requests = [
        request(f"{WORDS[index]} {index}", stop={"maxTokens": 120, "ignoreEos": True}, logprobs=LOGPROBS)
        for index in range(6)
    ]
    with lab(models_dir / "noise.gguf") as bench:
        alone = bench.alone(requests)
    with lab(models_dir / "noise.gguf", context_size_tokens=256) as tight:
        assert tight.loaded.context_size == 256
        together = tight.generate(*requests)
        tight.engine.step()
        assert tight.engine._scheduler.preemption_count > 2
        same(together, alone)
        starts = [sum(update.HasField("started") for update in output.updates) for output in together]
        assert starts == [1] * 6


def test_preemption_keeps_the_state_of_samplers_and_text(models_dir: Path) -> None:
    requests = [
        request(
            WORDS[index],
            sampling={"seed": index, "frequencyPenalty": 0.8, "penaltyLastTokens": -1},
            stop={"maxTokens": 100, "ignoreEos": True, "stopSequences": ["never the lamp of"]},
            logprobs=LOGPROBS,
        )
        for index in range(5)
    ]
    with lab(models_dir / "multibyte.gguf") as bench:
        alone = bench.alone(requests)
    with lab(models_dir / "multibyte.gguf", context_size_tokens=256) as tight:
        same(tight.generate(*requests), alone)
        assert tight.engine._scheduler.preemption_count > 0


def test_a_cache_smaller_than_planned_with_is_made_do_with(models_dir: Path) -> None:
    requests = [
        request(word, stop={"maxTokens": 100, "ignoreEos": True}, logprobs=LOGPROBS) for word in WORDS
    ]
    with lab(models_dir / "noise.gguf") as bench:
        alone = bench.alone(requests)
    with lab(models_dir / "noise.gguf", context_size_tokens=256, cells=4096) as tight:
        numbers = [tight.submit(message) for message in requests]
        tight.run(until=lambda: tight.engine._scheduler.cells < 4096)
        assert tight.engine._scheduler.cells <= 256 + len(WORDS)
        tight.run()
        same([tight.outputs[number] for number in numbers], alone)
        assert tight.engine._scheduler.cells == 4096


def test_choices_share_the_prompt_and_differ_by_their_seed(models_dir: Path) -> None:
    def sampled(seed: int, choices: int) -> model_manager_pb2.GenerateRequest:
        return request(
            "The lamp at the end of the pier is lit. " * 8,
            sampling={"temperature": 1.5, "topK": 0, "topP": 1, "minP": 0, "seed": seed},
            choiceCount=choices,
            stop={"maxTokens": 20},
            logprobs=LOGPROBS,
        )

    with lab(models_dir / "noise.gguf", slot_count=3) as bench:
        (output,) = bench.generate(sampled(40, 5))
        alone = bench.alone(sampled(40 + choice, 1) for choice in range(5))
    together = [output.tokens(choice) for choice in range(5)]
    assert together == [other.tokens() for other in alone]
    assert len({tuple(tokens) for tokens in together}) == 5
    usage = output.finished.usage
    assert usage.prompt_tokens == alone[0].finished.usage.prompt_tokens
    assert usage.completion_tokens == sum(len(tokens) for tokens in together)
    assert output.finished.seed == 40


def sliding_requests() -> list[model_manager_pb2.GenerateRequest]:
    """Prompts and outputs several windows long."""
    return [
        request(
            f"{word}, at the end of the pier. " * 10,
            stop={"maxTokens": 100, "ignoreEos": True},
            logprobs=LOGPROBS,
        )
        for word in WORDS[:4]
    ]


def test_under_a_sliding_window_requests_at_once_give_what_each_gives_alone(models_dir: Path) -> None:
    requests = sliding_requests()
    with lab(models_dir / "noise.gguf") as bench:
        without_window = bench.alone(requests)
    with lab(models_dir / "sliding.gguf") as bench:
        assert bench.loaded.model.sliding_window_tokens == 32
        alone = bench.alone(requests)
        same(alone, without_window)
        same(bench.generate(*requests), alone)
        assert len({tuple(output.tokens()) for output in alone}) == 4


def test_under_a_sliding_window_choices_of_one_request_give_what_it_gives_alone(models_dir: Path) -> None:
    requests = sliding_requests()
    # Far fewer cells than all choices take: what falls out of a window is given to others.
    with lab(models_dir / "sliding.gguf", context_size_tokens=1024) as bench:
        alone = bench.alone(requests)
        for message in requests:
            message.choice_count = 3
        for output, other in zip(bench.generate(*requests), alone, strict=True):
            assert [output.tokens(choice) for choice in range(3)] == [other.tokens()] * 3


def test_while_a_long_prompt_is_taken_in_streams_go_on_between_its_chunks(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", context_size_tokens=8192, target_step_milliseconds=10) as bench:
        streams = [bench.submit(request(word, stop={"ignoreEos": True})) for word in WORDS[:4]]
        bench.run(until=lambda: len(bench.frames) == 3)
        long = bench.submit(request([5] * 2000, stop={"maxTokens": 1}, reportPromptProgress=True))
        progress: list[int] = []
        others: list[int] = []
        while long not in bench.outputs or not bench.outputs[long].deltas:
            bench.engine.step()
            updates = {update.generation: update for update in bench.frames[-1].step.updates}
            if long in updates:
                progress.append(updates[long].prompt_progress.evaluated_tokens)
            others.append(sum(len(updates[number].deltas.deltas) for number in streams))
        assert others == [4] * len(others)
        assert len(others) >= 2000 // 256
        assert progress == sorted(set(progress))
        assert progress[-1] == 2000


def bench_frames(bench: Lab) -> list[int]:
    return [len(frame.step.updates) for frame in bench.frames]


def test_a_step_is_one_frame_with_the_news_of_all(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf") as bench:
        bench.generate(*[request(word, stop={"maxTokens": 6, "ignoreEos": True}) for word in WORDS])
        assert bench_frames(bench) == [8] * 6


def test_a_step_of_many_sequences_is_a_frame_for_every_sixteen(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", slot_count=20, context_size_tokens=4096) as bench:
        words = [WORDS[index % len(WORDS)] for index in range(20)]
        bench.generate(*[request(word, stop={"maxTokens": 6, "ignoreEos": True}) for word in words])
        all_started = [20, 4]
        assert bench_frames(bench) == all_started + [SEQUENCES_PER_FRAME, 4] * 5


def tokens_of(frame: worker_pb2.WorkerFrame) -> list[int]:
    return [len(update.deltas.deltas) for update in frame.step.updates]


def test_tokens_of_short_steps_leave_together_but_the_first_and_the_last_at_once(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", longest_gap_seconds=3600) as bench:
        one, two = bench.generate(*[request(word, stop={"maxTokens": 6, "ignoreEos": True}) for word in "AB"])
        assert [tokens_of(frame) for frame in bench.frames] == [[1, 1], [5, 5]]
        for output in (one, two):
            assert [delta.token_count for delta in output.deltas] == [1] * 6
            assert output.finished.usage.completion_tokens == 6


def test_the_first_token_and_the_end_of_each_choice_are_told_at_once(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", longest_gap_seconds=3600) as bench:
        message = request("A", stop={"maxTokens": 6, "ignoreEos": True})
        message.choice_count = 3
        (output,) = bench.generate(message)
        # The first choice computes the prompt; the others begin in its cells, a step later.
        assert [tokens_of(frame) for frame in bench.frames] == [[1], [3], [12], [2]]
        assert len(output.deltas) == 18


def test_nothing_waits_beside_a_grammar_that_may_take_long(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", longest_gap_seconds=3600) as bench:
        grammar = request(
            "A", stop={"maxTokens": 6, "ignoreEos": True}, constraint={"grammar": 'root ::= "a"*'}
        )
        bench.generate(grammar, request("B", stop={"maxTokens": 9, "ignoreEos": True}))
        assert [tokens_of(frame) for frame in bench.frames] == [[1, 1]] * 6 + [[3]]


def test_tokens_that_wait_leave_before_a_prompt_or_a_text_to_embed_is_computed(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", longest_gap_seconds=3600) as bench:
        first = bench.submit(request("A", stop={"ignoreEos": True}))
        for _ in range(4):
            bench.engine.step()
        assert [tokens_of(frame) for frame in bench.frames] == [[1]]
        second = bench.submit(request("B", stop={"ignoreEos": True}))
        bench.engine.step()
        assert [tokens_of(frame) for frame in bench.frames] == [[1], [3], [1, 1]]
        for _ in range(2):
            bench.engine.step()
        embed = model_manager_pb2.EmbedRequest(texts=["C"])
        bench.engine.post(bench.preparer.embedding(7, embed))
        bench.engine.step()
        assert [tokens_of(frame) for frame in bench.frames[3:]] == [[2, 2], []]
        assert bench.replies[7].HasField("embed")
        bench.cancel(first)
        bench.cancel(second)
        bench.run()
        assert bench.engine.idle


def test_when_all_are_cancelled_nothing_waits_any_more(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf", longest_gap_seconds=3600) as bench:
        number = bench.submit(request("A", stop={"ignoreEos": True}))
        for _ in range(3):
            bench.engine.step()
        bench.cancel(number)
        bench.run()
        assert [tokens_of(frame) for frame in bench.frames] == [[1], [2]]


@pytest.mark.parametrize("others", [0, 1])
def test_a_step_is_aborted_when_everything_in_it_is_cancelled_and_only_then(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    with lab(models_dir / "noise.gguf") as bench:
        number = bench.submit(request("A " * 100, stop={"maxTokens": 4}))
        for _ in range(others):
            bench.submit(request("B", stop={"maxTokens": 4}))
        context = bench.loaded.generation_context
        decode, results = context.decode, list[int]()

        def cancelling(batch: llama.Batch) -> int:
            if not results:
                bench.engine.cancel(number)  # as another thread would, while the step runs
            results.append(decode(batch))
            return results[-1]

        monkeypatch.setattr(context, "decode", cancelling)
        bench.run()
        assert results[0] == (llama.DECODE_OK if others else llama.DECODE_ABORTED)
        assert not any(update.HasField("finished") for update in bench.outputs[number].updates)
        monkeypatch.undo()
        (after,) = bench.generate(request("C", stop={"maxTokens": 4, "ignoreEos": True}))
        assert after.finished.usage.completion_tokens == 4
