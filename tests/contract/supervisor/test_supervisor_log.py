"""What a worker writes reaches the ring of its model, whatever it writes and whoever reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.contract.supervisor.streams import ask, expected_text, read_text
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from paddock_server.supervisor import LogRing
    from tests.contract.supervisor.conftest import StartWorker


async def test_the_ring_of_a_model_keeps_the_lines_of_earlier_workers(
    start_loaded: StartWorker, ring: LogRing
) -> None:
    first = await start_loaded(stderr_lines=("one",))
    await first.stop(grace_seconds=10)
    second = await start_loaded(stderr_lines=("two",))
    await second.stop(grace_seconds=10)

    lines = ring.read(0).lines

    assert [(line.load_id, line.pid, line.text) for line in lines] == [
        ("load-1", first.pid, "one"),
        ("load-1", first.pid, "shutdown"),
        ("load-2", second.pid, "two"),
        ("load-2", second.pid, "shutdown"),
    ]
    assert first.log_tail() == ("one", "shutdown")
    assert second.log_tail(1) == ("shutdown",)


async def test_streams_go_on_while_a_worker_floods_its_log_and_nobody_reads_it(
    start_loaded: StartWorker, ring: LogRing
) -> None:
    worker = await start_loaded(stderr_bytes_per_step=200_000)
    follower = ring.subscribe()

    async with worker.generate(ask(50)) as generation:
        assert await read_text(generation) == expected_text(50)

    await eventually(lambda: ring.end >= 50 * 200_000 // 100)
    batch = await anext(follower)
    assert batch.dropped_line_count == ring.first
    assert sum(line.size_bytes for line in ring.read(ring.first).lines) < 1024 * 1024


async def test_a_follower_sees_lines_as_they_come(start: StartWorker, ring: LogRing) -> None:
    follower = ring.subscribe()
    worker = await start(fork_grandchild="group")

    batch = await anext(follower)

    assert batch.lines[0].text.startswith("grandchild ")
    await worker.stop(grace_seconds=10)
