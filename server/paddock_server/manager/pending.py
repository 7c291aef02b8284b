"""Loads that download their model first. They belong to no call: who leaves, leaves them running. They end
when the model is unloaded, and come back after a restart of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from paddock.errors import PaddockError, Reason
from paddock_server.manager import failure as failures

if TYPE_CHECKING:
    from paddock_server.manager.desired import DesiredLoads
    from paddock_server.manager.hub import HubModels, Wanted
    from paddock_server.manager.messages import LoadAsked
    from paddock_server.manager.options import Wish
    from paddock_server.manager.progress import Subscription


class PendingLoads:
    """The loads that wait for a download. Every method is to be called in the manager's event loop."""

    def __init__(
        self,
        hub: HubModels,
        desired: DesiredLoads,
        load: Callable[[str, LoadAsked], Awaitable[None]],
    ) -> None:
        """`load` has a model that is there loaded. It may raise `PaddockError`."""
        self._hub = hub
        self._desired = desired
        self._load = load
        self._running: set[str] = set()

    async def run(self, wanted: Wanted, asked: LoadAsked) -> None:
        """Download a model, then load it. The call sees every stage, and a failure.

        The first call for a model decides: how long it may take, and what is remembered. Others join it.
        """
        subscription = cast("Subscription", asked.caller)
        name = wanted.name
        first = name not in self._running
        if first:
            self._running.add(name)
            if asked.explicit:
                self._desired.expect(name, asked.wish)
        failure: failures.Failure | None = failures.internal(name)
        try:
            model, left = await self._brought(wanted, subscription, asked.timeout_seconds if first else None)
            if first and asked.explicit and model != name:
                self._desired.failed(name, asked.wish, for_good=False)
                self._desired.expect(model, asked.wish)
            await self._load(model, replace(asked, timeout_seconds=left))
            failure = None
        except PaddockError as error:
            failure = failures.failure_of(error)
        except asyncio.CancelledError:
            failure = failures.shutting_down()
            raise
        finally:
            if first:
                self._running.discard(name)
            if failure is not None:
                subscription.fail(failure)
                if first and asked.explicit:
                    self._note_failure(name, asked.wish, failure)

    def _note_failure(self, name: str, wish: Wish, failure: failures.Failure) -> None:
        """Forget a load whose download has failed: that is not taken up again by itself either."""
        if failure.reason == Reason.LOAD_ABORTED:
            self._desired.put(name, None)
        elif failure.reason != Reason.SHUTTING_DOWN:
            self._desired.failed(name, wish, for_good=False)

    async def _brought(
        self, wanted: Wanted, subscription: Subscription, seconds: float | None
    ) -> tuple[str, float | None]:
        """Return the id of the downloaded model, and the seconds that are left to load it.

        Raises:
            PaddockError: the download failed or was stopped; LOAD_STALLED it took longer than `seconds`.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(seconds):
                model = await self._hub.bring(wanted, subscription)
        except TimeoutError:
            stalled = failures.load_stalled(wanted.name, "download", seconds or 0.0)
            await self._hub.call_off(wanted, stalled)
            raise stalled.error() from None
        return model, None if seconds is None else max(0.0, began + seconds - loop.time())
