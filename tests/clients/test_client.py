from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from paddock import (
    ChatMessage,
    Client,
    FinishReason,
    HuggingFaceSource,
    LoadFailedError,
    LocalSource,
    ModelChanged,
    ModelDeleted,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelState,
    ModelUnavailableError,
    PaddockError,
    ProgressKind,
    PromptProgress,
    Reason,
    RuntimeOptions,
    Stage,
    Synced,
    Tool,
    ToolName,
)
from paddock.api import request_id
from paddock.errors import make_error
from paddock.v1 import generation_pb2, model_pb2
from paddock.v1 import model_manager_pb2 as pb
from tests.clients.fake_server import WAY_OUT_SECONDS, FakeServer


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[Client]:
    async with Client.connect(server.target) as client:
        yield client


async def cancelled(server: FakeServer, rpc: str) -> bool:
    return await asyncio.to_thread(server.manager.cancelled[rpc].wait, WAY_OUT_SECONDS)


async def test_load_streams_progress_and_ends_with_the_model(client: Client) -> None:
    async with client.load("cold") as load:
        events = [(event.stage, event.kind) async for event in load]

    assert events == [
        (Stage.SPAWN, ProgressKind.STARTED),
        (Stage.SPAWN, ProgressKind.WARNING),
        (Stage.SPAWN, ProgressKind.FINISHED),
        (Stage.WEIGHTS, ProgressKind.STARTED),
        (Stage.WEIGHTS, ProgressKind.ADVANCED),
        (Stage.WEIGHTS, ProgressKind.ADVANCED),
        (Stage.UNKNOWN, ProgressKind.FINISHED),
    ]
    assert load.model.state is ModelState.LOADED
    assert not load.already_loaded
    assert load.load_seconds == 1.5


async def test_load_progress_carries_bytes_and_fraction_and_says_when_they_are_unknown(
    client: Client,
) -> None:
    async with client.load("cold") as load:
        advanced = [event async for event in load if event.kind is ProgressKind.ADVANCED]

    assert [(e.fraction, e.completed_bytes, e.total_bytes) for e in advanced] == [
        (0.5, 500, 1000),
        (None, 0, 0),
    ]
    assert advanced[0].event_time == datetime.fromtimestamp(1_700_000_000, UTC)


async def test_load_of_a_loaded_model_ends_at_once(client: Client) -> None:
    async with client.load("tiny") as load:
        assert (await load.wait()).id == "tiny"
        assert load.already_loaded


async def test_the_model_of_an_unfinished_load_is_refused(client: Client) -> None:
    async with client.load("stuck") as load:
        await anext(load)
        with pytest.raises(RuntimeError, match="only after the stream has been read to its end"):
            _ = load.model


async def test_leaving_a_load_cancels_the_call(client: Client, server: FakeServer) -> None:
    async with client.load("stuck") as load:
        await anext(load)

    assert await cancelled(server, "Load")


async def test_load_sends_source_options_and_policy(client: Client, server: FakeServer) -> None:
    source = HuggingFaceSource(repo_id="a/b", file_pattern="*q8*", revision="main")
    options = RuntimeOptions(context_size_tokens=0, slot_count=8, idle_timeout_seconds=1.5)

    async with client.load(
        "tiny", source=source, options=options, on_conflict="reload", timeout_seconds=90
    ) as load:
        await load.wait()

    request = server.manager.requests("Load")[0]
    expected = pb.LoadRequest(
        model="tiny",
        source=model_pb2.ModelSource(
            hugging_face=model_pb2.HuggingFaceSource(repo_id="a/b", file_pattern="*q8*", revision="main")
        ),
        runtime_options=model_pb2.RuntimeOptions(context_size_tokens=0, slot_count=8),
        conflict_policy=pb.LOAD_CONFLICT_POLICY_RELOAD,
    )
    expected.runtime_options.idle_timeout.FromMilliseconds(1500)
    expected.load_timeout.FromSeconds(90)
    assert request == expected


