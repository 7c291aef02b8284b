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
        await stop.asked.wait()
        assert not stop.at_once.is_set()
        await asyncio.sleep(0)  # a drain that is not cut


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_second_signal_sets_the_other_event_and_cancels_nothing(number: signal.Signals) -> None:
    async with asyncio.timeout(SECONDS), told_to_stop() as stop:
        signal.raise_signal(number)
        await stop.asked.wait()
        assert not stop.at_once.is_set()
        signal.raise_signal(signal.SIGTERM)
        await stop.at_once.wait()
        signal.raise_signal(number)  # a third says nothing new
        await asyncio.sleep(0)


async def test_a_cancellation_by_somebody_else_goes_on() -> None:
    ready = asyncio.Event()

    async def serve() -> None:
        async with told_to_stop():
            ready.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    async with asyncio.timeout(SECONDS):
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_signal_after_the_end_of_a_process_that_was_told_to_stop_is_no_traceback() -> None:
    script = (
        "import asyncio, os, signal, time\n"
        "from paddock.daemons import told_to_stop\n"
        "async def main():\n"
        "    async with told_to_stop(ends_process=True) as stop:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        await stop.asked.wait()\n"
        "asyncio.run(main())\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=SECONDS, check=False)

    assert (done.returncode, done.stderr) == (0, b"")


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
