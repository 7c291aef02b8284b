"""Who downloads when: a bounded number at once, a bounded queue, and an end for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from paddock.errors import PaddockError, Reason
from paddock_server.catalog import HubRef
from paddock_server.downloads.messages import Advanced, Done, Failed, Message, Resolved
from paddock_server.downloads.process import FetcherCrashedError, FetcherLauncher
from paddock_server.manager import downloads as module
from paddock_server.manager.downloads import Asking, Downloads, Job, JobState
from paddock_server.manager.progress import Subscription

if TYPE_CHECKING:
    from pathlib import Path

WAY_OUT_SECONDS = 5.0
RESOLVED = Resolved("a" * 40, "m-Q8_0.gguf", "Q8_0", 100, ["b" * 40])


@dataclass(frozen=True, slots=True)
class Fetchers(FetcherLauncher):
    """Fetchers that do what a test says, in this process."""

    waiting: dict[HubRef, asyncio.Event] = field(default_factory=dict[HubRef, asyncio.Event])
    started: list[HubRef] = field(default_factory=list[HubRef])
    resumed: list[bool] = field(default_factory=list[bool])
    crashing: bool = False
    resolved: list[Resolved] = field(default_factory=lambda: [RESOLVED])
    """What the next fetchers hear from the hub; the last one stays."""

    dead: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, as at first, when a fetcher that is killed is dead at once."""

    def __post_init__(self) -> None:
        self.dead.set()

    async def run(
        self, ref: HubRef, receive: Callable[[Message], None], *, resumed: bool = False
    ) -> Done | Failed:
        """Resolve, wait until the test says so, and be done."""
        self.started.append(ref)
        self.resumed.append(resumed)
        if self.crashing:
            message = "It fell over."
            raise FetcherCrashedError(message)
        receive(self.resolved.pop(0) if len(self.resolved) > 1 else self.resolved[0])
        receive(Advanced(verifying=False, completed_bytes=50, total_bytes=100))
        try:
            await self.waiting.setdefault(ref, asyncio.Event()).wait()
        finally:
            await self.dead.wait()
        return Done(cached=False)


class World:
    """Downloads without processes; what they tell is noted."""

    def __init__(self, tmp_path: Path, fetchers: Fetchers) -> None:
        self.fetchers = fetchers
        self.finished: list[str] = []
        self.gone: list[str] = []
        self.downloads = Downloads(
            cache_dir=tmp_path,
            state_file=None,
            launcher=fetchers,
            finished=self._finished,
            changed=lambda job: None,
            gone=lambda job, model: self.gone.append(model),
        )

    async def _finished(self, job: Job) -> None:
        self.finished.append(job.id)

    def join(self, name: str, asking: Asking = Asking.DOWNLOAD) -> Subscription:
        subscription = Subscription()
        self.downloads.join(HubRef(name), subscription, asking)
        return subscription


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    world = World(tmp_path, Fetchers())
    await world.downloads.start()
    yield world
    await world.downloads.stop()


async def to_end(subscription: Subscription) -> None:
    while await subscription.next() is not None:
        pass


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_so_many_run_at_once_and_the_others_wait_their_turn(world: World) -> None:
    names = [f"org/{letter}" for letter in "abcd"]
    ends = [asyncio.create_task(to_end(world.join(name))) for name in names]
    await settle()
    assert [ref.repo_id for ref in world.fetchers.started] == names[: module.RUNNING_MAX]

    for name in names:
        await settle()
        world.fetchers.waiting[HubRef(name)].set()
    await asyncio.gather(*ends)
    assert [ref.repo_id for ref in world.fetchers.started] == names
    assert world.finished == [f"{name}:Q8_0" for name in names]
    assert world.downloads.jobs() == []


async def test_over_the_bound_of_the_queue_a_download_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUEUE_MAX", 3)
    for letter in "abc":
        world.join(f"org/{letter}")

    with pytest.raises(PaddockError) as caught:
        world.join("org/d")

    assert caught.value.reason == Reason.QUEUE_FULL
    world.join("org/a")  # what runs already takes anybody


