"""docs/lifecycle.md against the state machine: its phases, its ways between them, the tests it names."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paddock.errors import Reason
from paddock.v1 import model_pb2
from paddock_server.manager import messages as m
from paddock_server.manager.failure import Failure
from paddock_server.manager.options import Terms
from paddock_server.manager.state import PUBLIC_STATES, ActorState, Cause, Phase
from paddock_server.manager.transitions import step
from tests.unit.manager_world import DEFAULTS, LIMITS, NO_WISH

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")
ARROW = re.compile(r"^ +(\w+) --> (\w+): \S", re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| `(MODEL_STATE_\w+)` \| \S", re.MULTILINE)


def states() -> Iterator[ActorState]:
    """States of every phase, as far as they differ in what an event comes to."""
    plain = ActorState(
        model="a", defaults=DEFAULTS, options=DEFAULTS, ticket=2, stay=2, load_number=3, explicit=True
    )
    for phase, leases, crash_count, closing in product(Phase, (0, 1), (0, 9), (False, True)):
        state = replace(plain, phase=phase, leases=leases, crash_count=crash_count, closing=closing)
        match phase:
            case Phase.SLEEPING:
                yield replace(state, asleep=3)
            case Phase.ADMITTING:
                yield replace(state, explicit=False, waiters=(9,))
                yield replace(state, explicit=False, waiters=(9,), asleep=2, ticket=3)
            case Phase.STARTING:
                yield from (state, replace(state, restarting=True))
            case Phase.DRAINING | Phase.STOPPING:
                for cause in Cause:
                    yield replace(state, cause=cause)
                yield replace(state, cause=Cause.YIELD, next_load=m.NextLoad(DEFAULTS, explicit=True))
            case Phase.UNLOADED | Phase.FAILED:
                yield from (state, replace(state, waiters=(9,)))
                yield replace(state, problem=Failure(Reason.MODEL_CORRUPT, "it is no model"))
            case _:
                yield state


def events() -> Iterator[m.Event]:
    """Every event, in its kinds, for the states above."""
    died, bad, full = (
        Failure(reason, "it failed")
        for reason in (Reason.WORKER_CRASHED, Reason.MODEL_CORRUPT, Reason.QUEUE_FULL)
    )
    yield from (m.LoadAsked(1, NO_WISH), m.AcquireAsked(2, autoload=True), m.CallerLeft(9), m.DemandGone())
    yield from (m.LeaseReturned(3), m.SleepAsked(5), m.TermsSet(Terms(pinned=True)), m.TermsSet(Terms()))
    yield from (m.UnloadAsked(4, force=force, drain_seconds=1) for force in (False, True))
    yield from (m.Admitted(ticket) for ticket in (2, 3))
    yield from (m.AdmissionRefused(ticket, why) for ticket, why in product((2, 3), (bad, full)))
    yield from (m.EvictAsked(2, when_drained=True), m.EvictAsked(2, when_drained=False))
    yield from (m.EvictionRelented(2), m.WorkerReady(3, DEFAULTS), m.WorkerSlept(3))
    yield from (m.StartFailed(3, died), m.StartFailed(3, bad))
    yield from (m.WorkerDied(number, died) for number in (2, 3))
    yield from (m.WorkerReaped(3), m.Resumed(), m.CloseAsked(1))
    yield from (m.TimerFired(timer) for timer in m.Timer)
    yield from (m.FileFound(DEFAULTS, None), m.DefaultsSet(DEFAULTS))
    yield from (m.FileGone(), m.FileGone(reloading=True))


def ways() -> set[tuple[str, str]]:
    """Return the pairs of phases that one event leads from and to."""
    return {
        (state.phase.value, after.value)
        for state, event in product(states(), events())
        if (after := step(state, event, 0.0, LIMITS).state.phase) is not state.phase
    }


def test_every_kind_of_event_is_tried() -> None:
    assert {type(event) for event in events()} == set(m.Event.__args__)


def test_the_diagram_has_every_way_from_phase_to_phase_and_no_other() -> None:
    assert set(ARROW.findall(PAGE)) == ways()


def test_every_phase_can_be_reached_and_left() -> None:
    reached, left = {Phase.UNLOADED.value}, deque([Phase.UNLOADED.value])
    while left:
        at = left.popleft()
        new = {after for before, after in ways() if before == at} - reached
        reached |= new
        left.extend(new)
    assert reached == {phase.value for phase in Phase} == {before for before, _ in ways()}


@pytest.mark.parametrize("phase", list(Phase))
def test_the_page_says_what_the_world_sees_of_a_phase(phase: Phase) -> None:
    assert dict(ROW.findall(PAGE))[phase.value] == model_pb2.ModelState.Name(PUBLIC_STATES[phase])
