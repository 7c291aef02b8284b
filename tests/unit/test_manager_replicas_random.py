"""Whatever is asked of a model with replicas, in whatever order: everyone is answered and nothing is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import ModelSetup
from paddock_server.manager import registry
from paddock_server.supervisor import RestartPolicy
from tests.listing import models_of
from tests.unit.manager_fakes import Server, entry, scan, until

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from paddock_server.manager import Lease

BOUND_SECONDS = 20.0
PLACES = 3
counts = st.integers(1, 3)
pick = st.integers(0, 7)
steps = st.one_of(
    st.tuples(st.just("acquire"), st.sampled_from(["a", "a", "a", "b"])),
    st.tuples(st.just("acquire"), st.just("a")),
    st.tuples(st.just("release"), pick),
    st.tuples(st.just("leave"), pick),
    st.tuples(st.just("kill"), pick),
    st.tuples(st.just("fail"), pick),
    st.tuples(st.just("ready"), pick),
    st.tuples(st.just("load"), counts, st.sampled_from(sorted(pb.LoadConflictPolicy.values()))),
    st.tuples(st.just("unload"), st.booleans()),
    st.tuples(st.just("sleep")),
    st.tuples(st.just("reload"), counts),
    st.tuples(st.just("slow"), st.booleans()),
    st.tuples(st.just("pin"), st.booleans()),
    st.tuples(st.just("gone"), st.booleans()),
    st.tuples(st.just("back"), counts),
    st.tuples(st.just("turn"), st.integers(1, 30)),
)


class Run:
    """One server, those who ask it, and what they hold."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.asking: list[asyncio.Task[Lease]] = []
        self.others: list[asyncio.Task[object]] = []

    def configure(self, count: int) -> None:
        setup = ModelSetup(options={"replica_count": count, "slot_count": 2})
        self.server.catalog.entries["a"] = replace(entry("a"), setup=setup)

    def begin(self, work: Coroutine[Any, Any, object]) -> None:
        self.others.append(asyncio.create_task(work))

    async def load(self, count: int, policy: pb.LoadConflictPolicy.ValueType) -> None:
        options = model_pb2.RuntimeOptions(replica_count=count)
        request = pb.LoadRequest(model="a", runtime_options=options, conflict_policy=policy)
        async with aclosing(self.server.manager.subscribe_load(request)) as stream:
            async for _ in stream:
                pass

    async def step(self, what: str, *how: Any) -> None:
        manager, workers = self.server.manager, self.server.launcher.workers
        match what:
            case "acquire":
                self.asking.append(asyncio.create_task(manager.acquire(how[0])))
            case "release" if self.asking:
                task = self.asking[int(how[0]) % len(self.asking)]
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result().release()
            case "leave" if self.asking:
                self.asking[int(how[0]) % len(self.asking)].cancel()
            case "kill" if workers:
                worker = workers[int(how[0]) % len(workers)]
                worker.die()
                if worker.outcome.done() and not worker.outcome.cancelled():
                    worker.outcome.exception()  # Nobody may be left to look at it.
            case "fail" | "ready" if workers:
                worker = workers[int(how[0]) % len(workers)]
                if worker.frame is not None and not worker.outcome.done():
                    if what == "ready":
                        worker.become_ready()
                    else:
                        worker.fail(make_error(Reason.INSUFFICIENT_MEMORY, "no room"))
            case "load":
                self.begin(self.load(*how))
            case "unload":
                mode = pb.UNLOAD_MODE_FORCE if how[0] else pb.UNLOAD_MODE_DRAIN
                self.begin(manager.unload(pb.UnloadRequest(model="a", mode=mode)))
            case "sleep":
                self.begin(manager.sleep(pb.SleepRequest(model="a")))
            case "reload":
                self.configure(how[0])
                await manager.reload()
            case "pin":
                self.begin(manager.pin(pb.PinRequest(model="a", unpin=how[0])))
            case "gone":
                self.server.catalog.entries.pop("a", None)
                await (manager.reload() if how[0] else scan(manager))
            case "back":
                self.configure(how[0])
                await scan(manager)
            case "slow":
                self.server.launcher.slow = {"a"} if how[0] else set()
            case "turn":
                for _ in range(int(how[0])):
                    await asyncio.sleep(0)
            case _:
                pass

    async def load_all_places(self) -> None:
        """Load `b` in every place there is: none of them is held by nobody."""
        options = model_pb2.RuntimeOptions(replica_count=PLACES)
        request = pb.LoadRequest(
            model="b", runtime_options=options, conflict_policy=pb.LOAD_CONFLICT_POLICY_RELOAD
        )
        async with aclosing(self.server.manager.subscribe_load(request)) as stream:
            async for _ in stream:
                pass

    async def finish(self) -> None:
        """Let everything come to its end; then nothing is held, and nobody waits."""
        manager, launcher = self.server.manager, self.server.launcher
        launcher.slow = set()

        async def help_on() -> None:
            while True:
                for worker in launcher.workers:
                    if worker.frame is not None and not worker.outcome.done() and not worker.exited.done():
                        worker.become_ready()
                for task in self.asking:
                    if task.done() and not task.cancelled() and task.exception() is None:
                        task.result().release()
                await asyncio.sleep(0)

        helping = asyncio.create_task(help_on())
        tasks = {*self.asking, *self.others}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=BOUND_SECONDS)
            assert not late, "everyone is answered in the end"
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        assert all(isinstance(error, PaddockError) for error in errors), errors
        assert not any("\0" in str(error) for error in errors)
        self.configure(2)
        await manager.reload()
        await manager.pin(pb.PinRequest(model="a", unpin=True))
        await manager.unload(pb.UnloadRequest(model="a"))
        await until(lambda: not any(model.lease_count for model in models_of(manager)))
        await asyncio.wait_for(self.load_all_places(), BOUND_SECONDS)
        helping.cancel()
        model = models_of(manager)[0]
        assert (model.state, model.waiting_request_count) == (model_pb2.MODEL_STATE_UNLOADED, 0)
        assert not model.workers


async def run(initial: int, taken: list[tuple[Any, ...]]) -> None:
    policy = RestartPolicy(max_crash_count=2, max_delay_seconds=0.01)
    server = Server("a", "b", models_max=PLACES, patience_seconds=0.01, restart=policy, load_restart=policy)
    playing = Run(server)
    playing.configure(initial)
    async with server:
        for what, *how in taken:
            await playing.step(what, *how)
        await playing.finish()
    assert all(worker.exited.done() for worker in server.launcher.workers)


@settings(max_examples=150, deadline=None)
@given(initial=counts, taken=st.lists(steps, min_size=5, max_size=40))
def test_everyone_is_answered_and_nothing_is_left(initial: int, taken: list[tuple[Any, ...]]) -> None:
    with patch.object(registry, "SCAN_SECONDS", 0):  # How often unknown models are looked for.
        asyncio.run(run(initial, taken))
