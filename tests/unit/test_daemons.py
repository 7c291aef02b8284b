"""How a server or a gateway is told to stop, and how it treats its heap."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from paddock.daemons import STOP_SIGNALS, told_to_stop

SECONDS = 10
"""Bounds a wait that a mistake would make endless."""


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_first_signal_sets_the_event_and_lets_the_block_drain(number: signal.Signals) -> None:
    async with asyncio.timeout(SECONDS), told_to_stop() as stop:
        signal.raise_signal(number)
        await stop.wait()
        await asyncio.sleep(0)  # a drain that is not cut


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_second_signal_cuts_the_drain_and_the_block_counts_as_done(number: signal.Signals) -> None:
    drained = False
    async with asyncio.timeout(SECONDS):
        async with told_to_stop() as stop:
            signal.raise_signal(number)
            await stop.wait()
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
            drained = True
    task = asyncio.current_task()
    assert task is not None
    assert (drained, task.cancelling()) == (False, 0)


@pytest.mark.parametrize("signals", [0, 1])
async def test_a_cancellation_by_somebody_else_goes_on(signals: int) -> None:
    ready = asyncio.Event()

    async def serve() -> None:
        async with told_to_stop() as stop:
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
                await stop.wait()
            ready.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    async with asyncio.timeout(SECONDS):
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_handlers_that_were_there_before_are_not_left_replaced() -> None:
    async with told_to_stop():
        assert all(signal.getsignal(number) is not signal.SIG_DFL for number in STOP_SIGNALS)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_process_that_serves_leaves_what_start_up_made_to_itself() -> None:
    script = (
        "import gc; from paddock.daemons import GC_THRESHOLDS, settle_heap; settle_heap(); "
        "assert gc.isenabled() and gc.get_freeze_count() > 1000 and gc.get_threshold() == GC_THRESHOLDS"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=SECONDS)
