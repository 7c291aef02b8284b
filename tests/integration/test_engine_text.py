"""Where a generation ends, and what text leaves until then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from paddock.v1 import generation_pb2
from tests.integration.engines import Lab, lab, refusal, request
from tests.models import make_scripted

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH

SCRIPT = "One, two, three, and then the light goes out."


@pytest.fixture
def scripted(tmp_path: Path) -> Generator[Lab]:
    """An engine whose model answers everything with SCRIPT, in pieces of two characters or a few more."""
    (path,) = make_scripted(tmp_path / "scripted.gguf", SCRIPT)
    with lab(path, slot_count=4) as bench:
        yield bench


def test_an_end_token_ends_the_text_and_is_counted_but_not_shown(scripted: Lab) -> None:
    (output,) = scripted.generate(request())
    assert output.text() == SCRIPT
    assert output.end() == (STOP, "")
    assert output.deltas[-1].text == ""
    assert sum(delta.token_count for delta in output.deltas) == output.finished.usage.completion_tokens
    assert output.finished.usage.completion_tokens == len(output.deltas)


@pytest.mark.parametrize("stop", ["three", "e, t", "One", ".", "O", "and then the light"])
def test_a_stop_sequence_over_any_token_borders_ends_the_text_before_it(scripted: Lab, stop: str) -> None:
    (output,) = scripted.generate(request(stop={"stopSequences": ["never", stop]}))
    assert output.text() == SCRIPT[: SCRIPT.index(stop)]
    assert output.end() == (STOP, stop)


def test_what_only_looked_like_a_stop_sequence_is_shown_in_the_end(scripted: Lab) -> None:
    (output,) = scripted.generate(request(stop={"stopSequences": ["goes out!", "out. ", "lighthouse"]}))
    assert output.text() == SCRIPT
    assert output.end() == (STOP, "")


def test_no_token_of_a_stop_sequence_was_ever_sent(scripted: Lab) -> None:
    number = scripted.submit(request(stop={"stopSequences": ["three, and then"]}))
    shown = ""
    while not scripted.engine.idle:
        scripted.engine.step()
        shown = scripted.outputs[number].text()
        assert "One, two, ".startswith(shown)
    assert shown == "One, two, "


def test_max_tokens_ends_the_text_there(scripted: Lab) -> None:
    (output,) = scripted.generate(request(stop={"maxTokens": 3}))
    assert output.end() == (LENGTH, "")
    assert output.finished.usage.completion_tokens == 3
    assert SCRIPT.startswith(output.text())


def test_an_end_token_that_is_also_the_last_allowed_one_is_a_stop(scripted: Lab) -> None:
    (whole,) = scripted.generate(request())
    (output,) = scripted.generate(request(stop={"maxTokens": whole.finished.usage.completion_tokens}))
    assert output.end() == (STOP, "")


def test_text_held_back_leaves_at_the_length_limit(scripted: Lab) -> None:
    (output,) = scripted.generate(request(stop={"maxTokens": 1, "stopSequences": ["One of these"]}))
    (free,) = scripted.generate(request(stop={"maxTokens": 1}))
    assert output.text() == free.text() != ""


def test_ignore_eos_goes_on_past_the_end(scripted: Lab) -> None:
    (whole,) = scripted.generate(request())
    length = whole.finished.usage.completion_tokens
    (output,) = scripted.generate(request(stop={"maxTokens": length + 5, "ignoreEos": True}))
    assert output.finished.usage.completion_tokens == length + 5
    assert output.text().startswith(SCRIPT)


def test_characters_of_several_tokens_leave_whole(models_dir: Path) -> None:
    with lab(models_dir / "multibyte.gguf") as bench:
        outputs = bench.generate(
            *[request(f"Go {index}", stop={"maxTokens": 60, "ignoreEos": True}) for index in range(8)]
        )
    texts = [output.text() for output in outputs]
    assert sum(ord(character) > 0xFFFF for text in texts for character in text) > 0
    for output, text in zip(outputs, texts, strict=True):
        assert all("�" not in delta.text for delta in output.deltas[:-1])
        assert text.count("�") <= 1
        assert "�" not in text[:-1]
        assert any(delta.token_count == 1 and not delta.text for delta in output.deltas)


def test_half_a_character_at_the_end_becomes_a_replacement_character(tmp_path: Path) -> None:
    smile = "😀".encode()
    (path,) = make_scripted(tmp_path / "smile.gguf", [b"a", smile[:2], smile[2:], b"b"])
    with lab(path) as bench:
        whole, cut = bench.generate(request(), request(stop={"maxTokens": 2}))
    assert whole.text() == "a😀b"
    assert [delta.text for delta in whole.deltas] == ["a", "", "😀", "b", ""]
    assert cut.text() == "a�"
    assert cut.end() == (LENGTH, "")


def test_the_context_limit_ends_the_text_and_counts_prompt_and_output(tmp_path: Path) -> None:
    (path,) = make_scripted(tmp_path / "short.gguf", SCRIPT, context=64, repeat=True)
    with lab(path) as bench:
        assert bench.loaded.sequence_limit == 64
        (output,) = bench.generate(request([1] * 40))
        assert output.end() == (LENGTH, "")
        usage = output.finished.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (40, 24)
        (longest,) = bench.generate(request([1] * 63))
        assert longest.finished.usage.completion_tokens == 1


def test_a_prompt_that_leaves_no_room_is_refused_with_both_lengths(tmp_path: Path) -> None:
    (path,) = make_scripted(tmp_path / "short.gguf", SCRIPT, context=64)
    with lab(path) as bench:
        error = refusal(bench.preparer, request([1] * 64))
        assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert error.metadata == {"prompt_tokens": "64", "context_tokens": "64"}
        assert error.field == "tokens"


def test_a_prompt_far_too_long_is_refused_without_tokenizing_it(scripted: Lab) -> None:
    limit = scripted.loaded.sequence_limit
    length = 256 * limit + 256
    error = refusal(scripted.preparer, request("a" * length))
    assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert error.field == "prompt"
    assert error.metadata == {"prompt_characters": str(length), "context_tokens": str(limit)}
    assert f"{length} characters" in str(error), "nobody has counted tokens"


def test_log_probabilities_come_one_per_token_and_are_probabilities(models_dir: Path) -> None:
    with lab(models_dir / "noise.gguf") as bench:
        (output,) = bench.generate(request("Boats", logprobs={"topCount": 5}, stop={"maxTokens": 10}))
        size = bench.loaded.model.vocab.size
        (everything,) = bench.generate(request("Boats", logprobs={"topCount": 20}, stop={"maxTokens": 1}))
        for delta in output.deltas:
            assert len(delta.logprobs) == delta.token_count == 1
            (entry,) = delta.logprobs
            best = [other.logprob for other in entry.top]
            assert len(best) == 5
            assert best == sorted(best, reverse=True)
            assert entry.token_id == entry.top[0].token_id  # greedy
            assert entry.logprob == entry.top[0].logprob <= 0
            assert math.fsum(math.exp(value) for value in best) <= 1.0001
        assert size > 20
        assert (
            0.5
            < math.fsum(math.exp(other.logprob) for other in everything.deltas[0].logprobs[0].top)
            <= 1.0001
        )
        assert b"".join(delta.logprobs[0].token for delta in output.deltas).decode() == output.text()


def test_the_end_token_has_its_log_probability_and_its_name(scripted: Lab) -> None:
    (output,) = scripted.generate(request(logprobs={"topCount": 0}))
    assert output.deltas[-1].logprobs[0].token == b"<|im_end|>"
    assert not output.deltas[-1].logprobs[0].top


def test_timings_cover_queue_prompt_and_generation(scripted: Lab) -> None:
    (output,) = scripted.generate(request())
    timings = output.finished.timings
    for duration in (timings.queue_duration, timings.prompt_duration, timings.generation_duration):
        assert 0 <= duration.seconds < 60
    assert timings.generation_duration.nanos > 0
    assert not timings.HasField("load_duration")


def test_an_unset_seed_is_drawn_and_repeats_the_output(models_dir: Path) -> None:
    sampling = {"temperature": 2, "topK": 0, "topP": 1, "minP": 0}
    with lab(models_dir / "noise.gguf") as bench:
        first, second = bench.generate(
            *[request("A", sampling=sampling, stop={"maxTokens": 30}) for _ in range(2)]
        )
        seed = first.finished.seed
        assert 0 <= seed < 2**32
        assert seed != second.finished.seed
        assert first.text() != second.text()
        (again,) = bench.generate(request("A", sampling={**sampling, "seed": seed}, stop={"maxTokens": 30}))
        assert again.text() == first.text()


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32 + 5, -1])
def test_every_seed_repeats_also_the_one_llama_cpp_takes_for_random(models_dir: Path, seed: int) -> None:
    sampling = {"temperature": 2, "topK": 0, "topP": 1, "minP": 0, "seed": seed}
    with lab(models_dir / "noise.gguf") as bench:
        first, second = bench.generate(
            *[request("A", sampling=sampling, stop={"maxTokens": 30}) for _ in range(2)]
        )
        assert first.text() == second.text()
        assert first.finished.seed == seed % 2**32
