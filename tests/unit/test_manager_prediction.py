"""What loads are predicted to take, and what a load learns from the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from paddock_server.catalog import Catalog, ModelSetup
from paddock_server.config import ConfigError, ServerConfig
from paddock_server.manager import ManagerConfig, Measurements, MemoryPredictor
from paddock_server.manager.options import NO_WISH, Wish, default_options
from paddock_server.manager.prediction import are_slots_set
from paddock_server.memory import RAM, Placement
from tests.models import make_noise

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry

MIB = 1 << 20


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> CatalogEntry:
    directory = tmp_path_factory.mktemp("models")
    make_noise(directory / "noise.gguf")
    return Catalog([directory]).scan()["noise"]


def predictor(
    budget: int = 1 << 40,
    measurements: Measurements | None = None,
    *,
    placement: Placement | None = None,
    version: str = "1",
) -> MemoryPredictor:
    return MemoryPredictor(
        placement or Placement(), lambda: {RAM: budget}, measurements or Measurements(None), version=version
    )


def test_a_longer_context_is_predicted_to_take_more(entry: CatalogEntry) -> None:
    options = replace(default_options(ManagerConfig(), entry.facts), context_size_tokens=1024)
    short = predictor(1 << 40).predict(entry, options)
    long = predictor(1 << 40).predict(entry, replace(options, context_size_tokens=8192))
    assert entry.size_bytes < short.device_bytes[RAM] < long.device_bytes[RAM]
    assert short.options == options


def test_a_context_left_open_becomes_the_largest_that_fits(entry: CatalogEntry) -> None:
    options = replace(default_options(ManagerConfig(), entry.facts), context_size_tokens=0)
    everything = predictor(1 << 40).predict(entry, options)
    assert entry.facts is not None
    assert everything.options.context_size_tokens == entry.facts.trained_context_tokens
    little = everything.device_bytes[RAM] - 256 * 1024
    tight = predictor(little).predict(entry, options)
    assert 0 < tight.options.context_size_tokens < everything.options.context_size_tokens
    assert tight.device_bytes[RAM] <= little


def test_a_context_left_open_leaves_room_for_the_other_replicas(entry: CatalogEntry) -> None:
    options = replace(default_options(ManagerConfig(), entry.facts), context_size_tokens=0)
    whole = predictor(1 << 40).predict(entry, options).device_bytes[RAM]
    budget = 3 * (whole - 256 * 1024)
    alone = predictor(budget).predict(entry, options)
    three = predictor(budget).predict(entry, replace(options, replica_count=3))
    assert 0 < three.options.context_size_tokens < alone.options.context_size_tokens
    assert 3 * three.device_bytes[RAM] <= budget


def test_sequences_are_given_up_for_a_context_unless_somebody_has_set_them(entry: CatalogEntry) -> None:
    options = replace(default_options(ManagerConfig(), entry.facts), context_size_tokens=0, slot_count=256)
    kept = predictor(1).predict(entry, options, keeps_slots=True)
    given_up = predictor(kept.device_bytes[RAM] - 1).predict(entry, options)
    assert given_up.options.slot_count < kept.options.slot_count == 256
    assert given_up.device_bytes[RAM] < kept.device_bytes[RAM]


def test_sequences_count_as_set_by_a_call_or_by_the_configuration_of_the_model(entry: CatalogEntry) -> None:
    configured = replace(entry, setup=ModelSetup(options={"slot_count": 2}))
    assert not are_slots_set(entry, Wish({"context_size_tokens": 5}))
    assert are_slots_set(entry, Wish({"slot_count": 4}))
    assert are_slots_set(configured, NO_WISH)


def test_what_was_measured_takes_the_place_of_the_prediction_for_the_same_load(entry: CatalogEntry) -> None:
    options = default_options(ManagerConfig(), entry.facts)
    one = predictor()
    before = one.predict(entry, options)
    assert one.measured(entry, options) == {}
    one.learn(before, 77 * MIB)
    one.learn(before, 70 * MIB)
    assert one.predict(entry, options).device_bytes == one.measured(entry, options) == {RAM: 77 * MIB}
    assert one.predict(entry, replace(options, slot_count=9)).device_bytes != {RAM: 77 * MIB}
    assert one.measured(replace(entry, modified_ns=0), options) == {}
    assert one.measured(entry, replace(options, idle_timeout_seconds=5)) == {RAM: 77 * MIB}


def test_a_process_that_is_gone_teaches_nothing(entry: CatalogEntry) -> None:
    options = default_options(ManagerConfig(), entry.facts)
    one = predictor()
    one.learn(one.predict(entry, options), 0)
    assert one.measured(entry, options) == {}


def test_what_is_measured_is_of_the_files_that_were_loaded_and_not_of_those_there_are_now(
    entry: CatalogEntry,
) -> None:
    options = default_options(ManagerConfig(), entry.facts)
    one = predictor()
    loaded = one.predict(entry, options)
    one.learn(loaded, 77 * MIB)
    assert one.measured(replace(entry, modified_ns=entry.modified_ns + 1), options) == {}


@pytest.mark.parametrize(
    "other",
    [
        {"version": "2"},
        {"placement": Placement(gpus=("CUDA0",), gpu_free_bytes=(1 << 40,))},
        {"placement": Placement(repacked_types=frozenset({"Q4_0"}))},
    ],
)
def test_what_another_release_or_machine_measured_does_not_count(
    entry: CatalogEntry, other: dict[str, Any]
) -> None:
    options = default_options(ManagerConfig(), entry.facts)
    measurements = Measurements(None)
    one = predictor(measurements=measurements)
    one.learn(one.predict(entry, options), 77 * MIB)
    assert predictor(measurements=measurements).measured(entry, options) == {RAM: 77 * MIB}
    assert predictor(measurements=measurements, **other).measured(entry, options) == {}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("RAM=1024", {"RAM": 1024}),
        ("RAM=2GiB", {"RAM": 2 << 30}),
        ("RAM=2gb, CUDA0=1.5k", {"RAM": 2_000_000_000, "CUDA0": 1536}),
        ("RAM=3T", {"RAM": 3 << 40}),
        ("", {}),
    ],
)
def test_a_budget_is_read_by_device_and_unit(text: str, budget: dict[str, int]) -> None:
    assert dict(ServerConfig.load({"memory_budget": text}).memory_budget) == budget


@pytest.mark.parametrize("text", ["RAM", "RAM=", "=5", "RAM=five", "RAM=-1", "RAM=1 PiB"])
def test_a_budget_that_cannot_be_read_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory-budget .*RAM=24GiB"):
        ServerConfig.load({"memory_budget": text})
