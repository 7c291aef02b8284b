"""One generation as its reader sees it: a context manager around an async iterator of updates."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

    from paddock.errors import PaddockError
    from paddock.v1 import model_manager_pb2 as pb
    from paddock_server.worker.v1 import worker_pb2

MAX_MERGED_BYTES: Final = 1024 * 1024
"""Updates that pile up are merged into messages of about this size: a quarter of gRPC's default limit."""


class GenerationHost(Protocol):
    """What a generation needs of its worker's connection."""

    def start_generation(self, generation: Generation) -> int:
        """Send the request and return the number of the generation. Raises `PaddockError`."""
        ...

    def leave_generation(self, number: int) -> None:
        """Forget the generation, and cancel it if the worker still runs it."""
        ...


class Generation:
    """Made by `Worker.generate`. Entering sends the request; leaving stops it unless it has ended.

    For one reader, and for use once. What comes while the reader is busy is merged, so a slow reader gets
    fewer and larger updates: of one update, `started` comes before `prompt_progress`, that before `deltas`,
    that before `finished`. Everything that arrived is given before an error is raised.

    Memory is bounded by the tokens the request may make: nothing is kept twice, and what is read is let go.
    """

    def __init__(self, host: GenerationHost, request: pb.GenerateRequest) -> None:
        self.request = request
        self._host = host
        self._number: int | None = None
        self._pending: deque[worker_pb2.GenerationUpdate] = deque()
        self._last_size = 0
        self._ended = False
        self._error: PaddockError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more can come from the worker."""
        return self._ended or self._error is not None

    async def __aenter__(self) -> Self:
        if self._number is not None:
            text = "a generation cannot be entered twice"
            raise RuntimeError(text)
        self._number = self._host.start_generation(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._number is not None:
            self._host.leave_generation(self._number)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> worker_pb2.GenerationUpdate:
        """Return the next update.

        Raises:
            PaddockError: The worker reported a failure, crashed (WORKER_CRASHED) or was stopped
                (MODEL_UNLOADED or the reason given to `Worker.stop`).
        """
        if self._number is None:
            text = "a generation is read inside `async with`"
            raise RuntimeError(text)
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._pending.popleft()

    def push(self, update: worker_pb2.GenerationUpdate) -> None:
        """Take an update from the connection. After one with `finished`, no other comes."""
        if not self._pending:
            self._pending.append(update)
            self._last_size = 0
        else:
            # Sizes only matter once updates pile up; the first of a pile is a frame's worth and not counted.
            size = update.ByteSize()
            if self._last_size + size <= MAX_MERGED_BYTES:
                self._pending[-1].MergeFrom(update)
                self._last_size += size
            else:
                self._pending.append(update)
                self._last_size = size
        if update.HasField("finished"):
            self._ended = True
        self._wake()

    def fail(self, error: PaddockError) -> None:
        """End the generation with an error, raised once everything pushed has been read."""
        if not self.ended:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