async def test_generate_streams_text_and_ends_with_usage(client: Client) -> None:
    async with client.generate("tiny", "Once") as stream:
        assert (stream.generation_id, stream.load_id, stream.model, stream.prompt_tokens) == (
            "g-1",
            "load-1",
            "tiny",
            3,
        )
        chunks = [chunk async for chunk in stream]

    assert "".join(chunk.text for chunk in chunks) == "Hello, wörld!"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, None, FinishReason.STOP]
    assert chunks[-1].stop_sequence == "!!"
    assert (
        stream.usage.prompt_tokens,
        stream.usage.cached_prompt_tokens,
        stream.usage.completion_tokens,
    ) == (
        3,
        1,
        4,
    )
    assert stream.timings.generation_seconds == 0.5
    assert stream.seed == 11


async def test_leaving_a_generation_stops_it(client: Client, server: FakeServer) -> None:
    async with client.generate("endless", "Once") as stream:
        async for _ in stream:
            break

    assert await cancelled(server, "Generate")


async def test_an_exception_in_the_block_stops_the_generation(client: Client, server: FakeServer) -> None:
    with pytest.raises(ZeroDivisionError):
        async with client.generate("endless", "Once"):
            _ = 1 / 0

    assert await cancelled(server, "Generate")


async def test_cancelling_the_task_stops_the_generation(client: Client, server: FakeServer) -> None:
    streaming = asyncio.Event()

    async def read() -> None:
        async with client.generate("endless", "Once") as stream:
            async for _ in stream:
                streaming.set()

    task = asyncio.create_task(read())
    await streaming.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await cancelled(server, "Generate")


async def test_a_stream_that_was_not_entered_refuses_to_be_read(client: Client) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        async for _ in client.generate("tiny", "Once"):
            pass


async def test_complete_returns_every_choice_whole(client: Client) -> None:
    completion = await client.complete("tiny", "Once", choice_count=3)

    assert [choice.text for choice in completion.choices] == ["Hello, wörld!"] * 3
    assert completion.text == "Hello, wörld!"
    assert {choice.finish_reason for choice in completion.choices} == {FinishReason.STOP}
    assert completion.usage.completion_tokens == 4


async def test_every_option_reaches_its_field(client: Client, server: FakeServer) -> None:
    seen: list[PromptProgress] = []

    await client.complete(
        "tiny",
        [ChatMessage("system", "Be brief."), {"role": "user", "content": "Hi"}],
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        penalty_last_tokens=-1,
        seed=7,
        logit_bias={3: -100},
        max_tokens=5,
        stop=["\n"],
        ignore_eos=True,
        json_schema={"type": "object"},
        top_logprobs=2,
        choice_count=2,
        autoload=False,
        tools=[Tool("f", "does f", {"type": "object"})],
        tool_choice=ToolName("f"),
        template_arguments={"enable_thinking": False},
        on_prompt_progress=seen.append,
    )

    text = generation_pb2.ContentPart
    assert server.manager.requests("Generate")[0] == pb.GenerateRequest(
        model="tiny",
        chat=generation_pb2.ChatInput(
            messages=[
                generation_pb2.ChatMessage(role=generation_pb2.ROLE_SYSTEM, content=[text(text="Be brief.")]),
                generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER, content=[text(text="Hi")]),
            ],
            tools=[
                generation_pb2.Tool(
                    name="f", description="does f", parameters_json_schema='{"type": "object"}'
                )
            ],
            tool_choice=generation_pb2.ToolChoice(tool_name="f"),
            template_arguments_json='{"enable_thinking": false}',
        ),
        sampling=generation_pb2.SamplingParams(
            temperature=0,
            top_p=0.5,
            top_k=0,
            min_p=0.25,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            penalty_last_tokens=-1,
            seed=7,
            logit_bias={3: -100},
        ),
        stop=generation_pb2.StopParams(max_tokens=5, stop_sequences=["\n"], ignore_eos=True),
        constraint=generation_pb2.OutputConstraint(json_schema='{"type": "object"}'),
        logprobs=generation_pb2.LogprobParams(top_count=2),
        choice_count=2,
        autoload_policy=pb.AUTOLOAD_POLICY_FAIL,
        report_prompt_progress=True,
    )
    assert seen == [PromptProgress(evaluated_tokens=2, total_tokens=3)]


async def test_token_ids_are_sent_as_tokens(client: Client, server: FakeServer) -> None:
    await client.complete("tiny", [1, 2, 3])

    request = server.manager.requests("Generate")[0]
    assert request == pb.GenerateRequest(
        model="tiny",
        tokens=generation_pb2.TokenInput(token_ids=[1, 2, 3]),
        sampling=generation_pb2.SamplingParams(),
        stop=generation_pb2.StopParams(),
    )


