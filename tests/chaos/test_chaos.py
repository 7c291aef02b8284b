"""Whatever happens to workers, to the server, to the hub and to the disk: nothing hangs, nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.checks import Leaks, check_restored, check_round
from tests.chaos.driver import Round
from tests.chaos.oracle import Oracle, read_state
from tests.chaos.world import World, world

log = logging.getLogger("chaos")

SHORT_ROUNDS: Final = 3
ROUND_SECONDS: Final = 900.0
"""The longest a round may take, all its calls at their longest; then something hangs."""

ROUNDS: Final = int(os.environ.get("PADDOCK_CHAOS_ROUNDS") or 30)
"""Of the long form: `make chaos ROUNDS=n`."""

SEED: Final = os.environ.get("PADDOCK_CHAOS_SEED") or str(time.time_ns())
"""Of the long form: another one each time, unless one is to be repeated."""


async def run(made: World, seed: str, rounds: int, *, may_take_long: bool) -> None:
    """Run rounds, the first half of which may end the server, and log figures."""
    oracle, leaks, counts, variant = Oracle(), Leaks(), Counter[str](), 0
    await made.start()
    for number in range(rounds):
        rng = random.Random(f"{seed}-{number}")
        done = Round(made, oracle, rng, variant, number < (rounds + 1) // 2, may_take_long)
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                await _round(done, rng)
            leaks.sample(made)
        except BaseException as error:
            error.add_note(
                f"round {number} of seed {seed} (PADDOCK_CHAOS_SEED={seed} PADDOCK_CHAOS_ROUNDS={rounds}),"
                f" log {made.log}, actions:\n" + "\n".join(done.actions)
            )
            raise
        variant = done.variant
        counts += done.counts
        log.info("round %d: %.1f s, %d notes", number, time.monotonic() - done.began, len(done.actions))
    log.info("seed %s: %d rounds, %d servers, %s", seed, rounds, len(made.server_pids), dict(counts))
    log.info("%s", leaks.check())
    await made.stop()
    await made.client.close()


async def _round(done: Round, rng: random.Random) -> None:
    work = [done.operate(), done.sabotage(), *(done.use(rng.random()) for _ in range(rng.randint(1, 4)))]
    if done.may_kill_server and rng.random() < 0.7:
        work.append(done.end_server())
    await asyncio.gather(*work)
    made = done.world
    made.hub.faults.clear()
    made.empty_disk()
    if done.is_broken:
        done.is_broken = False
        made.configure(done.variant)
    if done.server_ended:
        if done.disk_was_full:
            done.oracle.doubt()
        remembered, _ = read_state(made.state / "loads-0.json")
        await made.start()
        await check_restored(made, remembered, done.variant)
    else:
        await done.call("reload at the end", made.client.reload())
    await check_round(done, rng)


@pytest.mark.timeout(300)
async def test_nothing_is_lost_in_a_few_rounds(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        await run(made, "short", SHORT_ROUNDS, may_take_long=False)


@pytest.mark.slow
@pytest.mark.timeout(0)
async def test_nothing_is_lost_in_many_rounds(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        await run(made, SEED, ROUNDS, may_take_long=True)
