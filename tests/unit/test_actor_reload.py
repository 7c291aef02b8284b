"""What a reload of the configuration means for a model in each phase."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddock_server.manager import messages as m
from paddock_server.manager.options import Options, Wish
from paddock_server.manager.state import Phase
from tests.unit.manager_world import DEFAULTS, World

LONGER = replace(DEFAULTS, context_size_tokens=4096)
IDLER = replace(DEFAULTS, idle_timeout_seconds=60.0)


@pytest.fixture
def world() -> World:
    world = World(("a",), models_max=1)
    world.load("a")
    world.calm()
    assert phase(world) is Phase.READY
    return world


def phase(world: World) -> Phase:
    return world.models["a"].state.phase


def options(world: World) -> Options:
    return world.models["a"].state.options


def load_number(world: World) -> int:
    return world.models["a"].state.load_number


def reload(world: World, defaults: Options, *, other_file: bool = False) -> None:
    world.tell("a", m.FileFound(defaults, None, reloading=True, other_file=other_file))
    world.calm()


def test_other_load_options_load_the_model_anew(world: World) -> None:
    before = load_number(world)
    reload(world, LONGER)

    assert (phase(world), options(world), load_number(world)) == (Phase.READY, LONGER, before + 1)


def test_another_file_loads_the_model_anew(world: World) -> None:
    before = load_number(world)
    reload(world, DEFAULTS, other_file=True)

    assert (phase(world), load_number(world)) == (Phase.READY, before + 1)


def test_an_idle_time_out_changes_in_place(world: World) -> None:
    before = load_number(world)
    reload(world, IDLER)

    assert (phase(world), options(world), load_number(world)) == (Phase.READY, IDLER, before)


def test_what_nobody_changed_stays_loaded(world: World) -> None:
    before = load_number(world)
    reload(world, DEFAULTS)

    assert (phase(world), load_number(world)) == (Phase.READY, before)


def test_running_requests_end_before_the_model_is_loaded_anew(world: World) -> None:
    caller = world.acquire("a")
    world.calm()
    reload(world, LONGER)
    assert (phase(world), options(world)) == (Phase.DRAINING, DEFAULTS)

    world.give_back("a", caller)
    world.calm()
    assert (phase(world), options(world)) == (Phase.READY, LONGER)


def test_options_of_a_caller_stay_and_the_others_follow(world: World) -> None:
    world.load("a", Wish({"slot_count": 8}), m.Conflict.RELOAD)
    world.calm()
    reload(world, replace(LONGER, slot_count=2))

    assert (options(world).slot_count, options(world).context_size_tokens) == (8, 4096)
    assert world.remembered["a"] == Wish({"slot_count": 8})


def test_a_load_under_way_ends_and_begins_anew() -> None:
    world = World(("a",), models_max=1)
    caller = world.acquire("a")
    world.tell("a", m.FileFound(LONGER, None, reloading=True))
    while world.models["a"].inbox:
        world.deliver("a")
    world.calm()
    assert (phase(world), options(world)) == (Phase.DRAINING, DEFAULTS)

    world.give_back("a", caller)
    world.calm()
    assert (phase(world), options(world)) == (Phase.READY, LONGER)


def test_a_scan_that_is_no_reload_leaves_loads_alone(world: World) -> None:
    before = load_number(world)
    world.tell("a", m.FileFound(LONGER, None))
    world.calm()

    assert (phase(world), options(world), load_number(world)) == (Phase.READY, DEFAULTS, before)


def test_a_model_that_a_reload_does_not_find_is_drained_and_goes(world: World) -> None:
    caller = world.acquire("a")
    world.calm()
    world.tell("a", m.FileGone(reloading=True))
    world.calm()
    assert phase(world) is Phase.DRAINING

    world.give_back("a", caller)
    world.calm()
    assert "a" not in world.models
