"""What the operator loaded comes back after a restart of the server."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paddock.errors import InvalidFieldError, PaddockError, Reason, make_error
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server import state_files
from paddock_server.catalog import ModelSetup, RequestDefaults
from paddock_server.manager.desired import DesiredLoads, State, read_state
from paddock_server.manager.options import Wish
from paddock_server.state_files import StateFileError, write_atomically
from tests.listing import models_of
from tests.unit.manager_fakes import Server, entry, loads, until

if TYPE_CHECKING:
    from paddock_server.catalog import CatalogEntry

LOADED = model_pb2.MODEL_STATE_LOADED


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "loads.json"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(server: Server) -> list[str]:
    return [model.id for model in models_of(server.manager) if model.state == LOADED]


async def test_loads_come_back_with_their_options_and_others_do_not(state_file: Path) -> None:
    async with Server("a", "b", "c", state_file=state_file) as server:
        options = model_pb2.RuntimeOptions(slot_count=2)
        options.idle_timeout.FromSeconds(600)
        await loads(server.manager, "a", runtime_options=options)
        await loads(server.manager, "b")
        await server.manager.unload(pb.UnloadRequest(model="b"))
        async with await server.manager.acquire("c"):
            pass
    async with Server("a", "b", "c", state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a"])
        in_effect = (await server.manager.snapshot("a")).runtime_options
        assert (in_effect.slot_count, in_effect.idle_timeout.seconds) == (2, 600)


async def test_only_what_somebody_set_is_remembered_and_the_rest_follows_the_configuration(
    state_file: Path,
) -> None:
    async with Server("a", slot_count=4, batch_size_tokens=512, state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
        idle = model_pb2.RuntimeOptions()
        idle.idle_timeout.FromSeconds(60)
        await loads(server.manager, "a", runtime_options=idle)
    assert read_state(state_file).loads == {"a": Wish({"slot_count": 2}, {"idle_timeout_seconds": 60.0})}
    async with Server("a", slot_count=8, batch_size_tokens=64, state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a"])
        in_effect = (await server.manager.snapshot("a")).runtime_options
    assert (in_effect.slot_count, in_effect.batch_size_tokens, in_effect.idle_timeout.seconds) == (2, 64, 60)


async def test_a_load_is_on_disk_while_the_server_runs(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
        await until(state_file.exists)
        assert read_state(state_file).loads.keys() == {"a"}


async def test_a_load_that_was_evicted_is_remembered(state_file: Path) -> None:
    async with Server("a", "b", models_max=1, state_file=state_file) as server:
        await loads(server.manager, "a")
        async with await server.manager.acquire("b"):
            pass
    assert read_state(state_file).loads.keys() == {"a"}


async def test_no_more_come_back_than_there_is_room_for_and_the_latest_do(state_file: Path) -> None:
    async with Server("a", "b", "c", state_file=state_file) as server:
        for model in ("c", "a", "b"):
            await loads(server.manager, model)
    async with Server("a", "b", "c", models_max=2, state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a", "b"])
        assert len(server.launcher.workers) == 2


async def test_without_restore_nothing_comes_back_and_all_stays_remembered(state_file: Path) -> None:
    async with Server("a", "b", state_file=state_file) as server:
        await loads(server.manager, "a")
        await server.manager.pin(pb.PinRequest(model="a"))
    async with Server("a", "b", state_file=state_file, restore=False) as server:
        await loads(server.manager, "b")
        assert loaded(server) == ["b"]
    async with Server("a", "b", state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a", "b"])
        assert (await server.manager.snapshot("a")).pinned


async def test_a_model_that_is_not_there_is_kept_for_when_it_is(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
    async with Server("b", state_file=state_file) as server:
        await loads(server.manager, "b")
        server.catalog.touch("b")
    assert list(read_state(state_file).loads) == ["a", "b"]


async def test_requests_bring_a_remembered_model_back_as_it_was(state_file: Path) -> None:
    async with Server("a", "b", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
        await loads(server.manager, "b")
    async with Server("a", "b", models_max=1, state_file=state_file) as server:
        await until(lambda: loaded(server) == ["b"])
        async with await server.manager.acquire("a"):
            assert (await server.manager.snapshot("a")).runtime_options.slot_count == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "loads": []}',
        b'{"version": 1}',
        b'{"version": 1, "loads": [{"model": 7, "options": {}}]}',
        b'{"version": 1, "loads": [{"model": "a", "options": {"slot_count": -5}}]}',
        b'{"version": 1, "loads": [{"model": "a", "options": 3}]}',
        b"[" * 100_000,
    ],
)
async def test_a_corrupt_file_is_set_aside_and_the_server_starts(state_file: Path, content: bytes) -> None:
    write_atomically(state_file, content)
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
    assert state_file.with_name("loads.json.corrupt").read_bytes() == content
    assert read_state(state_file).loads.keys() == {"a"}


async def test_a_file_that_cannot_be_written_does_not_stop_the_server(
    state_file: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_atomically(state_file.parent, b"a file where a directory should be")
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
    assert "state_file_not_written" in caplog.text + "".join(capsys.readouterr())


async def test_what_could_not_be_written_is_written_once_it_can(
    state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files, "RETRY_SECONDS", 0.01)
    write_atomically(state_file.parent, b"a file where a directory should be")
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
        state_file.parent.unlink()
        await until(state_file.exists)
        assert read_state(state_file).loads.keys() == {"a"}


async def test_what_is_to_be_remembered_is_on_the_disk_before_the_answer(
    state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, may_write = threading.Event(), threading.Event()

    def slow(_: Any) -> None:
        writing.set()
        assert may_write.wait(10)

    async with Server("a", state_file=state_file) as server:
        calls = (
            lambda: loads(server.manager, "a"),
            lambda: server.manager.pin(pb.PinRequest(model="a")),
            lambda: server.manager.unload(pb.UnloadRequest(model="a")),
        )
        for call in calls:
            writing.clear()
            may_write.clear()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", slow)
                answer = asyncio.ensure_future(call())
                await until(writing.is_set)
                await asyncio.sleep(0)
                assert not answer.done()
                may_write.set()
                await answer
        assert read_state(state_file) == State({}, {"a": True}, {"a": "/models/a.gguf"})


async def test_a_disk_that_does_not_answer_holds_up_no_answer_for_ever(
    state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files, "WAIT_SECONDS", 0.01)
    may_write = threading.Event()

    def stuck(_: Any) -> None:
        may_write.wait(10)

    async with Server("a", state_file=state_file) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stuck)
            await server.manager.pin(pb.PinRequest(model="a"))
            may_write.set()


async def test_what_a_server_killed_while_writing_has_left_is_removed(state_file: Path) -> None:
    state_file.parent.mkdir()
    state_file.with_name(".loads.json.4242.tmp").write_bytes(b"half")
    other = state_file.with_name(".loads-1.json.4242.tmp")
    other.write_bytes(b"of another server")
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
    assert files(state_file.parent) == [other.name, state_file.name]


async def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    async with Server("a", state_file=None) as server:
        await loads(server.manager, "a")
    assert files(tmp_path) == []


async def test_a_server_that_loads_nothing_writes_nothing(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server, await server.manager.acquire("a"):
        pass
    assert files(state_file.parent.parent) == []


def test_a_crash_while_writing_leaves_the_old_file(state_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(state_file, b"old")

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(state_file, b"new")
    assert state_file.read_bytes() == b"old"
    assert [path.name for path in state_file.parent.iterdir()] == ["loads.json"]


def test_an_absent_file_is_empty(state_file: Path) -> None:
    assert read_state(state_file) == State()


def test_a_file_of_a_later_release_is_read_as_far_as_it_is_understood(state_file: Path) -> None:
    state_file.parent.mkdir()
    loads = [{"model": "a", "options": {"slot_count": 2, "new": True}, "pinned": True}]
    state_file.write_text(json.dumps({"version": 1, "loads": loads, "more": []}))
    assert read_state(state_file) == State({"a": Wish({"slot_count": 2})})


def test_a_huge_file_is_not_read(state_file: Path) -> None:
    state_file.parent.mkdir()
    with state_file.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(StateFileError, match="larger"):
        read_state(state_file)


def named(id_: str, *names: str, file: str) -> CatalogEntry:
    """A model in a file, as a configuration file names it."""
    setup = ModelSetup(names={name: RequestDefaults() for name in (id_, *names)}, aliases=names)
    return replace(entry(id_), path=Path("/models") / file, setup=setup)


@pytest.mark.parametrize("entries", [[named("b", file="a.gguf")], [named("b", "a", file="x.gguf")]])
async def test_loads_and_pins_follow_a_model_that_gets_another_id(
    state_file: Path, entries: list[CatalogEntry]
) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
        await server.manager.pin(pb.PinRequest(model="a"))
    renamed = Server(state_file=state_file)
    renamed.catalog.entries = {one.id: one for one in entries}
    async with renamed as server:
        await until(lambda: loaded(server) == ["b"])
        model = await server.manager.snapshot("b")
    assert (model.runtime_options.slot_count, model.pinned) == (2, True)
    state = read_state(state_file)
    assert (list(state.loads), list(state.pins)) == (["b"], ["b"])


async def test_a_reload_that_changes_an_id_takes_the_remembered_load_along(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
        server.catalog.entries = {"b": named("b", file="a.gguf")}
        await server.manager.reload()
        async with await server.manager.acquire("b"):
            assert (await server.manager.snapshot("b")).runtime_options.slot_count == 2
    assert list(read_state(state_file).loads) == ["b"]


async def test_what_is_remembered_of_the_new_id_counts(state_file: Path) -> None:
    async with Server("a", "b", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=model_pb2.RuntimeOptions(slot_count=2))
        await loads(server.manager, "b", runtime_options=model_pb2.RuntimeOptions(slot_count=3))
    renamed = Server(state_file=state_file)
    renamed.catalog.entries = {"b": named("b", "a", file="b.gguf")}
    async with renamed:
        pass
    assert read_state(state_file).loads == {"b": Wish({"slot_count": 3})}


async def test_a_pin_is_remembered_and_taken_off_for_good(state_file: Path) -> None:
    async with Server("a", "b", state_file=state_file) as server:
        await server.manager.pin(pb.PinRequest(model="a"))
        await server.manager.pin(pb.PinRequest(model="b"))
        await server.manager.pin(pb.PinRequest(model="b", unpin=True))
    async with Server("a", "b", state_file=state_file) as server:
        pinned = {model.id: model.pinned for model in models_of(server.manager)}
    assert pinned == {"a": True, "b": False}


CORRUPT = make_error(Reason.MODEL_CORRUPT, "tensor 'x' is cut off")
BAD_OPTION = InvalidFieldError.of("runtime_options.cache_type_k", "does not suit this model")
STALLED = make_error(Reason.LOAD_STALLED, "it makes no progress")
TWO = model_pb2.RuntimeOptions(slot_count=2)
EIGHT = model_pb2.RuntimeOptions(slot_count=8)


async def failing(server: Server, error: PaddockError, number: int = 0, **request: Any) -> None:
    """Call Load of a, and have the worker fail; the caller is told."""
    server.launcher.slow.add("a")
    call = asyncio.ensure_future(loads(server.manager, "a", **request))
    (await server.launcher.worker(number)).fail(error)
    with pytest.raises(PaddockError) as caught:
        await call
    assert caught.value.reason == error.reason


async def test_a_load_that_the_end_of_the_server_cuts_comes_back(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        server.launcher.slow.add("a")
        call = asyncio.ensure_future(loads(server.manager, "a", runtime_options=TWO))
        await server.launcher.worker()
        await until(state_file.exists)
        assert read_state(state_file).loads.keys() == {"a"}, "it is on disk before it has come up"
    with pytest.raises(PaddockError):
        await call
    async with Server("a", state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a"])
        assert (await server.manager.snapshot("a")).runtime_options.slot_count == 2


@pytest.mark.parametrize("error", [CORRUPT, BAD_OPTION, make_error(Reason.INSUFFICIENT_MEMORY, "no")])
async def test_a_load_is_forgotten_when_it_has_failed_and_its_caller_knows(
    state_file: Path, error: PaddockError
) -> None:
    async with Server("a", state_file=state_file) as server:
        await failing(server, error, runtime_options=TWO)
        assert read_state(state_file) == State(), "before the answer"


async def test_a_load_that_may_work_another_time_is_tried_again_after_a_restart(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await failing(server, STALLED, runtime_options=TWO)
    async with Server("a", state_file=state_file) as server:
        await until(lambda: loaded(server) == ["a"])


async def test_a_load_that_fails_leaves_what_was_remembered_before_it(state_file: Path) -> None:
    reload = pb.LOAD_CONFLICT_POLICY_RELOAD
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=TWO)
        server.launcher.slow.add("a")
        calls = [
            asyncio.ensure_future(loads(server.manager, "a", runtime_options=EIGHT, conflict_policy=reload))
            for _ in range(2)
        ]
        worker = await server.launcher.worker(1)
        on_its_way = {"a": Wish({"slot_count": 8})}
        await until(lambda: read_state(state_file).loads == on_its_way)
        worker.fail(BAD_OPTION)
        await asyncio.wait(calls)
        assert all(isinstance(call.exception(), InvalidFieldError) for call in calls)
        assert read_state(state_file).loads == {"a": Wish({"slot_count": 2})}


async def test_a_remembered_load_is_forgotten_when_the_same_fails_for_good(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=TWO)
        await server.manager.sleep(pb.SleepRequest(model="a"))
        server.launcher.workers[0].die()
        await failing(server, make_error(Reason.INSUFFICIENT_MEMORY, "no"), 1, runtime_options=TWO)
        assert read_state(state_file).loads.keys() == {"a"}, "it came up once, and may again"
        await failing(server, CORRUPT, 2, runtime_options=TWO)
        assert read_state(state_file).loads == {}
        server.launcher.slow.clear()
        server.catalog.touch("a")
        await loads(server.manager, "a", runtime_options=TWO)
        assert read_state(state_file).loads.keys() == {"a"}


async def test_a_load_that_fails_when_its_caller_has_gone_is_kept(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        server.launcher.slow.add("a")
        async with aclosing(server.manager.subscribe_load(pb.LoadRequest(model="a"))) as events:
            await anext(events)
            worker = await server.launcher.worker()
        worker.fail(CORRUPT)
        await until(lambda: models_of(server.manager)[0].state == model_pb2.MODEL_STATE_FAILED)
    assert read_state(state_file).loads.keys() == {"a"}


async def test_a_load_that_fails_when_it_is_brought_back_stays_remembered(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a")
    async with Server("a", state_file=state_file) as server:
        server.launcher.slow.add("a")
        (await server.launcher.worker()).fail(CORRUPT)
        await until(lambda: models_of(server.manager)[0].state == model_pb2.MODEL_STATE_FAILED)
    assert read_state(state_file).loads.keys() == {"a"}, "nobody has been told"


async def test_a_load_that_is_refused_changes_nothing_that_is_remembered(state_file: Path) -> None:
    async with Server("a", state_file=state_file) as server:
        await loads(server.manager, "a", runtime_options=TWO)
        with pytest.raises(PaddockError) as caught:
            await loads(server.manager, "a", runtime_options=EIGHT)
    assert caught.value.reason == Reason.OPTIONS_CONFLICT
    assert read_state(state_file).loads == {"a": Wish({"slot_count": 2})}


async def test_replicas_that_fail_beside_one_that_is_loaded_leave_the_load_remembered(
    state_file: Path,
) -> None:
    async with Server("a", state_file=state_file) as server:
        server.launcher.slow.add("a")
        options = model_pb2.RuntimeOptions(replica_count=2)
        call = asyncio.ensure_future(loads(server.manager, "a", runtime_options=options))
        first, second = await server.launcher.worker(0), await server.launcher.worker(1)
        first.become_ready()
        second.fail(CORRUPT)
        with pytest.raises(PaddockError):
            await call
    assert read_state(state_file).loads == {"a": Wish({}, {"replica_count": 2})}


def test_what_is_kept_before_a_load_goes_along_when_the_model_gets_another_id() -> None:
    two, eight = Wish({"slot_count": 2}), Wish({"slot_count": 8})
    desired = DesiredLoads(None)
    desired.put("a", two)
    desired.expect("a", eight)
    desired.expect("x", eight)
    desired.put("b", two)
    desired.follow(["new", "b"], {"a": "new", "x": "b"}, lambda _: "")
    assert desired.loads == {"new": eight, "b": two}
    desired.failed("new", eight, for_good=True)
    desired.expect("b", eight)
    desired.failed("b", eight, for_good=True)
    assert desired.loads == {"new": two, "b": two}


async def test_what_is_remembered_of_a_model_that_is_not_there_is_forgotten_by_an_unload(
    state_file: Path,
) -> None:
    async with Server("a", "b", state_file=state_file) as server:
        await loads(server.manager, "a")
        await loads(server.manager, "b")
        await server.manager.pin(pb.PinRequest(model="a"))
    async with Server("b", state_file=state_file) as server:
        response = await server.manager.unload(pb.UnloadRequest(model="a"))
        assert (response.model.id, response.model.state) == ("a", model_pb2.MODEL_STATE_UNLOADED)
        state = read_state(state_file)
        assert (list(state.loads), state.pins, list(state.files)) == (["b"], {}, ["b"]), "on the disk"
        with pytest.raises(PaddockError) as caught:
            await server.manager.unload(pb.UnloadRequest(model="a"))
        assert caught.value.reason == Reason.MODEL_NOT_FOUND