async def test_a_fetcher_that_always_crashes_ends_all_who_wait_after_a_bound(tmp_path: Path) -> None:
    world = World(tmp_path, Fetchers(crashing=True))
    await world.downloads.start()
    followers = [world.join("org/a") for _ in range(3)]
    ends = await asyncio.gather(*(to_end(follower) for follower in followers), return_exceptions=True)
    await world.downloads.stop()

    reasons = [end.reason for end in ends if isinstance(end, PaddockError)]
    assert reasons == [Reason.HUB_UNREACHABLE] * 3
    assert len(world.fetchers.started) == module.FETCHERS_MAX
    assert world.downloads.jobs() == []


async def test_a_fetcher_is_told_whether_the_hub_has_been_reached_before(world: World) -> None:
    world.join("org/a")
    await settle()
    (job,) = world.downloads.jobs()
    await world.downloads.halt(job, keep=True)
    world.join("org/a")
    await settle()

    assert world.fetchers.resumed == [False, True]


async def test_stopping_the_server_ends_all_who_wait(tmp_path: Path) -> None:
    world = World(tmp_path, Fetchers())
    await world.downloads.start()
    followers = [world.join(f"org/{letter}") for letter in "abcd"]
    await settle()
    await world.downloads.stop()
    ends = await asyncio.gather(*(to_end(follower) for follower in followers), return_exceptions=True)

    assert [end.reason for end in ends if isinstance(end, PaddockError)] == [Reason.SHUTTING_DOWN] * 4
    with pytest.raises(PaddockError, match="shutting down"):
        world.join("org/e")


@pytest.mark.parametrize("keep", [True, False])
async def test_a_stop_once_begun_goes_on_without_its_caller(world: World, keep: bool) -> None:
    follower = world.join("org/a")
    await settle()
    (job,) = world.downloads.jobs()
    world.fetchers.dead.clear()
    stopping = asyncio.create_task(world.downloads.halt(job, keep=keep))
    await settle()
    stopping.cancel()
    await settle()
    world.fetchers.dead.set()

    async with asyncio.timeout(WAY_OUT_SECONDS):
        with pytest.raises(PaddockError) as caught:
            await to_end(follower)
        async with job.stopping:
            pass
    assert caught.value.reason == Reason.LOAD_ABORTED
    assert job.state is JobState.PAUSED
    assert world.downloads.jobs() == ([job] if keep else [])


async def test_what_had_arrived_of_a_revision_that_has_moved_is_removed(world: World, tmp_path: Path) -> None:
    moved = Resolved("c" * 40, "m-Q8_0.gguf", "Q8_0", 100, ["d" * 40])
    world.fetchers.resolved[:] = [RESOLVED, moved]
    blobs = tmp_path / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    for digest in "bd":
        (blobs / f"{digest * 40}.incomplete").write_bytes(b"half")
    world.join("org/a")
    await settle()
    (job,) = world.downloads.jobs()
    await world.downloads.halt(job, keep=True)
    assert len(list(blobs.iterdir())) == 2

    world.join("org/a")
    await settle()
    await world.downloads.stop()
    assert [path.name for path in blobs.iterdir()] == [f"{'d' * 40}.incomplete"]


async def test_the_rate_is_that_of_the_last_seconds() -> None:
    job = Job(HubRef("org/a"), JobState.RUNNING)
    assert job.bytes_per_second(0.0) == 0
    for second in range(10):
        job.sample(float(second), 1000 + 100 * second)

    assert job.bytes_per_second(9.0) == 100
    assert job.bytes_per_second(9.0 + 2 * module.RATE_SECONDS) == 0  # nothing has arrived since
    job.sample(10.0, 0)  # the server does no ranges: all over again
    assert job.bytes_per_second(10.0) == 0
