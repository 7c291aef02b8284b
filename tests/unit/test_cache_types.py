"""The types of a KV cache: one table, and everybody goes by it."""

from __future__ import annotations

import pytest

from paddock.v1 import model_pb2
from paddock_server.catalog import TENSOR_TYPES
from paddock_server.catalog.configured.keys import KEYS
from paddock_server.config import ConfigError, ServerConfig
from paddock_server.manager import ManagerConfig
from paddock_server.manager.options import wish_of
from paddock_server.memory import CACHE_TYPES, LoadOptions
from paddock_server.worker import llama
from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS, DEFAULT_CACHE_TYPE

OPTIONS = ("cache_type_k", "cache_type_v")
_UNNAMED = {"bf16"}
"""Types whose numbers llama-cpp-python does not export."""


@pytest.mark.parametrize("name", CACHE_TYPE_NUMBERS)
def test_a_type_means_the_same_everywhere(name: str) -> None:
    number = CACHE_TYPE_NUMBERS[name]
    assert TENSOR_TYPES[number].name.lower() == name
    assert CACHE_TYPES[name] is TENSOR_TYPES[number]
    if name not in _UNNAMED:
        assert getattr(llama.bindings, f"GGML_TYPE_{name.upper()}") == number
    both = model_pb2.RuntimeOptions(cache_type_k=name, cache_type_v=name)
    assert wish_of(both).values == dict.fromkeys(OPTIONS, name)
    for option in OPTIONS:
        assert getattr(ServerConfig.load({option: name}), option) == name
        (key,) = (key for key in KEYS if key.name == option)
        assert key.kind.checked(name) == name


def test_nobody_has_another() -> None:
    assert CACHE_TYPES.keys() == CACHE_TYPE_NUMBERS.keys()
    for option in OPTIONS:
        with pytest.raises(ConfigError, match=r"cache-type-. .*'q6_k' is none of f32, f16, bf16, q8_0"):
            ServerConfig.load({option: "q6_k"})
        (key,) = (key for key in KEYS if key.name == option)
        with pytest.raises(ValueError, match="must be one of f32, f16, bf16"):
            key.kind.checked("q6_k")


def test_everybody_takes_the_same_one_when_nobody_says() -> None:
    for options in (ServerConfig.load({}), ManagerConfig(), LoadOptions(1, 1, 1)):
        assert (options.cache_type_k, options.cache_type_v) == (DEFAULT_CACHE_TYPE, DEFAULT_CACHE_TYPE)
