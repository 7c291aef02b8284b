"""Downloads through the whole server: real gRPC, real fetcher processes, a hub on loopback, fake workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.app import serving
from paddock_server.catalog import parse_hub_name
from paddock_server.config import ServerConfig
from paddock_server.downloads.process import FetcherCrashedError, FetcherLauncher, FetcherStalledError
from paddock_server.downloads.removal import remove_model
from paddock_server.manager import deletion as deletion_module
from tests.fakes.hub import FakeHub, Fault, Repo, digest_of, running_hub
from tests.fakes.launching import fake_launcher
from tests.models import make_noise
from tests.servers import wait_until

if TYPE_CHECKING:
    from paddock_server.downloads.messages import Message
    from tests.fakes.behaviour import Behaviour

REPO = "org/noise-GGUF"
FILE = "noise-Q4_K_M.gguf"
ID = f"{REPO}:Q4_K_M"
NAME = f"hf:{ID}"
WAY_OUT_SECONDS = 40.0


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (file,) = make_noise(tmp_path_factory.mktemp("noise") / "noise.gguf")
    return file.read_bytes()


@pytest.fixture
def hub(content: bytes) -> Generator[FakeHub]:
    with running_hub() as hub:
        hub.repos[REPO] = Repo({FILE: content, "README.md": b"# noise"})
        yield hub


class Gate:
    """Holds the hub up once it has sent so many bytes, until it is opened."""

    def __init__(self, hub: FakeHub, at_bytes: int) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self._hub = hub
        self._at_bytes = at_bytes
        hub.block_gate = self._wait

    def _wait(self, served_bytes: int) -> None:
        if served_bytes >= self._at_bytes:
            self.reached.set()
            self.opened.wait(WAY_OUT_SECONDS)

    async def wait_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, WAY_OUT_SECONDS)


@pytest.fixture
def world(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a server; the path is the hub's cache."""
    cache = tmp_path / "hub"
    roots = os.pathsep.join(str(Path(root)) for root in os.environ.get("PYTHONPATH", "").split(os.pathsep))
    monkeypatch.setenv("PYTHONPATH", roots)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return cache


@asynccontextmanager
async def server(
    tmp_path: Path,
    config_file: Path | None = None,
    behaviour: Behaviour | None = None,
    **settings: Any,
) -> AsyncGenerator[GrpcApi]:
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    values = {"models_dir": (empty,), "grpc_port": 0, "state_dir": tmp_path / "state", "drain_seconds": 5}
    config = ServerConfig.load(values | settings, config_file)
    async with (
        serving(config, launcher=fake_launcher(behaviour)) as running,
        connect(running.grpc_address) as channel,
    ):
        yield GrpcApi(channel)


@pytest.fixture
async def api(world: Path, tmp_path: Path) -> AsyncGenerator[GrpcApi]:
    async with server(tmp_path) as api:
        yield api


async def download(api: GrpcApi, name: str = NAME) -> list[pb.DownloadResponse]:
    async with aclosing(api.download(pb.DownloadRequest(model=name))) as responses:
        return [response async for response in responses]


async def refused(work: Any) -> PaddockError:
    with pytest.raises(PaddockError) as caught:
        await work
    return caught.value


async def listed(api: GrpcApi) -> dict[str, model_pb2.Model]:
    return {model.id: model for model in (await api.list(pb.ListRequest())).models}


async def until(api: GrpcApi, model: str, condition: Callable[[model_pb2.Model], bool]) -> model_pb2.Model:
    """Wait for what the watch shows of a model."""
    async with (
        asyncio.timeout(WAY_OUT_SECONDS),
        aclosing(api.watch(pb.WatchRequest(models=[model]))) as events,
    ):
        async for event in events:
            if event.HasField("changed") and condition(event.changed.model):
                return event.changed.model
    raise AssertionError(model)


def fetchers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "paddock_server.downloads.fetcher" in child.cmdline()
    ]


