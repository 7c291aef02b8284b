"""What a server and a gateway alone have in common as processes: event loop, signals, who can reach them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import ipaddress
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

GC_THRESHOLDS: Final = (20_000, 20, 20)
"""New objects until the youngest generation is collected, and collections until the next older one is."""


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed (it halves what a frame from a worker costs), or None."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


@contextlib.asynccontextmanager
async def told_to_stop() -> AsyncGenerator[asyncio.Event]:
    """Give an event that SIGTERM and SIGINT set, for a block that then drains and ends.

    A second signal cancels the block: what was still draining is cut, and the block counts as done. Only for
    the main thread. Raises `CancelledError` when somebody else cancels the task.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    cuts = 0

    def on_signal() -> None:
        nonlocal cuts
        if stop.is_set() and task is not None:
            cuts += task.cancel()
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    except asyncio.CancelledError:
        if task is None or cuts == 0 or task.cancelling() > cuts:
            raise  # somebody else cancelled
        for _ in range(cuts):
            task.uncancel()
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def settle_heap() -> None:
    """Spare the garbage collector what start-up made, and let it look at new objects less often.

    A streamed token leaves no cycles behind, but by default every few hundred objects set the collector off,
    and in the end over the whole heap, which evicts from the caches what the next token needs. For a process
    that serves, once it does.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def is_exposed(host: str) -> bool:
    """Return whether an address can be reached from other machines."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() != "localhost"
