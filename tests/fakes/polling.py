"""Waiting for what another process does, without a sleep that has to be long enough."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS: Final = 0.005
GIVE_UP_SECONDS: Final = 20.0
"""Only a way out: nothing waited for takes that long on the slowest machine."""


async def eventually(holds: Callable[[], bool], describe: Callable[[], object] = lambda: "") -> None:
    """Wait until a condition holds; fail, with what `describe` returns, when it does not in the end."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GIVE_UP_SECONDS
    while not holds():
        assert loop.time() < deadline, f"still not so after {GIVE_UP_SECONDS:g} s: {describe()}"
        await asyncio.sleep(POLL_SECONDS)
