"""Sources of models over a real server with fake workers: names, defaults, and reloads by what changed."""

from __future__ import annotations

import asyncio
import signal
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.app import StartError, serving
from paddock_server.config import ServerConfig
from paddock_server.reloading import follow_files, follow_hangups
from tests.fakes.launching import fake_launcher
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

TOML = """\
default_model = "clerk"

[models.a]
aliases = ["first"]
tags = ["small"]
description = "The first."
priority = 3

[models.clerk]
path = "a.gguf"
max_tokens = 3

[models.poet]
path = "a.gguf"
max_tokens = 5
system_prompt = "Rhyme."

[models.ghost]
path = "a.gguf"
hidden = true
ctx_size = 77
"""


class Place:
    """A model directory and a paddock.toml."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.models.mkdir()
        self.toml = folder / "paddock.toml"
        for name in ("a", "b"):
            make_noise(self.models / f"{name}.gguf")
        self.toml.write_text(TOML)

    @asynccontextmanager
    async def served(self, **flags: object) -> AsyncGenerator[ModelManagerApi]:
        common = {"models_dir": (self.models,), "grpc_port": 0, "state_dir": None, "drain_seconds": 5}
        config = ServerConfig.load({**common, **flags}, self.toml)
        async with (
            serving(config, launcher=fake_launcher()) as server,
            connect(server.grpc_address) as channel,
        ):
            yield GrpcApi(channel)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def generate(api: ModelManagerApi, model: str) -> tuple[str, str, int]:
    """Generate; return the model and the load that answered, and how many tokens."""
    chat = gen.ChatInput(messages=[gen.ChatMessage(role=gen.ROLE_USER, content=[gen.ContentPart(text="hi")])])
    async with aclosing(api.generate(pb.GenerateRequest(model=model, chat=chat))) as responses:
        events = [event async for event in responses]
    started, usage = events[0].started, events[-1].generated.usage
    return started.model, started.load_id, usage.completion_tokens


async def prompt_tokens(api: ModelManagerApi, model: str) -> int:
    chat = gen.ChatInput(messages=[gen.ChatMessage(role=gen.ROLE_USER, content=[gen.ContentPart(text="hi")])])
    async with aclosing(api.generate(pb.GenerateRequest(model=model, chat=chat))) as responses:
        return [event async for event in responses][-1].generated.usage.prompt_tokens


async def models(api: ModelManagerApi) -> dict[str, model_pb2.Model]:
    return {model.id: model for model in (await api.list(pb.ListRequest())).models}


async def until_loaded(api: ModelManagerApi, model: str, *, other_than: str = "") -> model_pb2.Model:
    """Wait until the model is loaded, by another load if one is given."""
    async with asyncio.timeout(60), aclosing(api.watch(pb.WatchRequest(models=[model]))) as events:
        async for event in events:
            shown = event.changed.model
            if shown.state == model_pb2.MODEL_STATE_LOADED and shown.load_id != other_than:
                return shown
    raise AssertionError


async def until_states(api: ModelManagerApi, **wanted: model_pb2.ModelState.ValueType) -> None:
    """Wait until models are in these states."""
    async with asyncio.timeout(60), aclosing(api.watch(pb.WatchRequest(models=list(wanted)))) as events:
        seen: dict[str, int] = {}
        async for event in events:
            if event.HasField("changed"):
                seen[event.changed.model.id] = event.changed.model.state
            if seen == wanted:
                return


async def test_names_of_one_model_share_its_worker_and_keep_their_own_defaults(place: Place) -> None:
    async with place.served() as api:
        answers = [await generate(api, name) for name in ("a", "first", "clerk", "poet")]
        shown = await models(api)
        longer = await prompt_tokens(api, "poet") - await prompt_tokens(api, "clerk")

    assert {(model, load_id) for model, load_id, _ in answers} == {("a", answers[0][1])}
    assert [tokens for _, _, tokens in answers] == [16, 16, 3, 5]
    assert longer > 0  # the system prompt
    assert list(shown["a"].aliases) == ["first", "clerk", "poet"]


async def test_list_says_what_the_configuration_says(place: Place) -> None:
    async with place.served() as api:
        shown = await models(api)

    assert list(shown) == ["a", "b"]
    assert (shown["a"].origin, shown["b"].origin) == (
        model_pb2.MODEL_ORIGIN_CONFIG_FILE,
        model_pb2.MODEL_ORIGIN_MODELS_DIR,
    )
    assert (list(shown["a"].tags), shown["a"].description, shown["a"].priority) == (
        ["small"],
        "The first.",
        3,
    )
    assert list(shown["b"].info.input_modalities) == [model_pb2.MODALITY_TEXT]


async def test_a_hidden_model_works_and_is_not_listed(place: Place) -> None:
    async with place.served() as api:
        model, _, _ = await generate(api, "ghost")
        got = (await api.get(pb.GetRequest(model="ghost"))).model

    assert (model, got.runtime_options.context_size_tokens) == ("ghost", 77)


async def test_a_request_that_names_no_model_gets_the_default_model(place: Place) -> None:
    async with place.served() as api:
        assert (await generate(api, ""))[2] == 3
        place.toml.write_text(TOML.replace('default_model = "clerk"', ""))
        await api.reload(pb.ReloadRequest())
        with pytest.raises(PaddockError) as caught:
            await generate(api, "")

    assert caught.value.metadata["field"] == "model"


async def test_a_reload_restarts_only_what_changed(place: Place) -> None:
    async with place.served() as api:
        _, first, _ = await generate(api, "a")
        _, other, _ = await generate(api, "b")
        place.toml.write_text(TOML + "\n[models.b]\nctx_size = 99\n")
        response = await api.reload(pb.ReloadRequest())
        reloaded = await until_loaded(api, "b", other_than=other)
        _, still, _ = await generate(api, "a")

    assert (list(response.changed), response.unchanged_count) == (["b"], 2)
    assert reloaded.runtime_options.context_size_tokens == 99
    assert still == first


async def test_a_reload_changes_names_and_defaults_in_place(place: Place) -> None:
    async with place.served() as api:
        _, first, _ = await generate(api, "a")
        place.toml.write_text(TOML.replace("max_tokens = 3", "max_tokens = 7").replace("first", "primus"))
        response = await api.reload(pb.ReloadRequest())
        answers = [await generate(api, name) for name in ("primus", "clerk")]
        with pytest.raises(PaddockError) as caught:
            await generate(api, "first")

    assert list(response.changed) == ["a"]
    assert [(load_id, tokens) for _, load_id, tokens in answers] == [(first, 16), (first, 7)]
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


async def test_reloads_without_a_change_unload_nothing(place: Place, tmp_path: Path) -> None:
    preset = tmp_path / "models.ini"
    preset.write_text("[a]\nmodels-max = 1\nc = 50\n[nobody]\nc = 1\n")
    async with place.served(models_preset=preset) as api:
        _, first, _ = await generate(api, "a")
        responses = [await api.reload(pb.ReloadRequest()) for _ in range(3)]
        _, still, _ = await generate(api, "a")

    assert [len(response.changed) for response in responses] == [0, 0, 0]
    assert still == first
    assert [(problem.key, problem.line) for problem in responses[0].problems] == [
        ("[a] models-max", 2),
        ("nobody", 4),
    ]


async def test_a_model_that_is_gone_from_the_files_is_drained_and_goes(place: Place) -> None:
    async with place.served() as api:
        await generate(api, "ghost")
        place.toml.write_text(TOML[: TOML.index("[models.ghost]")])
        async with aclosing(api.watch(pb.WatchRequest(models=["ghost"]))) as events, asyncio.timeout(60):
            assert (await anext(events)).changed.model.state == model_pb2.MODEL_STATE_LOADED
            response = await api.reload(pb.ReloadRequest())
            async for event in events:
                if event.HasField("deleted"):
                    break

    assert list(response.removed) == ["ghost"]


async def test_a_file_that_does_not_validate_changes_nothing_and_says_why(place: Place) -> None:
    async with place.served() as api:
        _, first, _ = await generate(api, "a")
        place.toml.write_text(TOML.replace("priority = 3", "priority = 'high'"))
        with pytest.raises(PaddockError) as caught:
            await api.reload(pb.ReloadRequest())
        _, still, tokens = await generate(api, "clerk")

    assert caught.value.reason == Reason.INVALID_CONFIG
    assert caught.value.metadata["line"] == "7"
    assert "models.a.priority: must be a whole number" in caught.value.message
    assert (still, tokens) == (first, 3)


async def test_a_server_does_not_start_with_a_file_that_does_not_validate(place: Place) -> None:
    place.toml.write_text("[models.a]\naliases = ['b']\n")

    with pytest.raises(StartError, match="'b' is an alias of 'a'"):
        async with place.served():
            pass


async def test_what_is_to_be_loaded_on_startup_is_loaded_at_the_start_and_no_unlimited_number_is_too_many(
    place: Place,
) -> None:
    place.toml.write_text("models_max = 0\n[models.b]\nload_on_startup = true\n")
    async with place.served() as api:
        await until_loaded(api, "b")
        assert (await models(api))["a"].state == model_pb2.MODEL_STATE_UNLOADED


async def test_sighup_reloads(place: Place) -> None:
    async with place.served() as api:
        hangups = asyncio.create_task(follow_hangups(api))
        await asyncio.sleep(0)
        place.toml.write_text("[models.new]\npath = 'a.gguf'\nctx_size = 50\n")
        async with aclosing(api.watch(pb.WatchRequest(models=["new"]))) as events, asyncio.timeout(60):
            assert (await anext(events)).HasField("synced")
            signal.raise_signal(signal.SIGHUP)
            assert (await anext(events)).changed.model.id == "new"
        hangups.cancel()


async def test_a_changed_file_is_reloaded_once_it_is_written(place: Place) -> None:
    async with place.served() as api:
        follower = asyncio.create_task(follow_files(api, [place.toml], 0.05))
        async with aclosing(api.watch(pb.WatchRequest(models=["new"]))) as events, asyncio.timeout(60):
            assert (await anext(events)).HasField("synced")
            place.toml.write_text("[models.new]\npath = 'a.gguf'\nctx_size = 50\n")
            assert (await anext(events)).changed.model.id == "new"
        follower.cancel()


async def test_an_estimate_is_that_of_the_model_s_own_options(place: Place) -> None:
    place.toml.write_text("[models.a]\nctx_size = 300\nparallel = 3\nbatch_size = 64\n")
    async with place.served(ctx_size=2048) as api:
        own = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        plain = await api.estimate_memory(pb.EstimateMemoryRequest(model="b"))

    options = own.runtime_options
    assert (options.context_size_tokens, options.slot_count, options.batch_size_tokens) == (300, 3, 64)
    assert plain.runtime_options.slot_count == 4


async def test_a_reload_takes_over_settings_of_the_server_and_names_those_that_need_a_restart(
    place: Place,
) -> None:
    place.toml.write_text("models_max = 1\nparallel = 2\n")
    async with place.served() as api:
        await generate(api, "a")
        before = await until_loaded(api, "a")
        place.toml.write_text(
            "models_max = 2\nparallel = 3\nidle_timeout_seconds = 900\nreflection = false\n"
        )
        response = await api.reload(pb.ReloadRequest())
        await generate(api, "b")
        shown = await models(api)
        again = await api.reload(pb.ReloadRequest())

    assert [(problem.line, problem.key) for problem in response.problems] == [(4, "reflection")]
    assert "needs a restart" in response.problems[0].message
    assert response.problems == again.problems
    assert [model.state for model in shown.values()] == [model_pb2.MODEL_STATE_LOADED] * 2  # models_max
    assert shown["a"].load_id == before.load_id  # what is loaded is not loaded anew
    assert (shown["a"].runtime_options.slot_count, shown["b"].runtime_options.slot_count) == (2, 3)
    assert {model.runtime_options.idle_timeout.seconds for model in shown.values()} == {900}


async def test_a_setting_that_does_not_validate_changes_nothing(place: Place) -> None:
    place.toml.write_text("models_max = 1\n")
    async with place.served() as api:
        place.toml.write_text('models_max = 2\nparallel = "many"\n[models.clerk]\npath = "a.gguf"\n')
        with pytest.raises(PaddockError) as caught:
            await api.reload(pb.ReloadRequest())
        shown = await models(api)

    assert caught.value.reason == Reason.INVALID_CONFIG
    assert "paddock.toml:2" in caught.value.message
    assert not shown["a"].aliases


async def test_a_reload_with_fewer_places_has_the_least_recently_used_idle_models_go(place: Place) -> None:
    place.toml.write_text("models_max = 2\n")
    async with place.served() as api:
        for model in ("b", "a"):
            await generate(api, model)
        place.toml.write_text("models_max = 1\n")
        await api.reload(pb.ReloadRequest())
        await until_states(api, a=model_pb2.MODEL_STATE_LOADED, b=model_pb2.MODEL_STATE_UNLOADED)


async def test_a_reload_with_a_smaller_memory_budget_has_idle_models_go_and_larger_loads_refused(
    place: Place,
) -> None:
    place.toml.write_text("")
    async with place.served() as api:
        for model in ("b", "a"):
            await generate(api, model)
        estimate = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        needed = estimate.devices[0].needed_bytes
        place.toml.write_text(f'memory_budget = "RAM={needed * 3 // 2}"\n')
        response = await api.reload(pb.ReloadRequest())
        await until_states(api, a=model_pb2.MODEL_STATE_LOADED, b=model_pb2.MODEL_STATE_UNLOADED)
        shown = await api.estimate_memory(pb.EstimateMemoryRequest(model="a"))
        place.toml.write_text(f'memory_budget = "RAM={needed // 2}"\n')
        await api.reload(pb.ReloadRequest())
        await until_states(api, a=model_pb2.MODEL_STATE_UNLOADED)
        with pytest.raises(PaddockError) as refused:
            await generate(api, "b")

    assert not response.problems
    assert shown.devices[0].budget_bytes == needed * 3 // 2
    assert refused.value.reason == Reason.INSUFFICIENT_MEMORY


async def test_a_model_that_a_reload_pins_and_leaves_no_room_beside_stays(place: Place) -> None:
    place.toml.write_text("models_max = 2\n")
    async with place.served() as api:
        for model in ("b", "a"):
            await generate(api, model)
        place.toml.write_text("models_max = 1\n[models.b]\npinned = true\n")
        await api.reload(pb.ReloadRequest())
        await until_states(api, a=model_pb2.MODEL_STATE_UNLOADED, b=model_pb2.MODEL_STATE_LOADED)


async def test_a_reload_over_pinned_models_keeps_them_and_warns(
    place: Place, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = "[models.a]\npinned = true\n[models.b]\npinned = true\n"
    place.toml.write_text("models_max = 2\n" + pins)
    async with place.served() as api:
        for model in ("b", "a"):
            await generate(api, model)
        place.toml.write_text("models_max = 1\n" + pins)
        await api.reload(pb.ReloadRequest())
        shown = await models(api)
    assert {(model.state, model.pinned) for model in shown.values()} == {(model_pb2.MODEL_STATE_LOADED, True)}
    assert "pinned_models_pass_limits" in caplog.text + "".join(capsys.readouterr())


async def test_models_that_a_reload_puts_into_an_exclusive_group_do_not_stay_together(place: Place) -> None:
    place.toml.write_text("")
    async with place.served() as api:
        for model in ("a", "b"):
            await generate(api, model)
        group = "[groups.g]\nexclusive = true\n"
        place.toml.write_text(f'{group}[models.a]\ngroup = "g"\n[models.b]\ngroup = "g"\n')
        await api.reload(pb.ReloadRequest())
        await until_states(api, a=model_pb2.MODEL_STATE_UNLOADED, b=model_pb2.MODEL_STATE_LOADED)
        await generate(api, "a")
        await until_states(api, a=model_pb2.MODEL_STATE_LOADED, b=model_pb2.MODEL_STATE_UNLOADED)
