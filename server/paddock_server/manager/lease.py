"""The right to use a loaded model: while it lasts, the model is not evicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from paddock_server.manager.run import LiveWorker


class Lease:
    """Given by `ModelManager.acquire`; to be left, with `async with` or `release`, whatever happens."""

    def __init__(
        self,
        *,
        model_id: str,
        load_id: str,
        worker: LiveWorker,
        load_wait_seconds: float,
        release: Callable[[], None],
    ) -> None:
        self.model_id = model_id
        self.load_id = load_id
        """Load that serves the request."""

        self.worker = worker
        self.load_wait_seconds = load_wait_seconds
        """How long the request waited for the model to be loaded; 0 when it was."""

        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the lease back. A second time does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
