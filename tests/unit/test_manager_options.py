"""Options of a load: ranges, defaults, and when two loads are the same."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from paddock.errors import InvalidFieldError
from paddock.v1 import model_pb2
from paddock_server.manager import ManagerConfig
from paddock_server.manager.options import (
    Options,
    Wish,
    default_options,
    effective_options,
    load_frame,
    stored_wish,
    wish_of,
)
from paddock_server.worker.v1 import worker_pb2
from tests.unit.manager_fakes import FACTS

CONFIG = ManagerConfig()
OPTIONS = default_options(CONFIG, FACTS)


def test_fields_left_out_take_the_defaults() -> None:
    wish = wish_of(model_pb2.RuntimeOptions(slot_count=9))
    assert wish.filled(OPTIONS) == Options(
        context_size_tokens=2048,
        gpu_layer_count=-1,
        slot_count=9,
        thread_count=0,
        batch_size_tokens=512,
        idle_timeout_seconds=0.0,
    )


def test_an_explicit_zero_keeps_its_meaning() -> None:
    options = model_pb2.RuntimeOptions(context_size_tokens=0, gpu_layer_count=0, idle_timeout=Duration())
    wish = wish_of(options)
    assert wish.values == {"context_size_tokens": 0, "gpu_layer_count": 0}
    assert wish.in_place == {"idle_timeout_seconds": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_size_tokens", -1),
        ("context_size_tokens", (1 << 24) + 1),
        ("gpu_layer_count", -2),
        ("slot_count", 0),
        ("slot_count", 257),
        ("thread_count", -1),
        ("thread_count", 1025),
        ("batch_size_tokens", 31),
        ("batch_size_tokens", 8193),
        ("idle_timeout", -1),
    ],
)
def test_an_option_out_of_range_is_named(field: str, value: int) -> None:
    options: Any = {field: Duration(seconds=value) if field == "idle_timeout" else value}
    with pytest.raises(InvalidFieldError) as caught:
        wish_of(model_pb2.RuntimeOptions(**options))
    (violation,) = caught.value.violations
    assert violation.field == f"runtime_options.{field}"
    assert "must be from" in violation.description


def test_all_options_out_of_range_are_named() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        wish_of(model_pb2.RuntimeOptions(slot_count=0, batch_size_tokens=1))
    assert len(caught.value.violations) == 2


def test_the_default_context_is_no_larger_than_the_slots_can_use() -> None:
    assert default_options(CONFIG, FACTS).context_size_tokens == 4 * 512
    assert default_options(CONFIG, None).context_size_tokens == 8192


def test_conflicts_are_those_fields_that_were_set_and_differ() -> None:
    wish = Wish({"slot_count": 8, "batch_size_tokens": 512})
    assert wish.conflicts(OPTIONS, None) == ("slot_count",)
    assert Wish({}).conflicts(OPTIONS, None) == ()
    assert Wish({}, {"idle_timeout_seconds": 99.0}).conflicts(OPTIONS, None) == ()


def test_agreeing_with_what_the_worker_made_of_an_option_is_agreeing() -> None:
    asked = Wish({"context_size_tokens": 0}).filled(OPTIONS)
    effective = effective_options(asked, worker_pb2.Ready(context_size_tokens=512, thread_count=2))
    for value in (0, 512):
        assert Wish({"context_size_tokens": value}).conflicts(asked, effective) == ()
    assert Wish({"context_size_tokens": 1024}).conflicts(asked, effective) == ("context_size_tokens",)
    assert (effective.thread_count, effective.slot_count) == (2, 4)


def test_the_worker_is_told_every_option() -> None:
    frame = load_frame("/models/a.gguf", OPTIONS, CONFIG)
    unset = [field.name for field in frame.DESCRIPTOR.fields if not getattr(frame, field.name)]
    assert unset == ["thread_count"], "0 is the default: one thread per core"


def test_options_survive_being_stored() -> None:
    stored = {"slot_count": 9, "context_size_tokens": 512, "idle_timeout_seconds": 5, "of_another_version": 1}
    assert stored_wish(stored) == Wish(
        {"slot_count": 9, "context_size_tokens": 512}, {"idle_timeout_seconds": 5.0}
    )


@pytest.mark.parametrize(
    "stored", [{"slot_count": 0}, {"slot_count": "4"}, {"slot_count": True}, {"idle_timeout_seconds": -1}]
)
def test_stored_options_that_make_no_sense_are_refused(stored: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be from"):
        stored_wish(stored)


def test_the_types_of_the_cache_go_the_whole_way() -> None:
    wish = wish_of(model_pb2.RuntimeOptions(cache_type_k="q8_0", cache_type_v="bf16"))
    options = wish.filled(OPTIONS)
    frame = load_frame("/m.gguf", options, CONFIG)
    assert (frame.cache_type_k, frame.cache_type_v) == ("q8_0", "bf16")
    assert options.to_proto().cache_type_k == "q8_0"
    assert stored_wish(wish.values).values["cache_type_v"] == "bf16"
    assert wish.conflicts(OPTIONS, None) == ("cache_type_k", "cache_type_v")


def test_a_cache_type_nobody_knows_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        wish_of(model_pb2.RuntimeOptions(cache_type_v="q9"))
    (violation,) = caught.value.violations
    assert violation.field == "runtime_options.cache_type_v"
    assert "q8_0" in violation.description
    with pytest.raises(ValueError, match="cache_type_k is 8"):
        stored_wish({"cache_type_k": 8})
