from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddock_server.worker.detokenize import TextStream

STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=4)
TEXTS = st.text(alphabet="abcé終", max_size=24)


def run(pieces: list[bytes], stops: list[str]) -> tuple[str, str]:
    """Return the text that left and the stop sequence that ended it."""
    stream = TextStream(stops)
    text = ""
    for piece in pieces:
        emitted = stream.push(piece)
        text += emitted.text
        if emitted.stop_sequence:
            return text, emitted.stop_sequence
    emitted = stream.finish()
    return text + emitted.text, emitted.stop_sequence


def expected(text: str, stops: list[str]) -> tuple[str, str]:
    """Say the same, looking at the text a character at a time."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, ""


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(TEXTS, STOPS, st.lists(st.integers(min_value=0), max_size=8))
@example("aab", ["ab"], [1, 2])
@example("abab", ["abb", "aba"], [3])
@example("ab", ["ab", "b"], [1])
def test_the_output_does_not_depend_on_how_the_bytes_are_cut(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert run(cut(text.encode(), places), stops) == expected(text, stops)


@given(TEXTS, STOPS, st.lists(st.integers(min_value=0), max_size=8))
def test_no_piece_of_a_stop_sequence_ever_leaves(text: str, stops: list[str], places: list[int]) -> None:
    stream = TextStream(stops)
    sent = ""
    final, _ = expected(text, stops)
    for piece in cut(text.encode(), places):
        emitted = stream.push(piece)
        sent += emitted.text
        assert final.startswith(sent)
        if emitted.stop_sequence:
            break


@given(st.binary(max_size=24), st.lists(st.integers(min_value=0), max_size=8))
def test_bytes_that_form_no_character_become_replacement_characters(data: bytes, places: list[int]) -> None:
    assert run(cut(data, places), []) == (data.decode("utf-8", "replace"), "")


@pytest.mark.parametrize("character", ["é", "終", "😀"])
def test_a_character_leaves_with_its_last_byte(character: str) -> None:
    stream = TextStream()
    *begin, last = [bytes([byte]) for byte in character.encode()]
    assert [stream.push(piece).text for piece in begin] == [""] * len(begin)
    assert stream.push(last).text == character


def test_half_a_character_at_the_end_becomes_one_replacement_character() -> None:
    stream = TextStream()
    assert stream.push("a😀".encode()[:-1]).text == "a"
    assert stream.finish().text == "�"


def test_a_held_beginning_of_a_stop_sequence_leaves_when_the_text_ends() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"the EN").text == "the "
    assert stream.finish().text == "EN"


def test_a_stop_sequence_that_the_end_completes_still_counts() -> None:
    stream = TextStream(["a�"])
    assert stream.push(b"bba\xf0").text == "bb"
    emitted = stream.finish()
    assert (emitted.text, emitted.stop_sequence) == ("", "a�")
