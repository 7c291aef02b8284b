"""Files that come, grow and go in a model directory, over a real server that nobody asks for them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from paddock.transport import GrpcApi, connect
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server import reloading
from paddock_server.app import serving
from paddock_server.catalog import Catalog
from paddock_server.config import ServerConfig
from paddock_server.reloading import Sources, follow_folders
from tests.fakes.launching import fake_launcher
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

POLL_SECONDS = 0.05


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reloading, "POLL_SECONDS", POLL_SECONDS)
    models = tmp_path / "models"
    models.mkdir()
    make_noise(models / "a.gguf")
    make_noise(tmp_path / "ready.gguf")
    return models


@pytest.fixture
async def watch(directory: Path) -> AsyncGenerator[AsyncIterator[pb.WatchResponse]]:
    """A watch of a model that is not there yet, past `synced`."""
    config = ServerConfig.load(
        {"models_dir": (directory,), "grpc_port": 0, "state_dir": None, "hf_cache": False}, None
    )
    async with serving(config, launcher=fake_launcher()) as server, connect(server.grpc_address) as channel:
        request = pb.WatchRequest(models=["new", "folder/new"])
        async with aclosing(GrpcApi(channel).watch(request)) as events, asyncio.timeout(60):
            assert (await anext(events)).HasField("synced")
            yield events


async def test_watchers_learn_of_a_file_that_comes_and_goes(
    directory: Path, watch: AsyncIterator[pb.WatchResponse]
) -> None:
    (directory.parent / "ready.gguf").rename(directory / "new.gguf")
    assert (await anext(watch)).changed.model.id == "new"
    (directory / "new.gguf").unlink()
    event = await anext(watch)
    while not event.HasField("deleted"):
        assert event.changed.model.artifact_state == model_pb2.ARTIFACT_STATE_ABSENT
        event = await anext(watch)
    assert event.deleted.model == "new"


async def test_a_file_in_a_folder_that_came_later_is_seen(
    directory: Path, watch: AsyncIterator[pb.WatchResponse]
) -> None:
    (directory / "folder").mkdir()
    await asyncio.sleep(POLL_SECONDS * 4)
    make_noise(directory / "folder" / "new.gguf")
    make_noise(directory / "folder" / "other.gguf")
    assert (await anext(watch)).changed.model.id == "folder/new"


async def test_a_file_that_was_broken_while_it_was_copied_is_a_model_once_it_is_whole(
    directory: Path, watch: AsyncIterator[pb.WatchResponse]
) -> None:
    whole = (directory.parent / "ready.gguf").read_bytes()
    with (directory / "new.gguf").open("wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
        broken = (await anext(watch)).changed.model
        assert (broken.id, broken.info.architecture) == ("new", "")
        file.write(whole[len(whole) // 2 :])
    model = (await anext(watch)).changed.model
    assert (model.id, model.info.architecture) == ("new", "llama")


async def test_nothing_is_scanned_at_rest_and_once_after_a_change(directory: Path) -> None:
    catalog = Catalog([directory])
    catalog.scan()
    scans: asyncio.Queue[None] = asyncio.Queue()

    async def rescan() -> None:
        catalog.scan()
        scans.put_nowait(None)

    sources = Sources((), catalog.stamps, rescan)
    follower = asyncio.create_task(follow_folders(sources, 0.01))
    await asyncio.sleep(0.1)
    assert scans.empty()
    make_noise(directory / "new.gguf")
    async with asyncio.timeout(30):
        await scans.get()
    await asyncio.sleep(0.1)
    assert scans.empty(), "no folder more or less is looked at"
    follower.cancel()
