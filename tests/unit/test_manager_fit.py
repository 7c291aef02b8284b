"""What can never fit is refused before anything goes for it: what is loaded serves on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import ModelSetup
from paddock_server.manager.admission import MemoryAdmission
from paddock_server.manager.fitting import too_large
from paddock_server.manager.options import Terms
from paddock_server.memory import RAM
from tests.listing import models_of
from tests.unit.manager_fakes import Server, entry, loads, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

RELOAD = pb.LOAD_CONFLICT_POLICY_RELOAD
LOADED = model_pb2.MODEL_STATE_LOADED
BUDGET = 20_000
"""Bytes. A load of the fakes is predicted to take one for every token of its context, and measured to take
4096."""


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    """`a` and `b`, each with 1,000 tokens of context, in 20,000 bytes; room for four workers."""
    server = Server("a", "b", budget=BUDGET, models_max=4, context_size_tokens=1000)
    async with server:
        yield server


def options(**fields: Any) -> model_pb2.RuntimeOptions:
    return model_pb2.RuntimeOptions(**fields)


async def refused(server: Server, **request: Any) -> PaddockError:
    with pytest.raises(PaddockError) as caught:
        await loads(server.manager, "a", **request)
    assert caught.value.reason == Reason.INSUFFICIENT_MEMORY
    return caught.value


def pids(server: Server, place: int = 0) -> list[int]:
    return [worker.pid for worker in models_of(server.manager)[place].workers]


def assert_untouched(server: Server) -> None:
    """The first worker, of `a`, serves as if nothing had been asked."""
    model = models_of(server.manager)[0]
    assert (model.state, pids(server)) == (LOADED, [1000])
    assert not model.HasField("last_failure")
    assert server.launcher.workers[0].stop_reasons == []


def test_the_limit_that_is_hit_is_named_and_no_other() -> None:
    admission = MemoryAdmission(4, {RAM: 100})
    cost = admission.predicted({RAM: 40}, Terms(), "a")
    assert too_large("a", cost, 2, admission) is None
    bytes_ = too_large("a", cost, 3, admission)
    assert bytes_ is not None
    assert (bytes_.metadata["needed_bytes.RAM"], bytes_.metadata["budget_bytes.RAM"]) == ("120", "100")
    assert "models_max" not in bytes_.message
    places = too_large("a", cost, 6, admission)
    assert places is not None
    assert places.metadata == {"model": "a", "replica_count": "6", "models_max": "4"}
    assert "--models-max" in places.message
    assert "RAM" not in places.message
    alone = too_large("a", admission.predicted({RAM: 101}, Terms(), "a"), 2, admission)
    assert alone is not None
    assert "even when nothing else is loaded" in alone.message
    assert "replica" not in alone.message


async def test_a_reload_that_can_never_fit_leaves_a_pinned_model_serving(server: Server) -> None:
    await loads(server.manager, "a")
    await server.manager.pin(pb.PinRequest(model="a"))
    too_long = options(context_size_tokens=32_000)
    error = await refused(server, runtime_options=too_long, conflict_policy=RELOAD)
    assert "even when nothing else is loaded" in error.message
    assert_untouched(server)
    (await server.manager.acquire("a")).release()
    fits = options(context_size_tokens=2000)
    loaded = await loads(server.manager, "a", runtime_options=fits, conflict_policy=RELOAD)
    assert loaded[-1].loaded.model.runtime_options.context_size_tokens == 2000


@pytest.mark.parametrize("count", [6, 2])
async def test_more_replicas_than_can_ever_fit_evict_nobody(server: Server, count: int) -> None:
    await loads(server.manager, "a")
    await loads(server.manager, "b")
    context = 1000 if count == 6 else 12_000
    asked = options(replica_count=count, context_size_tokens=context)
    error = await refused(server, runtime_options=asked, conflict_policy=RELOAD)
    assert ("models_max" in error.message) is (count == 6)
    assert_untouched(server)
    assert pids(server, 1) == [1001]
    assert models_of(server.manager)[0].runtime_options.replica_count == 1


async def test_more_replicas_than_can_ever_fit_of_a_model_at_rest_evict_nobody(server: Server) -> None:
    await loads(server.manager, "b")
    error = await refused(server, runtime_options=options(replica_count=6))
    assert error.metadata["models_max"] == "4"
    assert pids(server, 1) == [1000]
    await loads(server.manager, "a")
    assert models_of(server.manager)[0].runtime_options.replica_count == 1


async def test_as_many_replicas_as_fit_are_loaded_and_joined(server: Server) -> None:
    four = options(replica_count=4)
    loaded = await loads(server.manager, "a", runtime_options=four)
    assert len(loaded[-1].loaded.model.workers) == 4
    again = await loads(server.manager, "a", runtime_options=four)
    assert again[-1].loaded.already_loaded


@pytest.mark.parametrize("setup", [{"context_size_tokens": 32_000}, {"replica_count": 6}])
async def test_a_configuration_that_can_never_fit_is_reported_and_the_model_serves_on(
    server: Server, setup: dict[str, int]
) -> None:
    await loads(server.manager, "a")
    server.catalog.entries["a"] = replace(entry("a"), setup=ModelSetup(options=setup))
    response = await server.manager.reload()
    (problem,) = response.problems
    assert "stays loaded as it is" in problem.message
    await server.manager.pin(pb.PinRequest(model="a"))  # By now all has been read.
    assert_untouched(server)
    server.catalog.entries["a"] = replace(
        entry("a"), setup=ModelSetup(options={"context_size_tokens": 2000}), modified_ns=2
    )
    response = await server.manager.reload()
    assert not response.problems
    await until(lambda: pids(server) == [1001])
