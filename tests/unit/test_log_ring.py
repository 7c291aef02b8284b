from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddock_server.supervisor.log_ring import (
    MAX_BATCH_BYTES,
    MAX_BATCH_LINES,
    MAX_LINE_CHARACTERS,
    LineSplitter,
    LogBatch,
    LogLine,
    LogRing,
)


def line(text: str, *, pid: int = 1) -> LogLine:
    return LogLine(0.0, "load", pid, text)


def ring_of(*texts: str, max_lines: int = 5000, max_bytes: int = 1024 * 1024) -> LogRing:
    ring = LogRing(max_lines=max_lines, max_bytes=max_bytes)
    ring.extend(line(text) for text in texts)
    return ring


def texts_of(batch: LogBatch) -> list[str]:
    return [one.text for one in batch.lines]


def split(*chunks: bytes) -> list[str]:
    splitter = LineSplitter(load_id="load", pid=1)
    lines = [one for chunk in chunks for one in splitter.feed(chunk)]
    return [one.text for one in [*lines, *splitter.finish()]]


# The ring


def test_the_ring_is_bounded_by_lines() -> None:
    ring = ring_of("a", "b", "c", max_lines=2)

    assert ring.tail(10) == ("b", "c")
    assert (ring.first, ring.end) == (1, 3)


def test_the_ring_is_bounded_by_bytes() -> None:
    ring = ring_of(*("x" * 1000 for _ in range(100)), max_bytes=10_000)

    assert 1 <= len(ring.tail(100)) <= 10
    assert ring.end == 100


def test_a_line_larger_than_the_ring_leaves_it_empty() -> None:
    ring = ring_of("x" * 1000, max_bytes=100)

    assert ring.tail(10) == ()
    assert ring.first == ring.end == 1


def test_the_tail_of_one_process_leaves_the_others_out() -> None:
    ring = LogRing()
    ring.extend([line("a", pid=1), line("b", pid=2), line("c", pid=1), line("d", pid=1)])

    assert ring.tail(2, pid=1) == ("c", "d")
    assert ring.tail(5, pid=2) == ("b",)
    assert ring.tail(0) == ()


def test_a_read_counts_what_is_gone() -> None:
    ring = ring_of("a", "b", "c", "d", max_lines=2)

    assert ring.read(0) == LogBatch((line("c"), line("d")), 2)
    assert ring.read(3) == LogBatch((line("d"),), 0)
    assert ring.read(4) == LogBatch((), 0)


def test_a_batch_is_bounded_by_lines_and_by_bytes() -> None:
    many = ring_of(*(str(number) for number in range(MAX_BATCH_LINES + 1)))
    long = ring_of(*("x" * MAX_LINE_CHARACTERS for _ in range(200)))

    assert len(many.read(0).lines) == MAX_BATCH_LINES
    assert sum(len(text.encode()) for text in texts_of(long.read(0))) <= MAX_BATCH_BYTES


@given(
    st.lists(st.lists(st.text(max_size=20), max_size=5), max_size=20), st.integers(1, 8), st.integers(0, 3)
)
def test_a_reader_sees_or_counts_every_line_once_and_in_order(
    chunks: list[list[str]], max_lines: int, patience: int
) -> None:
    ring = LogRing(max_lines=max_lines)
    written: list[str] = []
    place = 0
    for index, chunk in enumerate(chunks):
        ring.extend(line(text) for text in chunk)
        written += chunk
        if index % (patience + 1) == 0:
            batch = ring.read(place)
            place += batch.dropped_line_count
            assert texts_of(batch) == written[place : place + len(batch.lines)]
            place += len(batch.lines)
    batch = ring.read(place)
    assert place + batch.dropped_line_count + len(batch.lines) == len(written)


# Followers


async def collect(ring: LogRing, tail_line_count: int) -> list[LogBatch]:
    return [batch async for batch in ring.subscribe(tail_line_count=tail_line_count, follow=False)]


