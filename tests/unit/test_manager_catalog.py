"""Models come, change and go on disk; loads name their source."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import InvalidFieldError, ModelNotFoundError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.catalog import CatalogError, CatalogProblem
from paddock_server.manager import registry
from tests.listing import models_of
from tests.unit.manager_fakes import Server, entry, loads, scan, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

PROBLEM = CatalogProblem(Reason.MODEL_CORRUPT, "bad.gguf: no magic (byte 0)", {"file": "bad.gguf"})


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Server]:
    monkeypatch.setattr(registry, "SCAN_SECONDS", 0.0)
    async with Server("a", "b") as running:
        yield running


def local(path: str) -> model_pb2.ModelSource:
    return model_pb2.ModelSource(local=model_pb2.LocalSource(path=path))


def ids(server: Server) -> list[str]:
    return [model.id for model in models_of(server.manager)]


async def test_a_file_dropped_into_the_directory_is_found_when_asked_for(server: Server) -> None:
    server.catalog.entries["new"] = entry("new")
    async with await server.manager.acquire("new") as lease:
        assert lease.model_id == "new"
    assert ids(server) == ["a", "b", "new"]


async def test_requests_for_unknown_models_share_their_scans(server: Server) -> None:
    before = server.catalog.scan_count
    results = await asyncio.gather(
        *(server.manager.acquire("unknown") for _ in range(50)), return_exceptions=True
    )
    assert all(isinstance(result, ModelNotFoundError) for result in results)
    assert server.catalog.scan_count - before <= 2


async def test_scans_that_requests_cause_are_a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async with Server("a") as server:
        monkeypatch.setattr(asyncio, "sleep", noted)
        with pytest.raises(ModelNotFoundError):
            await server.manager.acquire("unknown")
        monkeypatch.undo()
    assert 0.5 < max(slept) <= 1.0


async def test_a_directory_that_cannot_be_listed_changes_nothing(server: Server) -> None:
    server.catalog.fault = CatalogError("models_dir", "'/models' cannot be listed: gone")
    with pytest.raises(ModelNotFoundError):
        await server.manager.acquire("unknown")
    with pytest.raises(PaddockError) as caught:
        await server.manager.reload()
    assert caught.value.reason == Reason.INVALID_CONFIG
    assert ids(server) == ["a", "b"]


async def test_a_model_whose_file_has_gone_disappears(server: Server) -> None:
    async with aclosing(server.manager.watch(pb.WatchRequest(models=["a"]))) as stream:
        await anext(stream)
        await anext(stream)
        del server.catalog.entries["a"]
        await scan(server.manager)
        changes = [await anext(stream), await anext(stream)]
    assert changes[0].changed.model.artifact_state == model_pb2.ARTIFACT_STATE_ABSENT
    assert changes[1].deleted.model == "a"
    assert ids(server) == ["b"]
    with pytest.raises(ModelNotFoundError):
        await server.manager.acquire("a")


async def test_a_loaded_model_whose_file_has_gone_serves_until_it_is_unloaded(server: Server) -> None:
    await loads(server.manager, "a")
    del server.catalog.entries["a"]
    await scan(server.manager)
    async with await server.manager.acquire("a"):
        pass
    response = await server.manager.unload(pb.UnloadRequest(model="a"))
    assert response.model.state == model_pb2.MODEL_STATE_UNLOADED
    await until(lambda: ids(server) == ["b"])


async def test_a_model_that_comes_back_is_a_new_one(server: Server) -> None:
    old = server.catalog.entries.pop("a")
    await loads(server.manager, "a")
    await scan(server.manager)
    await server.manager.unload(pb.UnloadRequest(model="a"))
    server.catalog.entries["a"] = old
    async with await server.manager.acquire("a"):
        pass


async def test_a_file_that_changes_is_one_change_to_watchers(server: Server) -> None:
    before = server.manager.listing().revision
    server.catalog.entries["a"] = replace(server.catalog.entries["a"], size_bytes=77)
    await scan(server.manager)
    await until(lambda: models_of(server.manager)[0].size_bytes == 77)
    assert server.manager.listing().revision == before + 1


async def test_a_file_with_a_problem_fails_with_it_and_starts_no_worker(server: Server) -> None:
    server.catalog.entries["bad"] = entry("bad", problem=PROBLEM)
    for call in (loads(server.manager, "bad"), server.manager.acquire("bad")):
        with pytest.raises(PaddockError) as caught:
            await call
        assert caught.value.reason == Reason.MODEL_CORRUPT
        assert caught.value.metadata["file"] == "bad.gguf"
    assert not server.launcher.workers
    model = await server.manager.snapshot("bad")
    assert (model.state, model.last_failure.reason) == (
        model_pb2.MODEL_STATE_FAILED,
        Reason.MODEL_CORRUPT,
    )


async def test_a_file_that_was_replaced_is_loaded_by_the_next_request(server: Server) -> None:
    server.catalog.entries["bad"] = entry("bad", problem=PROBLEM)
    with pytest.raises(PaddockError):
        await server.manager.acquire("bad")
    server.catalog.touch("bad")
    async with await server.manager.acquire("bad"):
        pass


async def test_a_file_the_worker_found_bad_is_not_tried_again_until_it_changes(server: Server) -> None:
    server.launcher.slow.add("a")
    request = asyncio.create_task(server.manager.acquire("a"))
    (await server.launcher.worker()).fail(make_error(Reason.MODEL_CORRUPT, "tensor 'x' is cut off"))
    await asyncio.wait([request])
    assert request.exception() is not None
    server.launcher.slow.clear()
    with pytest.raises(PaddockError) as caught:
        await server.manager.acquire("a")
    assert caught.value.reason == Reason.MODEL_CORRUPT
    assert len(server.launcher.workers) == 1
    server.catalog.touch("a")
    async with await server.manager.acquire("a"):
        pass


async def test_a_source_that_matches_is_accepted(server: Server) -> None:
    events = await loads(server.manager, "a", source=local("a.gguf"))
    assert events[-1].HasField("loaded")


@pytest.mark.parametrize(
    ("source", "field"),
    [
        pytest.param(local("b.gguf"), "source.local.path", id="another model's"),
        pytest.param(local("nowhere.gguf"), "source.local.path", id="nobody's"),
        pytest.param(model_pb2.ModelSource(), "source", id="empty"),
    ],
)
async def test_a_source_that_does_not_match_names_its_field(
    server: Server, source: model_pb2.ModelSource, field: str
) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        await loads(server.manager, "a", source=source)
    assert caught.value.violations[0].field == field
    assert not server.launcher.workers


async def test_a_server_without_the_hub_s_cache_refuses_a_source_of_the_hub(server: Server) -> None:
    source = model_pb2.ModelSource(hugging_face=model_pb2.HuggingFaceSource(repo_id="x/y"))
    with pytest.raises(PaddockError) as caught:
        await loads(server.manager, "a", source=source)
    assert caught.value.reason == Reason.NOT_IMPLEMENTED


async def test_a_model_deeper_than_a_scan_looks_is_found_by_its_path(server: Server) -> None:
    server.catalog.hidden["deep"] = replace(entry("deep"), relative_path="x/y/deep.gguf")
    with pytest.raises(ModelNotFoundError):
        await loads(server.manager, "deep")
    events = await loads(server.manager, "deep", source=local("x/y/deep.gguf"))
    assert events[-1].loaded.model.source.local.path == "x/y/deep.gguf"
    await scan(server.manager)
    assert "deep" in ids(server), "it stays known"
    server.catalog.hidden.clear()
    await scan(server.manager)
    await server.manager.unload(pb.UnloadRequest(model="deep"))
    await until(lambda: "deep" not in ids(server))


async def test_bad_options_are_refused_before_anything_is_looked_for(server: Server) -> None:
    before = server.catalog.scan_count
    options: Any = model_pb2.RuntimeOptions(slot_count=0)
    with pytest.raises(InvalidFieldError):
        await loads(server.manager, "unknown", runtime_options=options)
    assert server.catalog.scan_count == before
