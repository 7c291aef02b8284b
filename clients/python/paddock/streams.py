"""The streams a `Client` returns: context managers that cancel their call, and iterators of plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from paddock import convert
from paddock.errors import PaddockError, Reason
from paddock.generation import Chunk, PromptProgress, Timings, Usage
from paddock.types import LoadProgress, LogLine, Model, WatchEvent

if TYPE_CHECKING:
    from types import TracebackType

    from paddock.v1 import model_manager_pb2 as pb

MessageT = TypeVar("MessageT")
ProgressT = TypeVar("ProgressT", "pb.LoadResponse", "pb.DownloadResponse")
ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")


class Stream(ABC, Generic[MessageT, ItemT]):
    """A running call.

    Enter it with `async with`, iterate with `async for`. Leaving the block, in whatever way, cancels the
    call; leaving only the loop would not, and the server would go on working for nobody.
    """

    def __init__(self, messages: AsyncGenerator[MessageT]) -> None:
        self._messages = messages
        self._items = self._read()
        self._entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._items.aclose()
        await self._messages.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ItemT:
        if not self._entered:
            message = f"Use `async with` on {type(self).__name__}: it cancels the call at the end."
            raise RuntimeError(message)
        return await anext(self._items)

    @abstractmethod
    def _read(self) -> AsyncGenerator[ItemT]:
        """Convert the messages; set what the terminal one carries."""


class ProgressStream(Stream[ProgressT, LoadProgress]):
    """The progress of something that takes long, and a terminal message that shows the model."""

    _rpc: ClassVar[str]
    _terminal: ClassVar[str]
    """Name of the terminal message among the events."""

    def __init__(self, messages: AsyncGenerator[ProgressT]) -> None:
        super().__init__(messages)
        self._last: ProgressT | None = None

    @property
    @abstractmethod
    def model(self) -> Model:
        """The model. Only after the last event."""

    async def wait(self) -> Model:
        """Skip the progress and return the model."""
        async for _ in self:
            pass
        return self.model

    async def _read(self) -> AsyncGenerator[LoadProgress]:
        async for message in self._messages:
            kind = message.WhichOneof("event")  # may be one this client does not know
            if kind == "progress":
                progress = convert.load_progress(message.progress)
                if progress is not None:
                    yield progress
            elif kind == self._terminal:
                self._last = message
        _check_terminal(self._last, self._rpc, self._terminal)


class LoadStream(ProgressStream["pb.LoadResponse"]):
    """The progress of a load. Leaving it detaches: the load goes on, `Client.unload` aborts it."""

    _rpc = "Load"
    _terminal = "loaded"

    @property
    def model(self) -> Model:
        """The loaded model. Only after the last event."""
        return convert.model(_ended(self._last, "model").loaded.model)

    @property
    def already_loaded(self) -> bool:
        """Whether the model was loaded before the call. Only after the last event."""
        return _ended(self._last, "already_loaded").loaded.already_loaded

    @property
    def load_seconds(self) -> float:
        """Time since the load began. Only after the last event."""
        return _ended(self._last, "load_seconds").loaded.load_duration.ToNanoseconds() / 1e9


class DownloadStream(ProgressStream["pb.DownloadResponse"]):
    """The progress of a download. Leaving it detaches; `Client.stop_download` stops the download."""

    _rpc = "Download"
    _terminal = "downloaded"

    @property
    def model(self) -> Model:
        """The model whose files are there. Only after the last event."""
        return convert.model(_ended(self._last, "model").downloaded)


class GenerationStream(Stream["pb.GenerateResponse", Chunk]):
    """A running generation. Entering it waits for a slot; leaving it stops the generation.

    With several choices their chunks come mixed; `Chunk.choice_index` tells them apart.
    """

    def __init__(
        self,
        messages: AsyncGenerator[pb.GenerateResponse],
        on_prompt_progress: Callable[[PromptProgress], None] | None = None,
    ) -> None:
        super().__init__(messages)
        self._on_prompt_progress = on_prompt_progress
        self._started: pb.Started | None = None
        self._generated: pb.Generated | None = None

    async def __aenter__(self) -> Self:
        first = await anext(self._messages, None)
        if first is None or not first.HasField("started"):
            await self._messages.aclose()  # nobody calls __aexit__ when __aenter__ raises
            message = "The server answered Generate without the message `started`."
            raise PaddockError(Reason.INTERNAL, message)
        self._started = first.started
        return await super().__aenter__()

    @property
    def generation_id(self) -> str:
        """Identifier of the generation, also in the server's log."""
        return _entered(self._started, "generation_id").generation_id

    @property
    def load_id(self) -> str:
        """Load that serves the generation."""
        return _entered(self._started, "load_id").load_id

    @property
    def model(self) -> str:
        """Identifier of the model that serves the generation, also when an alias was asked for."""
        return _entered(self._started, "model").model

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return _entered(self._started, "prompt_tokens").prompt_tokens

    @property
    def usage(self) -> Usage:
        """Tokens consumed and produced. Only after the last chunk."""
        return convert.usage(_ended(self._generated, "usage").usage)

    @property
    def timings(self) -> Timings:
        """Where the time went. Only after the last chunk."""
        return convert.timings(_ended(self._generated, "timings").timings)

    @property
    def seed(self) -> int:
        """Seed used. Only after the last chunk."""
        return _ended(self._generated, "seed").seed

    async def _read(self) -> AsyncGenerator[Chunk]:
        async for message in self._messages:
            match message.WhichOneof("event"):
                case "deltas":
                    for delta in message.deltas.deltas:
                        yield convert.chunk(delta)
                case "prompt_progress":
                    self._report(message.prompt_progress)
                case "generated":
                    self._generated = message.generated
                case _:
                    pass
        _check_terminal(self._generated, "Generate", "generated")

    def _report(self, progress: pb.PromptProgress) -> None:
        if self._on_prompt_progress is not None:
            self._on_prompt_progress(
                PromptProgress(evaluated_tokens=progress.evaluated_tokens, total_tokens=progress.total_tokens)
            )


class WatchStream(Stream["pb.WatchResponse", WatchEvent]):
    """Changes to models, until the block is left."""

    async def _read(self) -> AsyncGenerator[WatchEvent]:
        async for message in self._messages:
            event = convert.watch_event(message)
            if event is not None:
                yield event


class LogStream(Stream["pb.StreamLogsResponse", LogLine]):
    """Log lines of a model's workers, oldest first."""

    def __init__(self, messages: AsyncGenerator[pb.StreamLogsResponse]) -> None:
        super().__init__(messages)
        self._dropped_line_count = 0

    @property
    def dropped_line_count(self) -> int:
        """Lines lost so far, because this reader was slow or the server's ring was full."""
        return self._dropped_line_count

    async def _read(self) -> AsyncGenerator[LogLine]:
        async for message in self._messages:
            self._dropped_line_count += message.dropped_line_count
            for line in message.lines:
                yield convert.log_line(line)


def _entered(value: ValueT | None, name: str) -> ValueT:
    if value is None:
        message = f"`{name}` is known once the stream has been entered with `async with`."
        raise RuntimeError(message)
    return value


def _ended(value: ValueT | None, name: str) -> ValueT:
    if value is None:
        message = f"`{name}` is known only after the stream has been read to its end."
        raise RuntimeError(message)
    return value


def _check_terminal(value: object | None, rpc: str, name: str) -> None:
    if value is None:
        message = f"The server ended {rpc} without the message `{name}`."
        raise PaddockError(Reason.INTERNAL, message)
