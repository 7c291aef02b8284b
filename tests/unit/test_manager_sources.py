"""What the manager makes of the catalog's entries."""

from __future__ import annotations

from dataclasses import replace

from paddock.errors import Reason
from paddock_server.catalog import CatalogEntry, CatalogError, InvalidConfigError, ModelSetup, Place, Problem
from paddock_server.manager import ManagerConfig
from paddock_server.manager.options import default_options
from paddock_server.manager.sources import MAX_NAMED, first_that_fit, other_file, reload_error, startup_loads
from tests.unit.manager_fakes import FACTS, entry


def wanted(model: str, priority: int = 0) -> CatalogEntry:
    return replace(entry(model), setup=ModelSetup(load_on_startup=True, priority=priority))


def test_the_highest_priorities_are_loaded_at_the_start_as_far_as_there_is_room() -> None:
    entries = [wanted("a"), wanted("b", 5), entry("c"), wanted("d", 1), wanted("kept")]

    assert startup_loads(entries, {"kept": 1}, 3) == (["b", "d"], ["a"])


def test_every_replica_takes_a_place_at_the_start() -> None:
    two = replace(entry("two"), setup=ModelSetup(load_on_startup=True, options={"replica_count": 2}))

    assert startup_loads([two, wanted("b")], {}, 2) == (["two"], ["b"])
    assert startup_loads([two, wanted("b")], {"kept": 2}, 3) == ([], ["two", "b"])
    assert first_that_fit({"latest": 1, "large": 2, "small": 1}, 2) == ["latest"]


def test_without_a_limit_everything_wanted_is_loaded_at_the_start() -> None:
    assert startup_loads([wanted("a"), wanted("b")], {}, 0) == (["a", "b"], [])


def test_only_what_a_worker_reads_makes_another_file() -> None:
    known = entry("a")

    assert not other_file(known, replace(known, setup=ModelSetup(tags=("x",))))
    assert other_file(known, replace(known, modified_ns=known.modified_ns + 1))


def test_options_of_a_setup_go_over_those_of_the_server() -> None:
    setup = ModelSetup(options={"slot_count": 2}, idle_timeout_seconds=7.0)
    options = default_options(ManagerConfig(), FACTS, setup)

    assert (options.slot_count, options.idle_timeout_seconds, options.thread_count) == (2, 7.0, 0)
    assert options.context_size_tokens == 2 * 512  # what two slots of the trained context can use


def test_a_context_that_a_setup_names_is_taken_as_it_is() -> None:
    setup = ModelSetup(options={"context_size_tokens": 100_000})

    assert default_options(ManagerConfig(), FACTS, setup).context_size_tokens == 100_000


def test_the_error_of_a_reload_names_places_and_stays_bounded() -> None:
    problems = [Problem(Place("f.toml", line), "k", "is wrong") for line in range(1, 101)]
    error = reload_error(InvalidConfigError([Problem(Place("f", 0), "", "a warning", False), *problems]))

    assert (error.reason, error.metadata["line"]) == (Reason.INVALID_CONFIG, "1")
    assert error.message.count("is wrong") == MAX_NAMED
    assert error.message.endswith("and 90 more")
    assert "models_dir" in reload_error(CatalogError("models_dir", "is gone")).message
