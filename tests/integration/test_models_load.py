"""The test models in the real library: right ones do what they promise, wrong ones what is written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.models import MODELS, WRONG_MODELS, make_bench_model, make_scripted
from tests.models.noise import BIT_PRICE
from tests.models.probe import Probe
from tests.models.text import PASSAGE

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

GENERATORS = [name for name in MODELS if not name.startswith("embed")]
NOISE = ["noise", "noise-b", "sharded", "multibyte", "stops", "sliding"]
CHAT = "<|im_start|>user\nWhat did the user ask?<|im_end|>\n<|im_start|>assistant\n"
STAGES = ["load", "context", "decode"]


@contextmanager
def opened(models_dir: Path, name: str) -> Generator[Probe]:
    path = models_dir / f"{name}.gguf"
    probe = Probe(path if path.exists() else min((models_dir / name).iterdir()))
    try:
        yield probe
    finally:
        probe.close()


def prompts(probe: Probe, count: int) -> list[list[int]]:
    """Prompts of very different lengths."""
    chance = random.Random(1)
    words = PASSAGE.split()
    texts = [" ".join(chance.choices(words, k=chance.choice([1, 3, 10, 40, 150]))) for _ in range(count - 2)]
    return [probe.tokenize(text) for text in ["", CHAT, *texts]]


@pytest.mark.parametrize("name", GENERATORS)
def test_any_text_survives_the_tokenizer(models_dir: Path, name: str) -> None:
    text = "Hello, the old harbour! 😀 日本語 1234\n\n  x\t<|im_end|> ?"
    with opened(models_dir, name) as probe:
        assert probe.text(probe.tokenize(text, special=False)).decode() == text


@pytest.mark.parametrize("name", NOISE)
def test_thirty_two_generations_at_once_are_what_each_is_alone(models_dir: Path, name: str) -> None:
    with opened(models_dir, name) as probe:
        starts = prompts(probe, 32)
        alone = [probe.greedy([start], 24)[0] for start in starts]

        together = probe.greedy(starts, 24)
        in_chunks = probe.greedy(starts, 24, chunk=7)

    assert [generation.tokens for generation in together] == [generation.tokens for generation in alone]
    assert [generation.tokens for generation in in_chunks] == [generation.tokens for generation in alone]
    # Rounding moves logits by 1e-4; twice the lowest price of a bit is what the best is ahead by.
    leads = [lead for generation in [*alone, *together, *in_chunks] for lead in generation.leads]
    assert min(leads) > 2 * BIT_PRICE[0] - 1e-3


def test_noise_is_made_of_words_and_does_not_repeat_itself(models_dir: Path) -> None:
    words = set(PASSAGE.split()) | {"<|im_end|>"}
    with opened(models_dir, "noise") as probe:
        (generation,) = probe.greedy([probe.tokenize(CHAT)], 200)
        text = probe.text(generation.tokens).decode()

    said = text.replace(".", " ").replace(",", " ").replace("?", " ").replace(":", " ").split()
    assert set(said) <= {word.strip(".,?:") for word in words}
    assert len(set(said)) > 60
    assert max(len(list(run)) for _, run in groupby(generation.tokens)) < 6


def test_noise_stops_by_itself_most_times_but_not_at_once(models_dir: Path) -> None:
    with opened(models_dir, "noise") as probe:
        questions = [probe.tokenize(CHAT.replace("user ask", word)) for word in PASSAGE.split()[:16]]
        generations = probe.greedy(questions, 256)
        lengths = [
            next((index for index, token in enumerate(each.tokens) if probe.ends(token)), 256)
            for each in generations
        ]

    assert min(lengths) > 0
    assert 8 < sum(length < 256 for length in lengths) < 16
    assert sum(length > 16 for length in lengths) > 10


def test_every_token_of_a_long_prompt_matters(models_dir: Path) -> None:
    with opened(models_dir, "noise") as probe:
        prompt = probe.tokenize(PASSAGE * 4)[:1500]
        changed = [[*prompt[:at], prompt[at] ^ 1, *prompt[at + 1 :]] for at in (0, 1, 7, 400, 1100, 1499)]

        first = [probe.greedy([each], 4)[0].tokens for each in [prompt, *changed]]

    assert len(set(map(tuple, first))) == 1 + len(changed)


def test_multibyte_noise_is_valid_utf_8_whose_characters_take_several_tokens(models_dir: Path) -> None:
    with opened(models_dir, "multibyte") as probe:
        (generation,) = probe.greedy([probe.tokenize(CHAT)], 200)
        text = probe.text(generation.tokens).decode(errors="ignore")
        whole = probe.text(generation.tokens)
        broken = [token for token in generation.tokens if not _is_text(probe.text([token]))]

    assert len(whole) - len(text.encode()) < 4
    assert sum(len(character.encode()) == 4 for character in text) > 5
    assert sum(len(character.encode()) == 3 for character in text) > 10
    assert len(broken) > 60


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_model_that_stops_at_once_does_so(models_dir: Path) -> None:
    with opened(models_dir, "stops") as probe:
        generations = probe.greedy(prompts(probe, 32), 24)
        ended = [any(map(probe.ends, generation.tokens)) for generation in generations]
        at_once = [probe.ends(generation.tokens[0]) for generation in generations]

    assert all(ended)
    assert 0 < sum(at_once) < 32


@pytest.mark.parametrize("prompt", ["", "Hi there", CHAT + "<|go|>"])
def test_a_scripted_model_says_its_script_whatever_the_prompt(tmp_path: Path, prompt: str) -> None:
    script = "The same, the same, the same: 日本語 😀😀.\nEnd of the same."
    make_scripted(tmp_path / "script.gguf", script)
    with opened(tmp_path, "script") as probe:
        (generation,) = probe.greedy([probe.tokenize(prompt)], 60)
        end = next(index for index, token in enumerate(generation.tokens) if probe.ends(token))

        assert probe.text(generation.tokens[:end]).decode() == script
        assert min(generation.leads) > 30


def test_a_scripted_model_says_the_pieces_it_was_given_again_and_again(tmp_path: Path) -> None:
    pieces = [b"Hi ", b"\xf0\x9f", b"\x98", b"\x80", b"!"]
    make_scripted(tmp_path / "loop.gguf", pieces, repeat=True)
    with opened(tmp_path, "loop") as probe:
        (generation,) = probe.greedy([probe.tokenize("x")], 15)

        assert [probe.text([token]) for token in generation.tokens] == pieces * 3


@pytest.mark.parametrize("name", ["embed", "embed-cls"])
def test_an_embedding_model_tells_texts_apart(models_dir: Path, name: str) -> None:
    with opened(models_dir, name) as probe:
        sea, again, boat, road = map(
            probe.embed,
            ["the old sea is kind", "the old sea is kind", "the old boat is kind", "go to the city"],
        )

    assert np.isfinite(sea).all()
    assert np.array_equal(sea, again)
    assert not np.allclose(sea, boat, atol=1e-3)
    assert np.linalg.norm(sea - boat) < np.linalg.norm(sea - road)


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_model_does_to_the_library_what_is_written(tmp_path: Path, name: str) -> None:
    wrong = WRONG_MODELS[name]
    path = wrong.make(tmp_path / f"{name}.gguf")[0]

    ran = subprocess.run(
        [sys.executable, "-m", "tests.models.probe", str(path)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=50,
        # Without it ggml starts a debugger to print where it was.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )

    assert ran.stdout.split() == STAGES[: STAGES.index(wrong.stage)]
    assert ran.returncode == (1 if wrong.signal is None else -wrong.signal)
    assert wrong.says in ran.stderr
    assert ("ProbeError" in ran.stderr) == (wrong.signal is None)


@pytest.mark.slow
def test_the_bench_model_has_a_hundred_million_parameters_and_goes_on(tmp_path: Path) -> None:
    (path,) = make_bench_model(tmp_path / "bench.gguf")

    assert 100_000_000 < path.stat().st_size < 130_000_000
    with opened(tmp_path, "bench") as probe:
        (generation,) = probe.greedy([probe.tokenize(CHAT)], 64)
        assert not any(map(probe.ends, generation.tokens))
        assert probe.text(generation.tokens).decode().isascii()