async def test_a_download_streams_its_stages_and_ends_with_the_model(api: GrpcApi, content: bytes) -> None:
    responses = await download(api)

    stages = [response.progress.stage for response in responses if response.progress.HasField("finished")]
    assert stages == [pb.STAGE_RESOLVE, pb.STAGE_DOWNLOAD, pb.STAGE_VERIFY]
    model = responses[-1].downloaded
    assert model.id == ID
    assert model.artifact_state == model_pb2.ARTIFACT_STATE_DOWNLOADED
    assert model.size_bytes == len(content)
    assert model.source.hugging_face.repo_id == REPO
    assert model.source.hugging_face.revision == "a" * 40
    assert model.source.hugging_face.file_pattern == FILE
    assert model.info.architecture == "llama"
    assert list(await listed(api)) == [ID]


async def test_a_load_of_a_hub_name_downloads_first_and_shows_every_stage(api: GrpcApi, hub: FakeHub) -> None:
    async with aclosing(api.load(pb.LoadRequest(model=f"hf:{REPO}"))) as responses:
        events = [response async for response in responses]

    began = [event.progress.stage for event in events if event.progress.HasField("started")]
    assert list(dict.fromkeys(began))[:5] == [
        pb.STAGE_RESOLVE, pb.STAGE_DOWNLOAD, pb.STAGE_VERIFY, pb.STAGE_ADMIT, pb.STAGE_SPAWN,
    ]  # fmt: skip
    assert events[-1].loaded.model.id == ID
    requests = len(hub.requests)
    async with aclosing(api.load(pb.LoadRequest(model=NAME))) as responses:
        assert [response async for response in responses][-1].loaded.already_loaded
    assert len(hub.requests) == requests  # what is there is not asked for


async def test_a_source_means_the_same_as_its_name(api: GrpcApi) -> None:
    source = model_pb2.ModelSource()
    source.hugging_face.repo_id, source.hugging_face.file_pattern = REPO, "*q4_k_m*"
    wrong = await refused(anext(api.load(pb.LoadRequest(model="mine", source=source))))
    source.hugging_face.file_pattern = "q4_k_m"
    async with aclosing(api.load(pb.LoadRequest(model=ID, source=source))) as responses:
        loaded = [response async for response in responses][-1].loaded

    assert (wrong.reason, wrong.violations[0].field) == (Reason.INVALID_FIELD, "model")
    assert loaded.model.id == ID


@pytest.fixture
async def downloading_api(world: Path, tmp_path: Path) -> AsyncGenerator[GrpcApi]:
    """A server whose requests may download."""
    async with server(tmp_path, autoload_downloads=True) as api:
        yield api


@pytest.mark.parametrize("policy", [pb.AUTOLOAD_POLICY_UNSPECIFIED, pb.AUTOLOAD_POLICY_LOAD])
async def test_a_request_begins_no_download_unless_the_operator_lets_it(
    api: GrpcApi, hub: FakeHub, policy: pb.AutoloadPolicy.ValueType
) -> None:
    generate = pb.GenerateRequest(model=NAME, prompt="hi", autoload_policy=policy)
    embed = pb.EmbedRequest(model=NAME, texts=["hi"], autoload_policy=policy)
    errors = [await refused(anext(api.generate(generate))), await refused(api.embed(embed))]

    assert [error.reason for error in errors] == [Reason.MODEL_NOT_LOADED] * 2
    assert f"paddock pull {ID}" in errors[0].message
    assert (hub.requests, await listed(api)) == ([], {})


