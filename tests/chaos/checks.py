"""What must hold after every round, and over all of them."""

from __future__ import annotations

import asyncio
import fcntl
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import psutil

from paddock.types import ArtifactState, ModelState
from tests.chaos.driver import MODELS, wrong_answer
from tests.chaos.world import ANSWERS, HUB_MODEL, MODELS_MAX, replicas_of
from tests.servers import wait_until

if TYPE_CHECKING:
    import random

    from paddock import Model
    from tests.chaos.driver import Round
    from tests.chaos.oracle import Oracle
    from tests.chaos.world import World

SETTLE_SECONDS: Final = 90.0
"""How long what was begun may go on after a round: a backoff, a download from a hub that had stalled."""

AT_REST: Final = {ModelState.UNLOADED, ModelState.LOADED, ModelState.SLEEPING, ModelState.FAILED}
WITH_WORKER: Final = {ModelState.LOADED, ModelState.SLEEPING}

MORE_DESCRIPTORS: Final = 8
MORE_BYTES: Final = 32 * 1024 * 1024
"""What the server may hold more of in the last rounds than in the first ones it lived through: grpc makes
descriptors and arenas for calls as they come, and keeps them."""


async def settled(world: World) -> dict[str, Model]:
    """Wait until nothing is on its way any more, and return the models by id."""
    async with asyncio.timeout(SETTLE_SECONDS):
        while True:
            models = {model.id: model for model in await world.client.list()}
            shown = sum(len(model.workers) for model in models.values() if model.state in WITH_WORKER)
            if (
                all(model.state in AT_REST for model in models.values())
                and all(model.artifact_state is not ArtifactState.DOWNLOADING for model in models.values())
                and all(model.lease_count == 0 for model in models.values())
                and len(world.workers()) == shown
                and not world.fetchers()
            ):
                return models
            await asyncio.sleep(0.05)


async def check_round(done: Round, rng: random.Random) -> None:
    """Raise when anything is not as it must be."""
    world, oracle = done.world, done.oracle
    models = await settled(world)
    assert done.unexpected == [], done.unexpected
    assert done.unexplained() == [], done.unexplained()
    listed = set(models) - {HUB_MODEL}
    assert listed == set(MODELS), f"listed: {sorted(models)}"
    there = world.check_files(may_be_partial=oracle.partial)
    assert oracle.hub_model in {None, there}, f"the hub's model is there: {there}, not {oracle.hub_model}"
    is_listed = HUB_MODEL in models and models[HUB_MODEL].artifact_state is ArtifactState.DOWNLOADED
    assert is_listed == there, f"the hub's model: listed {is_listed}, there {there}"
    oracle.hub_model = there
    _check_locks(world)
    await _check_answers(done, models, rng)
    state_file = world.state / "loads-0.json"
    with suppress(AssertionError):  # what could not be written is written again, when there is room
        await asyncio.to_thread(wait_until, lambda: not oracle.wrong(state_file), 20)
    assert oracle.wrong(state_file) == []
    oracle.learn(state_file)
    await _check_pins(world, oracle)


async def _check_answers(done: Round, models: dict[str, Model], rng: random.Random) -> None:
    """What is said to be loaded or to sleep answers, rightly; and any model can be loaded."""
    world = done.world
    for model in models.values():
        if model.state in WITH_WORKER:
            wrong = await wrong_answer(world, model.id, rng.choice(ANSWERS), autoload=False)
            assert not wrong, wrong
    model = rng.choice([*MODELS, HUB_MODEL] if HUB_MODEL in models and done.oracle.hub_model else MODELS)
    assert await done.load(model), f"{model} cannot be loaded: {done.unexpected or done.actions[-1]}"
    wrong = await wrong_answer(world, model, rng.choice(ANSWERS), autoload=False)
    assert not wrong, wrong
    alias = f"helper-{done.variant}"
    assert alias in (await world.client.get("helper")).aliases, f"the configuration's {alias} is not known"


async def _check_pins(world: World, oracle: Oracle) -> None:
    for model in MODELS:
        pinned = (await world.client.get(model)).pinned
        assert pinned == oracle.pins.get(model, False), f"{model}: pinned is {pinned}"


async def check_restored(world: World, remembered: list[str], variant: int) -> None:
    """After a restart, what was remembered is loaded, as far as there is room: the latest first."""
    models = await settled(world)
    expected: dict[str, int] = {}
    for model in reversed([model for model in remembered if model in models]):
        expected[model] = replicas_of(model, variant)
        if sum(expected.values()) > MODELS_MAX:
            del expected[model]
            break
    loaded = {model.id: len(model.workers) for model in models.values() if model.state is ModelState.LOADED}
    assert loaded == expected, f"loaded after the restart: {loaded}, remembered: {remembered}"


def _check_locks(world: World) -> None:
    """No process that has ended, and none that rests, holds a lock."""
    for path in (world.cache / ".locks").rglob("*.lock"):
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass
class Leaks:
    """What one server holds, round by round."""

    pid: int = 0
    descriptors: list[int] = field(default_factory=list[int])
    resident_bytes: list[int] = field(default_factory=list[int])

    def sample(self, world: World) -> None:
        """Look at the server. Each worker is three descriptors: its socket, its log, its end."""
        process = psutil.Process(world.server.process.pid)
        if process.pid != self.pid:
            self.pid, self.descriptors, self.resident_bytes = process.pid, [], []
        self.descriptors.append(process.num_fds() - 3 * len(world.workers()))
        self.resident_bytes.append(process.memory_info().rss)

    def check(self) -> str:
        """Return the growth from the first third to the last third, in words. Raise when it is too much."""
        third = max(1, len(self.descriptors) // 3)
        growth = [
            statistics.median(samples[-third:]) - statistics.median(samples[:third])
            for samples in (self.descriptors, self.resident_bytes)
        ]
        text = f"over {len(self.descriptors)} rounds {growth[0]:+g} descriptors, {growth[1] / 1e6:+.1f} MB"
        assert growth[0] <= MORE_DESCRIPTORS, f"{text}: {self.descriptors}"
        assert growth[1] <= MORE_BYTES, f"{text}: {self.resident_bytes}"
        return text
