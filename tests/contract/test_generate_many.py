"""`GenerateMany` on the wire: grammar, credit, cancel, wrong commands, and the end of the stream."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import structlog

from paddock.api import request_id
from paddock.errors import PaddockError, Reason
from paddock.status import from_generation_error, from_rpc_error
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.app import serving
from paddock_server.config import ServerConfig
from tests.fakes.launching import fake_launcher, write_sidecar
from tests.fakes.raw_stream import RawStream, cancel, grant, raw_stream, start
from tests.models import make_noise

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from paddock.api import ModelManagerApi

CREDIT = 1_000_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, tokens_per_second in (("quick", 1000.0), ("slow", 50.0)):
        make_noise(directory / f"{name}.gguf")
        write_sidecar(directory / f"{name}.gguf", tokens_per_second=tokens_per_second)
    return directory


@pytest.fixture
def config(models: Path) -> ServerConfig:
    values = {"models_dir": (models,), "grpc_port": 0, "state_dir": None, "drain_seconds": 20}
    return ServerConfig.load({**values, "parallel": 4, "queue_limit": 8})


@pytest.fixture
async def channel(config: ServerConfig) -> AsyncGenerator[grpc.aio.Channel]:
    async with serving(config, launcher=fake_launcher()) as server, connect(server.grpc_address) as channel:
        yield channel


def request(model: str = "quick", max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt="hi", stop=gen.StopParams(max_tokens=max_tokens), **fields)


async def load(api: ModelManagerApi, *models: str) -> None:
    for model in models:
        async for _ in api.load(pb.LoadRequest(model=model)):
            pass


async def status_of(stream: RawStream) -> PaddockError:
    """Read the stream to its end and return the error it ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read_until(lambda: False)
    return from_rpc_error(caught.value)


async def test_the_events_of_a_number_follow_the_grammar_of_generate(channel: grpc.aio.Channel) -> None:
    async with raw_stream(channel) as stream:
        await stream.send(start(3, request()), start(7, request(max_tokens=5)))
        await stream.read_to_end_of(3, 7)

    assert stream.kinds(3) == stream.kinds(7) == ["started", "deltas", "generated"]
    assert (stream.tokens(3), stream.tokens(7)) == (8, 5)


async def test_what_a_step_made_leaves_in_one_message(channel: grpc.aio.Channel) -> None:
    await load(GrpcApi(channel), "slow")
    numbers = range(1, 5)
    async with raw_stream(channel) as stream:
        await stream.send(*(start(number, request("slow", 20)) for number in numbers))
        await stream.read_to_end_of(*numbers)

    # Of 20 steps some may be seen in two parts on a busy machine; a message per token would be over 80.
    assert len(stream.messages) < 40
    assert max(len(message.events) for message in stream.messages) == 4


async def test_at_zero_credit_one_generation_stands_still_and_the_others_go_on(
    channel: grpc.aio.Channel,
) -> None:
    async with raw_stream(channel) as stream:
        await stream.send(start(1, request(max_tokens=50), credit=2), start(2, request(max_tokens=200)))
        await stream.read_to_end_of(2)
        stopped_at = stream.tokens(1)
        assert [event.response.WhichOneof("event") for event in stream.events[1]] == ["started", "deltas"]

        await stream.send(grant(1, CREDIT))
        await stream.read_to_end_of(1)

    assert stopped_at < 50 == stream.tokens(1)
    # All it made meanwhile came at once.
    assert len(stream.events[1]) < 10


async def test_a_failure_needs_no_credit(channel: grpc.aio.Channel) -> None:
    async with raw_stream(channel) as stream:
        await stream.send(start(1, request("nowhere"), credit=1), start(2, request("nobody"), credit=1))
        await stream.read_to_end_of(1, 2)

    errors = [from_generation_error(stream.events[number][0].failed) for number in (1, 2)]
    assert [error.reason for error in errors] == [Reason.MODEL_NOT_FOUND] * 2
    assert [error.resource for error in errors] == ["nowhere", "nobody"]


async def test_cancel_stops_one_generation_and_frees_its_slot(channel: grpc.aio.Channel) -> None:
    async with raw_stream(channel) as stream:
        await stream.send(*(start(number, request("slow", 100_000)) for number in range(1, 5)))
        await stream.read_until(lambda: all(stream.tokens(number) for number in range(1, 5)))
        # There are four slots: this one waits until a slot is free.
        await stream.send(start(5, request("slow", 3)))
        await stream.read_until(lambda: stream.tokens(1) > 10)
        assert not stream.events[5]

        await stream.send(cancel(2))
        await stream.read_to_end_of(5)
        cancelled_at, other = stream.tokens(2), stream.tokens(1)
        await stream.read_until(lambda: stream.tokens(1) > other + 3)

    assert stream.tokens(5) == 3
    assert stream.tokens(2) == cancelled_at
    assert stream.ended == {5}