async def test_a_request_waits_for_a_download_that_somebody_has_begun(
    api: GrpcApi, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    running = asyncio.create_task(download(api))
    await gate.wait_reached()
    request = pb.GenerateRequest(model=NAME, prompt="hi", stop=gen.StopParams(max_tokens=2))
    stream = api.generate(request)
    waiting = asyncio.ensure_future(anext(stream))
    await listed(api)  # by now the request is there, or comes when the model is: it is answered either way
    gate.opened.set()

    assert (await waiting).started.model == ID
    await running
    await stream.aclose()


@pytest.mark.parametrize("limit", ["queue_limit", "total_queue_limit"])
async def test_no_more_requests_wait_for_a_download_than_for_a_load(
    world: Path, tmp_path: Path, hub: FakeHub, content: bytes, limit: str
) -> None:
    settings: dict[str, Any] = {limit: 2}
    async with server(tmp_path, **settings) as api:
        gate = Gate(hub, len(content) // 2)
        running = asyncio.create_task(download(api))
        await gate.wait_reached()
        embed = pb.EmbedRequest(model=NAME, texts=["hi"])
        waiting = [asyncio.create_task(api.embed(embed)) for _ in range(3)]
        await asyncio.wait(waiting, timeout=WAY_OUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        ended = [task.exception() for task in waiting if task.done()]
        gate.opened.set()
        await running
        await asyncio.gather(*waiting, return_exceptions=True)

    assert [error.reason for error in ended if isinstance(error, PaddockError)] == [Reason.QUEUE_FULL]


async def test_a_request_loads_a_hub_name_unless_it_may_not(downloading_api: GrpcApi, hub: FakeHub) -> None:
    api = downloading_api
    request = pb.GenerateRequest(model=NAME, prompt="hi", stop=gen.StopParams(max_tokens=2))
    request.autoload_policy = pb.AUTOLOAD_POLICY_FAIL
    error = await refused(anext(api.generate(request)))
    assert (error.reason, hub.requests) == (Reason.MODEL_NOT_LOADED, [])

    request.autoload_policy = pb.AUTOLOAD_POLICY_LOAD
    async with aclosing(api.generate(request)) as responses:
        events = [response async for response in responses]
    assert events[0].started.model == ID
    assert events[-1].HasField("generated")


async def test_ten_callers_share_one_download_and_one_who_leaves_takes_it_from_nobody(
    api: GrpcApi, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    streams = [api.download(pb.DownloadRequest(model=NAME)) for _ in range(10)]
    for stream in streams:
        await anext(stream)
    await gate.wait_reached()
    shown = (await listed(api))[ID]
    assert len(fetchers()) == 1
    await streams[0].aclose()
    gate.opened.set()

    async def end(stream: AsyncGenerator[pb.DownloadResponse]) -> pb.DownloadResponse:
        return [response async for response in stream][-1]

    ends = await asyncio.gather(*(end(stream) for stream in streams[1:]))
    assert shown.artifact_state == model_pb2.ARTIFACT_STATE_DOWNLOADING
    assert shown.download.total_bytes == len(content)
    assert {end.downloaded.SerializeToString() for end in ends} == {ends[0].downloaded.SerializeToString()}
    assert hub.served_bytes == len(content)


async def test_a_paused_download_stays_listed_and_goes_on_from_its_bytes(
    api: GrpcApi, hub: FakeHub, content: bytes, world: Path
) -> None:
    gate = Gate(hub, len(content) // 2)
    waiting = asyncio.create_task(refused(download(api)))
    await gate.wait_reached()
    partial = world / "models--org--noise-GGUF" / "blobs" / f"{digest_of(content)}.incomplete"
    await asyncio.to_thread(wait_until, lambda: partial.exists() and partial.stat().st_size > 0)
    pause = pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_PAUSE)
    paused = (await api.stop_download(pause)).model
    error = await waiting
    gate.opened.set()
    there = partial.stat().st_size

    assert paused.download.paused
    assert paused.artifact_state == model_pb2.ARTIFACT_STATE_ABSENT
    assert (await api.stop_download(pause)).model.download.paused  # twice is as good as once
    assert error.reason == Reason.LOAD_ABORTED
    assert fetchers() == []
    assert there > 0
    assert (await download(api))[-1].downloaded.id == ID
    assert hub.ranges[-1] == f"bytes={there}-"


async def test_a_request_waits_for_a_download_that_runs_and_resumes_none_that_was_paused(
    downloading_api: GrpcApi, hub: FakeHub, content: bytes
) -> None:
    api = downloading_api

    async def generate(model: str) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(model=model, prompt="hi", stop=gen.StopParams(max_tokens=2))
        async with aclosing(api.generate(request)) as responses:
            return [response async for response in responses]

    gate = Gate(hub, len(content) // 2)
    requests = [asyncio.create_task(refused(generate(NAME)))]
    await gate.wait_reached()
    await until(api, ID, lambda model: model.download.total_bytes > 0)
    requests.append(asyncio.create_task(refused(generate(ID))))
    await api.stop_download(pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_PAUSE))
    gate.opened.set()

    ended = [error.reason for error in await asyncio.gather(*requests)]
    assert ended == [Reason.LOAD_ABORTED, Reason.LOAD_ABORTED]
    assert (await refused(generate(ID))).reason == Reason.LOAD_ABORTED
    async with aclosing(api.load(pb.LoadRequest(model=ID))) as responses:  # an operator's load does
        assert [response async for response in responses][-1].loaded.model.id == ID


async def test_calls_at_the_moment_of_a_stop_all_end(api: GrpcApi, hub: FakeHub, content: bytes) -> None:
    gate = Gate(hub, len(content) // 2)
    first = asyncio.create_task(refused(download(api)))
    await gate.wait_reached()
    await until(api, ID, lambda model: model.download.total_bytes > 0)
    pause = pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_PAUSE)
    cancel = pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_CANCEL)
    stops = [api.stop_download(pause), api.stop_download(cancel), api.stop_download(pause)]
    calls = [*stops, *(download(api) for _ in range(20))]
    async with asyncio.timeout(WAY_OUT_SECONDS):
        running = asyncio.gather(*calls, return_exceptions=True)
        await first
        gate.opened.set()
        ends = await running
    async with asyncio.timeout(WAY_OUT_SECONDS):
        await asyncio.to_thread(wait_until, lambda: not fetchers())

    errors = [end for end in ends if isinstance(end, BaseException)]
    assert all(isinstance(error, PaddockError) for error in errors)
    assert {error.reason for error in errors if isinstance(error, PaddockError)} <= {
        Reason.LOAD_ABORTED,
        Reason.MODEL_NOT_FOUND,
    }


async def test_a_request_does_not_repeat_a_download_that_cannot_work(
    downloading_api: GrpcApi, hub: FakeHub
) -> None:
    api = downloading_api
    hub.repos[REPO].wrong_hashes = {FILE}
    request = pb.GenerateRequest(model=NAME, prompt="hi")
    first = await refused(anext(api.generate(request)))
    served = hub.served_bytes
    second = await refused(anext(api.generate(request)))

    assert first.reason == second.reason == Reason.MODEL_CORRUPT
    assert hub.served_bytes == served


async def test_a_caller_who_leaves_a_load_leaves_the_download_and_the_load_running(
    api: GrpcApi, hub: FakeHub, content: bytes
) -> None:
    gate = Gate(hub, len(content) // 2)
    stream = api.load(pb.LoadRequest(model=NAME))
    await anext(stream)
    await gate.wait_reached()
    await stream.aclose()
    gate.opened.set()

    await until(api, ID, lambda model: model.state == model_pb2.MODEL_STATE_LOADED)


async def test_a_fetcher_without_a_sign_of_life_is_killed() -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    launcher = FetcherLauncher(command, stall_seconds=0.2)
    messages: list[Message] = []

    with pytest.raises(FetcherStalledError, match=r"0.2 s"):
        await launcher.run(parse_hub_name(NAME), messages.append)

    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in str(child.cmdline())]


async def test_a_fetcher_that_ends_without_a_word_is_told_with_its_last_lines() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such luck')")
    messages: list[Message] = []

    with pytest.raises(FetcherCrashedError, match=r"code 1: no such luck"):
        await FetcherLauncher(command).run(parse_hub_name(NAME), messages.append)


async def test_a_cancelled_download_leaves_nothing(
    api: GrpcApi, hub: FakeHub, content: bytes, world: Path
) -> None:
    gate = Gate(hub, len(content) // 2)
    waiting = asyncio.create_task(refused(download(api)))
    await gate.wait_reached()
    await api.stop_download(pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_CANCEL))
    gate.opened.set()

    assert (await waiting).reason == Reason.LOAD_ABORTED
    assert not list((world / "models--org--noise-GGUF" / "blobs").iterdir())
    assert await listed(api) == {}
    stop = pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_CANCEL)
    assert (await refused(api.stop_download(stop))).reason == Reason.MODEL_NOT_FOUND


async def test_a_failed_download_is_listed_with_its_reason_until_it_is_deleted(
    api: GrpcApi, hub: FakeHub
) -> None:
    hub.repos[REPO].wrong_hashes = {FILE}
    error = await refused(download(api))
    model = (await api.get(pb.GetRequest(model=ID))).model

    assert error.reason == model.download.failure.reason == Reason.MODEL_CORRUPT
    assert model.artifact_state == model_pb2.ARTIFACT_STATE_ABSENT
    await api.delete(pb.DeleteRequest(model=ID))
    assert await listed(api) == {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("info", status=401), Reason.HUB_ACCESS_DENIED),
        (Fault("info", status=404, error_code="RepoNotFound"), Reason.HUB_FILE_NOT_FOUND),
        (Fault("info", status=429, retry_after="900"), Reason.HUB_UNREACHABLE),
    ],
)
async def test_a_refusal_of_the_hub_reaches_the_caller_and_nothing_is_listed(
    api: GrpcApi, hub: FakeHub, fault: Fault, reason: Reason
) -> None:
    hub.faults = [fault]
    error = await refused(download(api))

    assert error.reason == reason
    assert await listed(api) == {}
    if fault.retry_after:
        assert error.retry_after_seconds == float(fault.retry_after)