async def test_without_follow_it_ends_when_everything_was_read() -> None:
    ring = ring_of("a", "b", "c")

    assert [texts_of(batch) for batch in await collect(ring, 0)] == [["a", "b", "c"]]
    assert [texts_of(batch) for batch in await collect(ring, 2)] == [["b", "c"]]
    assert await collect(LogRing(), 0) == []


async def test_the_whole_log_says_how_much_of_it_is_gone_and_a_tail_does_not() -> None:
    ring = ring_of("a", "b", "c", max_lines=2)

    assert (await collect(ring, 0))[0].dropped_line_count == 1
    assert (await collect(ring, 2))[0].dropped_line_count == 0
    assert (await collect(ring, 10))[0].dropped_line_count == 1


async def test_a_follower_waits_for_the_next_line() -> None:
    ring = ring_of("old")
    follower = ring.subscribe(tail_line_count=1)
    assert texts_of(await anext(follower)) == ["old"]
    waiting = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    assert not waiting.done()

    ring.extend([line("new")])

    assert texts_of(await waiting) == ["new"]


async def test_followers_do_not_hold_each_other_up() -> None:
    ring = LogRing(max_lines=2)
    slow, quick = ring.subscribe(), ring.subscribe()
    seen: list[str] = []
    for text in "abcde":
        ring.extend([line(text)])
        seen += texts_of(await anext(quick))

    assert seen == list("abcde")
    batch = await anext(slow)
    assert (texts_of(batch), batch.dropped_line_count) == (["d", "e"], 3)


async def test_a_follower_of_a_model_that_is_gone_reads_the_rest_and_ends() -> None:
    ring = LogRing()
    ring.extend([line("a")])
    seen: list[str] = []

    async def follow() -> None:
        async for batch in ring.subscribe():
            seen.extend(one.text for one in batch.lines)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    ring.extend([line("b")])
    ring.close()
    await asyncio.wait_for(following, 10)
    await asyncio.wait_for(follow(), 10)

    assert seen == ["a", "b", "a", "b"]


async def test_a_follower_that_goes_away_leaves_nothing_behind() -> None:
    ring = LogRing()
    waiting = asyncio.ensure_future(anext(ring.subscribe()))
    await asyncio.sleep(0)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert ring._waiters == []
    ring.extend([line("a")])
    assert texts_of(await anext(ring.subscribe())) == ["a"]


# Lines


def test_lines_are_cut_at_line_ends_wherever_the_chunks_end() -> None:
    assert split(b"one\ntw", b"o\n", b"\nfour\r\nfi", b"ve") == ["one", "two", "", "four", "five"]


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert split(b"a\xffb\n", "né".encode()[:2], b"\xa9\n") == ["a\ufffdb", "né"]


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1000])
def test_a_long_line_is_cut_to_its_characters(character: str, chunk_bytes: int) -> None:
    data = character.encode() * 5000 + b"\nnext\n"

    texts = split(*(data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)))

    assert texts == [character * MAX_LINE_CHARACTERS, "next"]


def test_a_line_that_never_ends_takes_bounded_memory() -> None:
    splitter = LineSplitter(load_id="load", pid=1)

    for _ in range(1000):
        assert splitter.feed(b"x" * 4096) == []

    assert len(splitter._partial) <= 4 * MAX_LINE_CHARACTERS
    assert splitter.finish()[0].text == "x" * MAX_LINE_CHARACTERS
    assert splitter.finish() == []


@given(st.binary(max_size=300), st.integers(1, 50))
def test_chunks_make_no_difference(data: bytes, chunk_bytes: int) -> None:
    chunks = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]

    assert split(*chunks) == split(data)


def test_a_line_says_whose_it_is() -> None:
    (one,) = LineSplitter(load_id="load-7", pid=42).feed(b"hello\n")

    assert (one.load_id, one.pid, one.text) == ("load-7", 42, "hello")
    assert one.read_time > 1_600_000_000
