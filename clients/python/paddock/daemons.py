"""What a server and a gateway alone have in common as processes: event loop, signals, who can reach them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import ipaddress
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import FrameType

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

GC_THRESHOLDS: Final = (20_000, 20, 20)
"""New objects until the youngest generation is collected, and collections until the next older one is."""


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed (it halves what a frame from a worker costs), or None."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


@dataclass(frozen=True, slots=True)
class Stop:
    """What SIGTERM and SIGINT have asked for so far."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the first: let what runs end, for a while."""

    at_once: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the second: end what still runs, and tell whoever waits for it why. Nothing is cancelled by a
    signal itself: a drain that is cut in the middle would tell nobody anything."""


@contextlib.asynccontextmanager
async def told_to_stop(*, ends_process: bool = False) -> AsyncGenerator[Stop]:
    """Give what SIGTERM and SIGINT ask for, for a block that then drains and ends. Only for the main thread.

    Args:
        ends_process: Whether nothing comes after the block but the end of the process. A signal after a stop
            then ends it on the spot, with exit code 0, instead of with a traceback out of the interpreter's
            own end.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.asked.is_set():
            stop.at_once.set()
        stop.asked.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            if ends_process and stop.asked.is_set():
                signal.signal(number, _end_now)


def _end_now(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(0)


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
