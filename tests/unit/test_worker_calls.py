"""Calls that wait to be answered, and what a cancel does to them."""

from __future__ import annotations

import threading

from paddock_server.worker.calls import WaitingCalls
from paddock_server.worker.v1 import worker_pb2

BOUND_SECONDS = 30.0
"""Way out for a thread that never ends."""


def waiting(*numbers: int) -> WaitingCalls:
    calls = WaitingCalls()
    for number in numbers:
        calls.put(worker_pb2.Call(call=number))
    return calls


def take(calls: WaitingCalls) -> int:
    """Take a call there is; return its number."""
    call = calls.take()
    assert call is not None
    return call.call


def test_calls_are_taken_in_the_order_they_came() -> None:
    calls = waiting(5, 3, 4)

    assert [take(calls) for _ in range(3)] == [5, 3, 4]
    assert len(calls) == 0


def test_a_call_cancelled_while_it_waits_is_never_taken() -> None:
    calls = waiting(1, 2, 3)

    assert calls.cancel(2)
    assert len(calls) == 2
    assert [take(calls) for _ in range(2)] == [1, 3]


def test_a_call_cancelled_while_it_is_answered_is_known_at_its_end() -> None:
    calls = waiting(1, 2)
    calls.take()

    assert calls.cancel(1)
    assert not calls.finish()
    calls.take()
    assert calls.finish(), "the cancel was another call's"


def test_a_call_that_is_done_with_is_not_here_to_be_cancelled() -> None:
    calls = waiting(1)
    calls.take()

    assert calls.finish()
    assert not calls.cancel(1)
    assert not calls.cancel(77)


def test_whoever_takes_waits_for_a_call() -> None:
    calls = waiting()
    taken: list[int] = []
    taker = threading.Thread(target=lambda: taken.append(take(calls)), daemon=True)
    taker.start()

    calls.put(worker_pb2.Call(call=9))

    taker.join(BOUND_SECONDS)
    assert taken == [9]


def test_a_close_ends_the_wait_for_a_call() -> None:
    calls = waiting()
    taken: list[worker_pb2.Call | None] = []
    taker = threading.Thread(target=lambda: taken.append(calls.take()), daemon=True)
    taker.start()

    calls.close()

    taker.join(BOUND_SECONDS)
    assert taken == [None]