async def test_errors_are_raised_in_their_class_with_everything_they_carry(
    client: Client, server: FakeServer
) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        await client.get("nope")

    assert caught.value.reason == Reason.MODEL_NOT_FOUND
    assert caught.value.resource == "nope"
    assert caught.value.request_id == "r-1"

    server.manager.error = make_error(Reason.QUEUE_FULL, "Full.", retry_after_seconds=4)
    with pytest.raises(ModelUnavailableError) as unavailable:
        await client.complete("tiny", "Once")
    assert unavailable.value.retry_after_seconds == 4


async def test_an_error_of_generate_is_raised_on_entering(client: Client) -> None:
    with pytest.raises(ModelNotLoadedError):
        async with client.generate("cold", "Once"):
            pytest.fail("entered")


async def test_an_error_of_load_is_raised_while_reading(client: Client, server: FakeServer) -> None:
    server.manager.error = make_error(Reason.MODEL_CORRUPT, "Bad magic.", metadata={"file": "x.gguf"})

    async with client.load("cold") as load:
        with pytest.raises(LoadFailedError, match="Bad magic"):
            await load.wait()


async def test_a_stream_that_ends_without_its_terminal_message_is_an_error(
    client: Client, server: FakeServer
) -> None:
    server.manager.truncate = True

    with pytest.raises(PaddockError, match="without the message `generated`") as generating:
        await client.complete("tiny", "Once")
    async with client.load("cold") as load:
        with pytest.raises(PaddockError, match="without the message `loaded`") as loading:
            await load.wait()

    assert generating.value.reason == loading.value.reason == Reason.INTERNAL


async def test_a_call_without_side_effects_is_sent_again_when_the_server_is_unavailable(
    client: Client, server: FakeServer
) -> None:
    server.manager.error, server.manager.error_count = make_error(Reason.SHUTTING_DOWN, "Bye."), 2

    assert (await client.get("tiny")).id == "tiny"
    assert len(server.manager.calls) == 3


@pytest.mark.parametrize("method", ["unload", "complete", "embed"])
async def test_a_call_that_does_something_is_sent_once(
    client: Client, server: FakeServer, method: str
) -> None:
    server.manager.error, server.manager.error_count = make_error(Reason.SHUTTING_DOWN, "Bye."), 1
    arguments = {"unload": ("tiny",), "complete": ("tiny", "Once"), "embed": ("tiny", ["text"])}

    with pytest.raises(ModelUnavailableError):
        await getattr(client, method)(*arguments[method])

    assert len(server.manager.calls) == 1


async def test_without_a_server_the_error_says_unreachable() -> None:
    async with Client.connect("127.0.0.1:1") as client:
        with pytest.raises(ModelUnavailableError) as caught:
            await client.get("tiny")

    assert caught.value.reason == Reason.SERVER_UNREACHABLE


async def test_a_server_that_goes_away_ends_a_stream_with_unreachable(
    client: Client, server: FakeServer
) -> None:
    async with client.load("stuck") as load:
        await anext(load)
        server.stop()
        with pytest.raises(ModelUnavailableError) as caught:
            await load.wait()

    assert caught.value.reason == Reason.SERVER_UNREACHABLE


async def test_list_returns_every_page(client: Client, server: FakeServer) -> None:
    models = await client.list()

    assert [model.id for model in models] == ["broken", "cold", "endless", "stuck", "tiny"]
    assert len(server.manager.requests("List")) == 3


async def test_list_can_be_limited_to_states(client: Client) -> None:
    models = await client.list(states=[ModelState.LOADED, ModelState.FAILED])

    assert [model.id for model in models] == ["broken", "endless", "tiny"]


async def test_a_model_is_plain_data(client: Client) -> None:
    model = await client.get("tiny")

    assert model.source == LocalSource(path="tiny.gguf")
    assert model.load_time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert model.expire_time is None
    assert model.info is not None
    assert (model.info.architecture, model.info.trained_context_tokens) == ("llama", 512)
    assert model.worker is not None
    assert (model.worker.pid, model.worker.start_time) == (4242, None)
    assert model.runtime_options == RuntimeOptions(context_size_tokens=512, slot_count=4)
    assert model.last_failure is None

    failed = await client.get("broken")
    assert failed.last_failure is not None
    assert (failed.last_failure.signal, failed.last_failure.exit_code) == ("SIGKILL", None)
    assert failed.last_failure.log_tail == ("first line", "last line")


