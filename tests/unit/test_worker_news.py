"""Which news of the engine leave at once, and which may wait for the next step's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paddock_server.worker.news import News

if TYPE_CHECKING:
    from paddock_server.worker.v1 import worker_pb2

GAP = 0.010


class Sent:
    """What left, and a clock a test moves."""

    def __init__(self) -> None:
        self.now = 50.0
        self.frames: list[worker_pb2.WorkerFrame] = []
        self.news = News(self.frames.append, longest_gap_seconds=GAP, clock=lambda: self.now)

    def token(self, number: int = 1, *, first: bool = False) -> None:
        self.news.of(number, urgent=first).deltas.deltas.add(token_count=1)

    def step(self, seconds: float) -> None:
        """Make a token in that time, and send unless it can wait."""
        self.now += seconds
        self.token()
        if self.news.urgent or not self.news.can_wait(seconds):
            self.news.send()

    @property
    def tokens(self) -> list[int]:
        return [sum(len(update.deltas.deltas) for update in frame.step.updates) for frame in self.frames]


@pytest.fixture
def sent() -> Sent:
    made = Sent()
    made.token(first=True)
    made.news.send()
    made.frames.clear()
    return made


@pytest.mark.parametrize(
    ("step_seconds", "tokens_per_frame"), [(0.0012, 8), (0.004, 2), (0.0055, 1), (0.020, 1), (5.0, 1)]
)
def test_tokens_of_short_steps_leave_together_and_never_later_than_the_gap(
    sent: Sent, step_seconds: float, tokens_per_frame: int
) -> None:
    sent_at = sent.now
    for _ in range(3 * tokens_per_frame):
        sent.step(step_seconds)
        if sent.news.empty:
            assert sent.now - sent_at <= max(GAP, step_seconds) + 1e-9
            sent_at = sent.now
    assert sent.tokens == [tokens_per_frame] * 3


def test_a_first_token_takes_along_what_waits(sent: Sent) -> None:
    sent.step(0.001)
    sent.token(2, first=True)
    sent.step(0.001)
    assert [update.generation for update in sent.frames[0].step.updates] == [1, 2]
    assert sent.tokens == [3]


@pytest.mark.parametrize("urgent", ["started", "prompt_progress", "finished", "failed"])
def test_nothing_but_a_further_token_waits(sent: Sent, urgent: str) -> None:
    sent.token()
    assert not sent.news.urgent
    getattr(sent.news.of(1), urgent).SetInParent()
    assert sent.news.urgent


def test_after_it_was_sent_urgency_is_over(sent: Sent) -> None:
    sent.news.of(1)
    sent.news.send()
    sent.token()
    assert not sent.news.urgent
    assert sent.news.can_wait(0.001)


def test_a_frame_that_has_just_left_makes_no_long_step_wait(sent: Sent) -> None:
    sent.token()
    sent.news.send()  # the first sequences of a large step
    sent.token(2)
    assert sent.news.can_wait(GAP / 2)
    assert not sent.news.can_wait(GAP / 2 + 0.0001)


def test_a_gap_of_nothing_sends_every_step() -> None:
    news = News(lambda _: None, longest_gap_seconds=0, clock=lambda: 1.0)
    news.of(1, urgent=False)
    assert not news.can_wait(0.0001)


def test_nothing_is_no_frame(sent: Sent) -> None:
    sent.news.send()
    assert sent.news.empty
    assert sent.frames == []
