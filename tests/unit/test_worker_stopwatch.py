"""What heartbeats say of how long a thread has been at one thing."""

from __future__ import annotations

from paddock_server.worker.stopwatch import Stopwatch


def test_only_work_in_progress_takes_time() -> None:
    times = iter([10.0, 10.25, 70.0, 80.0, 80.5])
    watch = Stopwatch(lambda: next(times))

    assert watch.milliseconds == 0
    assert watch.start() == 10.0
    assert watch.milliseconds == 250
    assert watch.milliseconds == 60_000
    watch.stop()
    assert watch.milliseconds == 0
    watch.start()
    assert watch.milliseconds == 500
