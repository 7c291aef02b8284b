"""Loads that download first, through the whole server: by configuration, called off, over a restart."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.contract.test_downloads import (
    FILE,
    ID,
    NAME,
    REPO,
    Gate,
    content,
    download,
    fetchers,
    hub,
    listed,
    refused,
    server,
    until,
    world,
)
from tests.fakes.behaviour import Behaviour
from tests.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from paddock.transport import GrpcApi
    from tests.fakes.hub import FakeHub

__all__ = ["content", "hub", "world"]  # fixtures

ABSENT, DOWNLOADING, DOWNLOADED = (
    model_pb2.ARTIFACT_STATE_ABSENT,
    model_pb2.ARTIFACT_STATE_DOWNLOADING,
    model_pb2.ARTIFACT_STATE_DOWNLOADED,
)
LOADED = model_pb2.MODEL_STATE_LOADED


def configured(tmp_path: Path, more: str = "", **settings: Any) -> AbstractAsyncContextManager[GrpcApi]:
    """A server whose paddock.toml names the model of the hub `helper`."""
    file = tmp_path / "paddock.toml"
    if not file.exists():
        file.write_text(f'[models.helper]\nhf = "{ID}"\naliases = ["h"]\nparallel = 2\n{more}')
    return server(tmp_path, config_file=file, **settings)


async def load(api: GrpcApi, model: str, **request: Any) -> list[pb.LoadResponse]:
    async with aclosing(api.load(pb.LoadRequest(model=model, **request))) as responses:
        return [response async for response in responses]


async def rest(stream: AsyncGenerator[pb.LoadResponse]) -> list[pb.LoadResponse]:
    return [response async for response in stream]


async def begun(api: GrpcApi, gate: Gate, model: str, **request: Any) -> asyncio.Task[Any]:
    """Call Load and wait until half of the model is there."""
    task = asyncio.create_task(refused(load(api, model, **request)))
    await gate.wait_reached()
    return task


def partial_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("models--*/blobs/*.incomplete"))


async def test_a_configured_model_is_listed_with_its_source_before_it_is_there(
    world: Path, tmp_path: Path, hub: FakeHub
) -> None:
    async with configured(tmp_path) as api:
        shown = await listed(api)
        error = await refused(anext(api.generate(pb.GenerateRequest(model="h", prompt="hi"))))

    assert list(shown) == ["helper"]
    assert (shown["helper"].artifact_state, list(shown["helper"].aliases)) == (ABSENT, ["h"])
    source = shown["helper"].source.hugging_face
    assert (source.repo_id, source.revision, source.file_pattern) == (REPO, "main", "Q4_K_M")
    assert (error.reason, hub.requests) == (Reason.MODEL_NOT_LOADED, [])
    assert "paddock pull helper" in error.message


@pytest.mark.parametrize("name", ["helper", "h"])
async def test_load_of_a_configured_model_downloads_it_and_loads_it_under_its_name(
    world: Path, tmp_path: Path, hub: FakeHub, name: str
) -> None:
    async with configured(tmp_path) as api:
        events = await load(api, name)
        await api.reload(pb.ReloadRequest())
        again = await load(api, name)
        shown = await listed(api)

    stages = [event.progress.stage for event in events if event.progress.HasField("finished")]
    assert stages[:3] == [pb.STAGE_RESOLVE, pb.STAGE_DOWNLOAD, pb.STAGE_VERIFY]
    model = events[-1].loaded.model
    assert (model.id, model.artifact_state, model.runtime_options.slot_count) == ("helper", DOWNLOADED, 2)
    assert again[-1].loaded.already_loaded  # a reload keeps it
    assert shown[ID].state == model_pb2.MODEL_STATE_UNLOADED  # with options of its own it is another model


async def test_download_of_a_configured_model_shows_itself_at_its_name_alone(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    async with configured(tmp_path) as api:
        running = asyncio.create_task(download(api, "helper"))
        await gate.wait_reached()
        half = await until(api, "helper", lambda model: model.download.total_bytes > 0)
        between = await listed(api)
        gate.opened.set()
        end = (await running)[-1].downloaded
        there = await until(api, "helper", lambda model: not model.HasField("download"))

    assert list(between) == ["helper"]
    assert (half.artifact_state, half.download.total_bytes) == (DOWNLOADING, len(content))
    assert (end.id, end.artifact_state, there.artifact_state) == ("helper", DOWNLOADED, DOWNLOADED)


async def test_load_on_startup_downloads_first(world: Path, tmp_path: Path, hub: FakeHub) -> None:
    async with configured(tmp_path, "load_on_startup = true\n") as api:
        assert (await until(api, "helper", lambda model: model.state == LOADED)).artifact_state == DOWNLOADED


async def test_a_preset_names_models_of_the_hub_too(world: Path, tmp_path: Path, hub: FakeHub) -> None:
    preset = tmp_path / "models.ini"
    preset.write_text(f"[helper]\nhf-repo = {REPO}:Q4_K_M\nnp = 3\n")
    async with server(tmp_path, models_preset=preset) as api:
        before = await listed(api)
        model = (await load(api, "helper"))[-1].loaded.model

    assert before["helper"].artifact_state == ABSENT
    assert (model.id, model.runtime_options.slot_count) == ("helper", 3)


async def test_requests_download_a_configured_model_where_the_operator_lets_them(
    world: Path, tmp_path: Path, hub: FakeHub
) -> None:
    async with configured(tmp_path, autoload_downloads=True) as api:
        request = pb.GenerateRequest(model="h", prompt="hi", stop=gen.StopParams(max_tokens=2))
        async with aclosing(api.generate(request)) as responses:
            assert (await anext(responses)).started.model == "helper"


async def test_a_deleted_configured_model_is_one_to_download_again(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    async with configured(tmp_path) as api:
        await load(api, "helper")
        in_use = [await refused(api.delete(pb.DeleteRequest(model=model))) for model in ("h", ID)]
        await api.unload(pb.UnloadRequest(model="h"))
        freed = (await api.delete(pb.DeleteRequest(model="h"))).freed_bytes
        shown = await listed(api)
        again = (await load(api, "helper"))[-1].loaded.model

    assert {error.reason for error in in_use} == {Reason.MODEL_IN_USE}
    assert freed == len(content)
    assert [(model.id, model.artifact_state) for model in shown.values()] == [("helper", ABSENT)]
    assert again.state == LOADED


@pytest.mark.parametrize("name", ["helper", NAME])
async def test_unload_calls_off_a_load_that_downloads_and_pauses_the_download(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes, name: str
) -> None:
    gate = Gate(hub, len(content) // 2)
    start = server if name == NAME else configured
    async with start(tmp_path, autoload_downloads=True) as api:
        callers = [await begun(api, gate, name), asyncio.create_task(refused(load(api, name)))]
        stream = api.generate(pb.GenerateRequest(model=name, prompt="hi"))
        callers.append(asyncio.create_task(refused(anext(stream))))
        shown = ID if name == NAME else name
        await until(api, shown, lambda model: model.download.total_bytes > 0)
        response = await api.unload(pb.UnloadRequest(model=name))
        gate.opened.set()
        errors = await asyncio.gather(*callers)
        again = await api.unload(pb.UnloadRequest(model=name))
        went_on = (await load(api, name))[-1].loaded.model

    assert {error.reason for error in errors} == {Reason.LOAD_ABORTED}
    assert (response.aborted_request_count, response.model.id) == (1, shown)
    assert response.model.download.paused
    assert again.model.download.paused  # twice is as good as once
    assert went_on.state == LOADED


async def test_a_download_that_somebody_asked_for_outlives_the_load_that_is_called_off(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    async with server(tmp_path) as api:
        loading = await begun(api, gate, NAME)
        downloading = asyncio.create_task(download(api))
        await until(api, ID, lambda model: model.download.total_bytes > 0)
        response = await api.unload(pb.UnloadRequest(model=NAME))
        gate.opened.set()
        error = await loading
        end = (await downloading)[-1].downloaded

    assert error.reason == Reason.LOAD_ABORTED
    assert not response.model.download.paused
    assert (end.artifact_state, end.state) == (DOWNLOADED, model_pb2.MODEL_STATE_UNLOADED)


async def test_a_load_that_takes_longer_to_download_than_it_may_ends_for_all_its_callers(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    request = pb.LoadRequest(model=NAME)
    request.load_timeout.FromSeconds(3)
    async with server(tmp_path) as api:
        streams = [api.load(request), api.load(pb.LoadRequest(model=NAME))]
        for stream in streams:
            await anext(stream)
        errors = [await refused(rest(stream)) for stream in streams]
        gate.opened.set()
        await asyncio.to_thread(wait_until, lambda: not fetchers())

    assert {error.reason for error in errors} == {Reason.LOAD_STALLED}
    assert errors[0].metadata["stage"] == "download"


@pytest.mark.parametrize("name", ["helper", NAME])
async def test_a_load_goes_on_after_a_restart_during_its_download(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes, name: str
) -> None:
    gate = Gate(hub, len(content) // 2)
    options = model_pb2.RuntimeOptions(batch_size_tokens=64)
    async with configured(tmp_path) as api:
        waiting = await begun(api, gate, name, runtime_options=options)
        await asyncio.to_thread(wait_until, lambda: partial_bytes(world) > 0)
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    gate.opened.set()

    async with configured(tmp_path) as api:
        model = await until(api, ID if name == NAME else name, lambda model: model.state == LOADED)
    assert model.runtime_options.batch_size_tokens == 64
    assert hub.ranges[-1].startswith("bytes=")


async def test_a_load_that_was_called_off_does_not_come_back(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    async with configured(tmp_path) as api:
        waiting = await begun(api, gate, "helper")
        await api.unload(pb.UnloadRequest(model="helper"))
        await waiting
        gate.opened.set()
    requests = len(hub.requests)
    async with configured(tmp_path) as api:
        shown = (await listed(api))["helper"]
    assert (shown.state, shown.download.paused) == (model_pb2.MODEL_STATE_UNLOADED, True)
    assert len(hub.requests) == requests


async def test_what_an_actor_shows_in_a_watch_has_its_download(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    async with server(tmp_path) as api:
        await load(api, NAME)
        hub.repos[REPO].commit = "c" * 40
        hub.repos[REPO].files[FILE] = content + b"more"
        gate = Gate(hub, hub.served_bytes + len(content) // 2)
        updating = asyncio.create_task(download(api))
        await gate.wait_reached()
        await until(api, ID, lambda model: model.download.total_bytes > 0)
        async with aclosing(api.watch(pb.WatchRequest(models=[ID]))) as events:
            await anext(events)
            await anext(events)
            await api.pin(pb.PinRequest(model=ID))
            pinned = (await anext(events)).changed.model
        gate.opened.set()
        await asyncio.gather(updating, return_exceptions=True)

    assert pinned.pinned
    assert pinned.download.total_bytes > 0


BAD_FILE = Behaviour(fail_load_reason=Reason.UNSUPPORTED_MODEL)


@pytest.mark.parametrize("name", ["helper", NAME])
async def test_a_load_that_downloads_and_then_fails_for_good_is_not_tried_again_at_the_next_start(
    world: Path, tmp_path: Path, hub: FakeHub, name: str
) -> None:
    async with configured(tmp_path, behaviour=BAD_FILE) as api:
        error = await refused(load(api, name))
    async with configured(tmp_path) as api:
        shown = (await listed(api))[ID if name == NAME else name]

    assert error.reason == Reason.UNSUPPORTED_MODEL
    assert (shown.state, shown.artifact_state) == (model_pb2.MODEL_STATE_UNLOADED, DOWNLOADED)


async def test_a_load_that_downloads_and_fails_when_its_caller_has_gone_is_tried_again(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    async with configured(tmp_path, behaviour=BAD_FILE) as api:
        waiting = await begun(api, gate, NAME)
        waiting.cancel()
        await asyncio.wait({waiting})
        gate.opened.set()
        await until(api, ID, lambda model: model.state == model_pb2.MODEL_STATE_FAILED)
    async with configured(tmp_path) as api:
        await until(api, ID, lambda model: model.state == LOADED)