async def test_a_fetcher_that_is_killed_is_started_again_and_fetches_no_byte_twice(
    api: GrpcApi, hub: FakeHub, content: bytes, world: Path
) -> None:
    gate = Gate(hub, len(content) // 2)
    waiting = asyncio.create_task(download(api))
    await gate.wait_reached()
    partial = world / "models--org--noise-GGUF" / "blobs" / f"{digest_of(content)}.incomplete"
    (fetcher,) = fetchers()
    await asyncio.to_thread(wait_until, lambda: partial.exists() and partial.stat().st_size > 0)
    fetcher.send_signal(signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: fetcher not in fetchers())
    there = partial.stat().st_size
    gate.opened.set()

    responses = await waiting
    assert responses[-1].downloaded.id == ID
    assert any(response.progress.HasField("warning") for response in responses)
    assert hub.ranges == ["", f"bytes={there}-"]


async def test_without_a_network_a_download_fails_at_once_and_says_what_to_check(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    async with server(tmp_path) as api:
        error = await refused(download(api))

    assert error.reason == Reason.HUB_UNREACHABLE
    assert "HF_ENDPOINT" in error.message
    assert "Whatever arrived is kept" not in error.message  # which it says when it has tried again and again


@pytest.mark.parametrize(("paused", "restore"), [(False, True), (True, True), (False, False)])
async def test_downloads_outlive_a_restart(
    hub: FakeHub, world: Path, tmp_path: Path, content: bytes, paused: bool, restore: bool
) -> None:
    gate = Gate(hub, len(content) // 2)
    blobs = world / "models--org--noise-GGUF" / "blobs"
    async with server(tmp_path) as api:
        waiting = asyncio.create_task(refused(download(api)))
        await gate.wait_reached()
        await asyncio.to_thread(wait_until, lambda: any(blobs.glob("*.incomplete")))
        await asyncio.to_thread(wait_until, lambda: next(blobs.iterdir()).stat().st_size > 0)
        if paused:
            await api.stop_download(pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_PAUSE))
    await asyncio.gather(waiting, return_exceptions=True)
    gate.opened.set()

    if not restore:
        async with server(tmp_path, restore=False) as api:
            assert (await listed(api))[ID].download.paused
            assert fetchers() == []
    async with server(tmp_path) as api:
        if paused:
            model = (await listed(api))[ID]
            assert model.download.paused
            assert model.download.total_bytes == len(content)
        else:
            await until(api, ID, lambda model: model.artifact_state == model_pb2.ARTIFACT_STATE_DOWNLOADED)
            assert hub.ranges[-1].startswith("bytes=")


async def test_a_loaded_model_is_not_deleted_and_an_unloaded_one_frees_its_bytes(
    api: GrpcApi, content: bytes, world: Path
) -> None:
    async with aclosing(api.load(pb.LoadRequest(model=NAME))) as responses:
        assert [response async for response in responses][-1].HasField("loaded")
    error = await refused(api.delete(pb.DeleteRequest(model=NAME)))
    await api.unload(pb.UnloadRequest(model=NAME))
    response = await api.delete(pb.DeleteRequest(model=NAME))

    assert error.reason == Reason.MODEL_IN_USE
    assert response.freed_bytes == len(content)
    assert await listed(api) == {}
    assert not list((world / "models--org--noise-GGUF" / "blobs").iterdir())
    assert (await refused(api.delete(pb.DeleteRequest(model=ID)))).reason == Reason.MODEL_NOT_FOUND
    assert (await api.delete(pb.DeleteRequest(model=ID, allow_missing=True))).freed_bytes == 0


class Deletion:
    """A deletion that is held up before the first file goes."""

    def __init__(self, api: GrpcApi, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self._begun = threading.Event()
        monkeypatch.setattr(deletion_module, "remove_model", self._remove)
        self.call = asyncio.create_task(api.delete(pb.DeleteRequest(model=ID)))

    def _remove(self, *arguments: Any) -> int:
        self._begun.set()
        assert self.go_on.wait(WAY_OUT_SECONDS)
        return remove_model(*arguments)

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, WAY_OUT_SECONDS)


async def test_a_deletion_once_begun_goes_on_without_its_caller(
    api: GrpcApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    await download(api)
    deletion = Deletion(api, monkeypatch)
    await deletion.wait_begun()
    deletion.call.cancel()
    await asyncio.wait({deletion.call})
    assert list(await listed(api)) == [ID], "by now the server has heard that the caller is gone"
    deletion.go_on.set()

    async with (
        asyncio.timeout(WAY_OUT_SECONDS),
        aclosing(api.watch(pb.WatchRequest(models=[ID]))) as events,
    ):
        async for event in events:
            if event.deleted.model == ID or (event.HasField("synced") and not await listed(api)):
                break


async def test_a_model_that_is_being_deleted_is_not_loaded(
    api: GrpcApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    await download(api)
    deletion = Deletion(api, monkeypatch)
    await deletion.wait_begun()
    generate = pb.GenerateRequest(model=ID, prompt="hi")
    errors = [
        await refused(anext(api.load(pb.LoadRequest(model=ID)))),
        await refused(anext(api.generate(generate))),
    ]
    deletion.go_on.set()
    await deletion.call

    assert [error.reason for error in errors] == [Reason.MODEL_NOT_FOUND] * 2
    assert await listed(api) == {}


async def test_what_another_revision_uses_is_kept(api: GrpcApi, hub: FakeHub, content: bytes) -> None:
    await download(api)
    hub.repos[REPO].commit = "b" * 40
    hub.repos[REPO].revisions = ("v2",)
    await download(api, f"hf:{REPO}@v2:Q4_K_M")
    assert hub.served_bytes == len(content)  # the same content is not fetched again
    assert list(await listed(api)) == [ID, f"{REPO}@v2:Q4_K_M"]

    first = await api.delete(pb.DeleteRequest(model=ID))
    second = await api.delete(pb.DeleteRequest(model=f"{REPO}@v2:Q4_K_M"))

    assert (first.freed_bytes, second.freed_bytes) == (0, len(content))


async def test_a_file_that_a_running_download_needs_outlives_the_model_it_came_with(
    api: GrpcApi, hub: FakeHub, world: Path, content: bytes
) -> None:
    projector = "mmproj-F16.gguf"
    hub.repos[REPO].files |= {"noise-Q8_0.gguf": content + b"!", projector: b"GGUF" * 1000}
    await download(api, f"hf:{REPO}:Q8_0")
    gate = Gate(hub, hub.served_bytes + len(content) // 2)
    other = asyncio.create_task(download(api))
    await gate.wait_reached()

    await api.delete(pb.DeleteRequest(model=f"{REPO}:Q8_0"))
    gate.opened.set()
    await other

    links = await asyncio.to_thread(lambda: [link.exists() for link in world.rglob("mmproj*")])
    assert links == [True], "the projector has been removed under the download"
    assert list(await listed(api)) == [ID]


async def test_two_servers_with_one_cache_fetch_each_byte_once_and_leave_each_other_s_alone(
    api: GrpcApi, hub: FakeHub, content: bytes, tmp_path: Path
) -> None:
    gate = Gate(hub, len(content) // 2)
    first = asyncio.create_task(download(api))
    await gate.wait_reached()
    async with server(tmp_path, state_dir=tmp_path / "other") as other:
        second = asyncio.create_task(refused(download(other)))
        await until(other, ID, lambda model: model.download.total_bytes > 0)
        await other.stop_download(pb.StopDownloadRequest(model=ID, mode=pb.STOP_DOWNLOAD_MODE_CANCEL))
        assert (await second).reason == Reason.LOAD_ABORTED
        third = asyncio.create_task(download(other))
        gate.opened.set()

        assert (await first)[-1].downloaded.id == ID
        assert (await third)[-1].downloaded.id == ID
    assert hub.served_bytes == len(content)


async def test_offline_the_cache_is_served_and_nothing_else(
    hub: FakeHub, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(tmp_path) as api:
        await download(api)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    requests = len(hub.requests)
    async with server(tmp_path) as api, AsyncExitStack() as stack:
        responses = await stack.enter_async_context(aclosing(api.load(pb.LoadRequest(model=NAME))))
        assert [response async for response in responses][-1].HasField("loaded")
        assert (await download(api))[-1].downloaded.id == ID
        error = await refused(download(api, "hf:org/other:Q8_0"))

    assert (error.reason, error.metadata["offline"]) == (Reason.HUB_FILE_NOT_FOUND, "true")
    assert len(hub.requests) == requests


async def test_a_server_without_the_cache_neither_lists_nor_downloads(
    world: Path, hub: FakeHub, tmp_path: Path
) -> None:
    async with server(tmp_path) as api:
        await download(api)
    async with server(tmp_path, hf_cache=False) as api:
        assert await listed(api) == {}
        assert (await refused(download(api))).reason == Reason.NOT_IMPLEMENTED


async def test_a_file_of_a_model_directory_is_not_deleted(world: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    make_noise(models / "mine.gguf")
    async with server(tmp_path, models_dir=(models,)) as api:
        error = await refused(api.delete(pb.DeleteRequest(model="mine")))

    assert error.reason == Reason.INVALID_FIELD
    assert (models / "mine.gguf").exists()


@pytest.mark.usefixtures("world")
async def test_a_model_that_has_no_files_has_none_to_delete(tmp_path: Path) -> None:
    config = tmp_path / "paddock.toml"
    config.write_text(f'[models.helper]\nhf = "{NAME}"\n')
    async with server(tmp_path, config) as api:
        error = await refused(api.delete(pb.DeleteRequest(model="helper")))
        assert error.reason == Reason.MODEL_NOT_LOADED
        assert "there are no files of it to delete" in error.message
        missing = await api.delete(pb.DeleteRequest(model="helper", allow_missing=True))
        assert missing.freed_bytes == 0
