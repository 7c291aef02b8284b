"""Whatever is asked of downloads, in whatever order: a name has one fetcher, everybody is answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import PaddockError, Reason
from paddock_server.catalog import HubRef
from paddock_server.downloads.messages import Advanced, Done, Failed, Message, Resolved
from paddock_server.downloads.process import FetcherCrashedError, FetcherLauncher
from paddock_server.manager.downloads import RUNNING_MAX, Asking, Downloads, Job, JobState
from paddock_server.manager.progress import Subscription

if TYPE_CHECKING:
    from typing import Any

BOUND_SECONDS = 20.0
REFS = [HubRef(f"org/{letter}") for letter in "abc"]
pick = st.integers(0, 7)
steps = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(REFS), st.sampled_from(list(Asking))),
    st.tuples(st.just("stop"), st.sampled_from(REFS), st.booleans()),
    st.tuples(st.just("cut"), st.sampled_from(REFS), st.booleans()),
    st.tuples(st.just("resolve"), pick),
    st.tuples(st.just("end"), pick, st.sampled_from(["done", "failed", "crashed"])),
    st.tuples(st.just("leave"), pick),
    st.tuples(st.just("slow"), st.booleans()),
    st.tuples(st.just("turn"), st.integers(1, 10)),
)


@dataclass(eq=False)
class Fetcher:
    """A fetcher that runs."""

    ref: HubRef
    receive: Callable[[Message], None]
    end: asyncio.Future[Done | Failed] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def resolve(self) -> None:
        """Hear from the hub."""
        self.receive(Resolved("a" * 40, "m-Q8_0.gguf", "Q8_0", 100, ["b" * 40]))
        self.receive(Advanced(verifying=False, completed_bytes=50, total_bytes=100))


@dataclass(frozen=True, slots=True)
class Fetchers(FetcherLauncher):
    """Fetchers that end when the test says so, and may take a while to die."""

    running: list[Fetcher] = field(default_factory=list[Fetcher])
    dying: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(
        self, ref: HubRef, receive: Callable[[Message], None], *, resumed: bool = False
    ) -> Done | Failed:
        """Run until told to end."""
        del resumed
        fetcher = Fetcher(ref, receive)
        self.running.append(fetcher)
        assert max(Counter(one.ref for one in self.running).values()) == 1, "one fetcher for a name"
        assert len(self.running) <= RUNNING_MAX
        try:
            try:
                return await fetcher.end
            finally:
                await self.dying.wait()
        finally:
            self.running.remove(fetcher)


class Run:
    """Downloads, and those who ask for them."""

    def __init__(self, cache: Path) -> None:
        self.fetchers = Fetchers()
        self.fetchers.dying.set()
        self.asking: list[asyncio.Task[None]] = []
        self.downloads = Downloads(
            cache_dir=cache,
            state_file=None,
            launcher=self.fetchers,
            finished=self._finished,
            changed=lambda job: None,
            gone=lambda job, model: None,
        )

    async def _finished(self, job: Job) -> None:
        await asyncio.sleep(0)

    async def _follow(self, ref: HubRef, asking: Asking) -> None:
        subscription = Subscription()
        try:
            self.downloads.join(ref, subscription, asking)
            while await subscription.next() is not None:
                pass
        finally:
            subscription.closed = True

    async def _stop(self, ref: HubRef, *, keep: bool) -> None:
        job = self.downloads.find(ref, "")
        if job is not None:
            await self.downloads.halt(job, keep=keep)

    async def step(self, what: str, *how: Any) -> None:
        running = self.fetchers.running
        match what:
            case "join":
                self.asking.append(asyncio.create_task(self._follow(*how)))
            case "stop":
                self.asking.append(asyncio.create_task(self._stop(how[0], keep=how[1])))
            case "cut":  # a stop whose caller goes before the fetcher is dead
                self.fetchers.dying.clear()
                stopping = asyncio.create_task(self._stop(how[0], keep=how[1]))
                for _ in range(3):
                    await asyncio.sleep(0)
                stopping.cancel()
                self.asking.append(stopping)
            case "resolve" if running:
                running[int(how[0]) % len(running)].resolve()
            case "end" if running:
                self._end(running[int(how[0]) % len(running)], how[1])
            case "leave" if self.asking:
                self.asking[int(how[0]) % len(self.asking)].cancel()
            case "slow":
                (self.fetchers.dying.clear if how[0] else self.fetchers.dying.set)()
            case "turn":
                for _ in range(how[0]):
                    await asyncio.sleep(0)
            case _:
                pass

    @staticmethod
    def _end(fetcher: Fetcher, how: str) -> None:
        if fetcher.end.done():
            return
        match how:
            case "done":
                fetcher.resolve()
                fetcher.end.set_result(Done(cached=False))
            case "failed":
                fetcher.end.set_result(Failed(Reason.HUB_UNREACHABLE, "The hub is away."))
            case _:
                fetcher.end.set_exception(FetcherCrashedError("It fell over."))

    async def finish(self) -> None:
        """Let everything come to its end; then nobody waits, and as many may run as at first."""
        self.fetchers.dying.set()

        async def help_on() -> None:
            while True:
                for fetcher in tuple(self.fetchers.running):
                    self._end(fetcher, "done")
                await asyncio.sleep(0)

        helping = asyncio.create_task(help_on())
        await self._all_ended()
        self.asking = [asyncio.create_task(self._follow(ref, Asking.DOWNLOAD)) for ref in REFS]
        await self._all_ended()
        helping.cancel()
        assert [task.exception() for task in self.asking] == [None] * len(REFS)
        assert self.downloads.jobs() == []

    async def _all_ended(self) -> None:
        if self.asking:
            _, late = await asyncio.wait(self.asking, timeout=BOUND_SECONDS)
            assert not late, "everyone is answered in the end"
        errors = [error for task in self.asking if not task.cancelled() and (error := task.exception())]
        assert all(isinstance(error, PaddockError) for error in errors), errors
        for job in self.downloads.jobs():
            async with asyncio.timeout(BOUND_SECONDS), job.stopping:
                assert (job.task is not None) == job.is_active, job.state
                assert job.state is not JobState.HELD


async def run(taken: list[tuple[Any, ...]]) -> None:
    with TemporaryDirectory() as folder:
        playing = Run(Path(folder))
        await playing.downloads.start()
        for what, *how in taken:
            await playing.step(what, *how)
        await playing.finish()
        await playing.downloads.stop()


@settings(max_examples=100, deadline=None)
@given(taken=st.lists(steps, min_size=5, max_size=40))
def test_everyone_is_answered_and_no_place_is_lost(taken: list[tuple[Any, ...]]) -> None:
    asyncio.run(run(taken))