async def test_unload_drains_unless_forced(client: Client, server: FakeServer) -> None:
    unloaded = await client.unload("tiny", drain_timeout_seconds=2, load_id="load-1")
    await client.unload("tiny", force=True)

    assert unloaded.model.state is ModelState.UNLOADED
    assert unloaded.aborted_request_count == 2
    drain = pb.UnloadRequest(model="tiny", mode=pb.UNLOAD_MODE_DRAIN, load_id="load-1")
    drain.drain_timeout.FromSeconds(2)
    assert server.manager.requests("Unload") == [
        drain,
        pb.UnloadRequest(model="tiny", mode=pb.UNLOAD_MODE_FORCE),
    ]


async def test_sleep_and_pin_return_the_model_as_it_is_then(client: Client, server: FakeServer) -> None:
    slept = await client.sleep("tiny")
    pinned = await client.pin("tiny")
    unpinned = await client.pin("tiny", pinned=False)

    assert slept.state is ModelState.SLEEPING
    assert (pinned.pinned, unpinned.pinned) == (True, False)
    assert server.manager.requests("Sleep") == [pb.SleepRequest(model="tiny")]
    assert server.manager.requests("Pin") == [
        pb.PinRequest(model="tiny"),
        pb.PinRequest(model="tiny", unpin=True),
    ]


async def test_watch_tells_changes_deletions_and_syncs(client: Client, server: FakeServer) -> None:
    async with client.watch() as watch:
        events = [await anext(watch) for _ in range(8)]

    assert all(isinstance(event, ModelChanged) and event.previous_state is None for event in events[:5])
    assert events[5] == Synced(revision=7)
    assert isinstance(events[6], ModelChanged)
    assert events[6].previous_state is ModelState.LOADING
    assert events[7] == ModelDeleted(revision=9, model="gone")
    assert await cancelled(server, "Watch")


async def test_embed_splits_what_one_message_cannot_hold(client: Client, server: FakeServer) -> None:
    texts = ["x" * length for length in range(130)]

    embeddings = await client.embed("tiny", texts, normalize=True)

    assert [vector[0] for vector in embeddings.vectors] == [float(length) for length in range(130)]
    assert (embeddings.usage.prompt_tokens, embeddings.usage.cached_prompt_tokens) == (130, 3)
    sent = [request for request in server.manager.requests("Embed") if isinstance(request, pb.EmbedRequest)]
    assert [len(request.texts) for request in sent] == [64, 64, 2]
    assert all(request.normalize for request in sent)


async def test_tokenize_and_detokenize(client: Client) -> None:
    tokens = await client.tokenize("tiny", "hé", include_pieces=True)

    assert tokens.token_ids == (104, 195, 169)
    assert tokens.pieces == (b"h", b"\xc3", b"\xa9")
    assert await client.detokenize("tiny", tokens.token_ids) == "hé"


async def test_logs_tell_lines_and_how_many_were_lost(client: Client, server: FakeServer) -> None:
    async with client.logs("tiny", tail=5) as logs:
        lines = [line async for line in logs]

    assert [(line.text, line.pid, line.load_id) for line in lines] == [
        ("first", 4242, "load-1"),
        ("second", 4242, "load-1"),
    ]
    assert logs.dropped_line_count == 3
    assert server.manager.requests("StreamLogs") == [pb.StreamLogsRequest(model="tiny", tail_line_count=5)]


async def test_leaving_logs_that_follow_cancels_the_call(client: Client, server: FakeServer) -> None:
    async with client.logs("tiny", follow=True) as logs:
        await anext(logs)

    assert await cancelled(server, "StreamLogs")


async def test_server_info(client: Client) -> None:
    info = await client.server_info()

    assert (info.version, info.instance_id, info.features) == ("9.9.9", "i-1", ("logs",))
    assert info.devices[0].free_bytes == 4


async def test_a_call_carries_the_request_id_of_its_context_or_one_of_its_own(
    client: Client, server: FakeServer
) -> None:
    await client.get("tiny")
    token = request_id.set("mine")
    try:
        await client.get("tiny")
    finally:
        request_id.reset(token)

    own, given = (call.metadata["x-request-id"] for call in server.manager.calls)
    assert len(own) == 32
    assert given == "mine"
