from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paddock_server.supervisor.backoff import Restart, RestartPolicy


def test_delays_are_0_1_2_4_and_then_it_gives_up() -> None:
    policy = RestartPolicy()
    delays: list[float | None] = []
    restart = Restart(0, 0.0)
    while not restart.gives_up:
        restart = policy.after_crash(restart.crash_count, served_seconds=0)
        delays.append(restart.delay_seconds)

    assert delays == [0, 1, 2, 4, None]


def test_delays_double_up_to_a_minute() -> None:
    policy = RestartPolicy()

    assert [policy.delay_seconds(count) for count in range(1, 11)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_five_healthy_minutes_forgive_what_came_before() -> None:
    policy = RestartPolicy()

    assert policy.after_crash(4, served_seconds=299.9) == Restart(5, None)
    assert policy.after_crash(4, served_seconds=300) == Restart(1, 0.0)


def test_the_limits_can_be_set() -> None:
    policy = RestartPolicy(max_delay_seconds=3, healthy_seconds=10, max_crash_count=2)

    assert policy.after_crash(0, served_seconds=0) == Restart(1, 0.0)
    assert policy.after_crash(1, served_seconds=9) == Restart(2, None)
    assert policy.after_crash(7, served_seconds=10) == Restart(1, 0.0)


@given(st.integers(0, 10_000), st.floats(0, 1e9))
def test_delays_stay_in_their_bounds_and_never_shrink(crash_count: int, served_seconds: float) -> None:
    policy = RestartPolicy(max_crash_count=100_000)

    restart = policy.after_crash(crash_count, served_seconds=served_seconds)

    assert restart.delay_seconds is not None
    assert 0 <= restart.delay_seconds <= policy.max_delay_seconds
    assert policy.delay_seconds(restart.crash_count + 1) >= restart.delay_seconds
    assert restart.crash_count in {1, crash_count + 1}