async def test_commands_for_what_has_ended_are_ignored(channel: grpc.aio.Channel) -> None:
    async with raw_stream(channel) as stream:
        await stream.send(start(1, request()))
        await stream.read_to_end_of(1)
        await stream.send(grant(1, 5), cancel(1), cancel(1), start(2, request()))
        await stream.read_to_end_of(2)

    assert stream.tokens(2) == 8


WRONG_COMMANDS = {
    "start of a number in use": ("commands.number", start(2, request())),
    "start of a lower number": ("commands.number", start(1, request())),
    "grant to nothing": ("commands.number", grant(9, 1)),
    "cancel of nothing": ("commands.number", cancel(9)),
    "cancel of zero": ("commands.number", cancel(0)),
    "start without credit": ("commands.start.credit", start(3, request(), credit=0)),
    "grant of nothing": ("commands.grant.credit", grant(2, 0)),
    "grant of less": ("commands.grant.credit", grant(2, -1)),
    "no command": ("commands.command", pb.GenerationCommand(number=3)),
}


@pytest.mark.parametrize("wrong", WRONG_COMMANDS)
async def test_a_command_that_makes_no_sense_ends_the_stream_and_names_the_field(
    channel: grpc.aio.Channel, wrong: str
) -> None:
    field, command = WRONG_COMMANDS[wrong]
    async with raw_stream(channel) as stream:
        await stream.send(start(2, request("slow", 100_000)), command)
        error = await status_of(stream)

    assert error.reason == Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize("how", ["half_close", "cancel", "channel"])
async def test_the_end_of_the_stream_stops_everything_on_it(config: ServerConfig, how: str) -> None:
    async with (
        serving(config, launcher=fake_launcher()) as server,
        connect(server.grpc_address) as channel,
        raw_stream(channel) as stream,
    ):
        await stream.send(start(1, request("slow", 100_000)), start(2, request("slow", 100_000)))
        await stream.read_until(lambda: bool(stream.events[1] and stream.events[2]))
        match how:
            case "half_close":
                await stream.call.done_writing()
            case "cancel":
                stream.call.cancel()
            case _:
                await channel.close()
        # Unloading waits for what runs: it would not return before its time-out.
        unloaded = await server.service.unload(pb.UnloadRequest(model="slow"))

    assert unloaded.aborted_request_count == 0


async def test_shutting_down_lets_what_runs_end_and_refuses_the_rest(config: ServerConfig) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(config, launcher=fake_launcher()))
        async with (
            connect(server.grpc_address) as channel,
            raw_stream(channel) as busy,
            raw_stream(channel) as idle,
        ):
            await busy.send(start(1, request("slow", 60)))
            await idle.send(start(1, request("slow", 1)))
            await idle.read_to_end_of(1)
            await busy.read_until(lambda: bool(busy.tokens(1)))
            stopping = asyncio.create_task(stack.aclose())
            # Ended by the server itself: what holds out until the very end is cut off without a reason.
            ends = [await status_of(idle)]
            await busy.send(start(2, request("slow", 1)))
            async with raw_stream(channel) as late:
                await late.send(start(1, request("slow", 1)))
                ends.append(await status_of(late))
            await busy.read_to_end_of(1, 2)
            ends.append(await status_of(busy))
            await stopping

    assert [end.reason for end in ends] == [Reason.SHUTTING_DOWN] * 3
    assert busy.tokens(1) == 60
    assert busy.events[2][0].failed.reason == Reason.SHUTTING_DOWN


async def test_every_generation_has_the_log_line_and_request_id_of_a_generate(
    channel: grpc.aio.Channel,
) -> None:
    api = GrpcApi(channel)
    await load(api, "quick")
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        async with raw_stream(channel) as stream:
            for number, one in enumerate((request(), request("nowhere")), 1):
                request_id.set(f"plain-{number}")
                with suppress(PaddockError):
                    async for _ in api.generate(one):
                        pass
                await stream.send(start(number, one, request_id=f"shared-{number}"))
            await stream.read_to_end_of(1, 2)
            await stream.send(start(3, request("slow", 10_000), request_id="shared-3"))
            await stream.read_until(lambda: bool(stream.events[3]))
            await stream.send(cancel(3), start(4, request(), request_id="unfit for a log"))
            await stream.read_to_end_of(4)
    lines = {
        line["request_id"]: line for line in logs if line["event"] == "rpc" and line["rpc"] == "Generate"
    }

    for number in (1, 2):
        plain, shared = lines[f"plain-{number}"], lines[f"shared-{number}"]
        assert list(plain) == list(shared)
        for field in ("rpc", "code", "model", "reason", "completion_tokens", "log_level"):
            assert plain.get(field) == shared.get(field)
    assert lines["shared-1"]["completion_tokens"] == 8
    assert {"load_ms", "queue_ms", "prompt_ms", "generation_ms"} <= set(lines["shared-1"])
    assert lines["shared-3"]["code"] == "CANCELLED"
    assert stream.events[2][0].failed.request_id == "shared-2"
    assert len(lines) == 6
    assert "unfit for a log" not in lines
