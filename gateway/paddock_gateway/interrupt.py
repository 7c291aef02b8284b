"""Ending the work of a request from outside it: its client has gone, or the gateway stops."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Interrupt:
    """Makes the block it guards raise. Used for one block only; calls outside of it have no effect."""

    def __init__(self) -> None:
        self._scope: asyncio.Timeout | None = None
        self._error: Exception | None = None

    @asynccontextmanager
    async def block(self) -> AsyncGenerator[None]:
        """Run a block that `interrupt` can end.

        Built on `asyncio.timeout`, which tells its own cancellation from one that comes from elsewhere.
        """
        try:
            async with asyncio.timeout(None) as self._scope:
                try:
                    yield
                finally:
                    self._scope = None
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None

    def interrupt(self, error: Exception) -> None:
        """Cancel what the block waits for and raise the error out of it. The first error counts."""
        if self._scope is not None:
            self._error = error
            self._scope.reschedule(asyncio.get_running_loop().time())
            self._scope = None

    def disarm(self) -> None:
        """Let the rest of the block run undisturbed."""
        self._scope = None
