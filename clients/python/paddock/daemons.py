"""What a server and a gateway alone have in common as processes: their event loop, and who can reach them."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed (it halves what a frame from a worker costs), or None."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def is_exposed(host: str) -> bool:
    """Return whether an address can be reached from other machines."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
