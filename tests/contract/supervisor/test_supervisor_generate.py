"""Generations and calls on a live worker."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from paddock.errors import InvalidFieldError, ModelUnavailableError, PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.worker.v1 import worker_pb2
from tests.contract.supervisor.streams import ENDLESS, ask, expected_text, read_text
from tests.fakes.polling import eventually

if TYPE_CHECKING:
    from paddock_server.supervisor import LogRing
    from tests.contract.supervisor.conftest import StartWorker

# Nothing here depends on the event loop; the other files run on both.
pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])


async def test_updates_are_started_deltas_finished(start_loaded: StartWorker) -> None:
    worker = await start_loaded(tokens_per_second=200)

    async with worker.generate(ask(5)) as generation:
        updates = [update async for update in generation]

    assert updates[0].started.prompt_tokens == 2
    assert [update.HasField("started") for update in updates[1:]] == [False] * (len(updates) - 1)
    assert [update.HasField("finished") for update in updates[:-1]] == [False] * (len(updates) - 1)
    assert updates[-1].finished.usage.completion_tokens == 5
    assert "".join(d.text for update in updates for d in update.deltas.deltas) == expected_text(5)


async def test_generations_at_once_each_get_their_own_text(start_loaded: StartWorker) -> None:
    worker = await start_loaded()

    async def one(token_count: int) -> str:
        async with worker.generate(ask(token_count)) as generation:
            return await read_text(generation)

    texts = await asyncio.gather(*(one(count) for count in range(1, 33) if count % 2))

    assert texts == [expected_text(count) for count in range(1, 33) if count % 2]


async def test_leaving_a_stream_cancels_it_and_only_it(start_loaded: StartWorker, ring: LogRing) -> None:
    worker = await start_loaded(tokens_per_second=500)

    async with worker.generate(ask(50)) as other:
        async with worker.generate(ask(ENDLESS)) as left:
            await anext(left)
        text = await read_text(other)

    assert text == expected_text(50)
    await eventually(lambda: "cancelled 2" in ring.tail(10))
    assert "cancelled 1" not in ring.tail(10), "what has ended is not cancelled"


async def test_a_slow_reader_gets_everything_in_fewer_updates(start_loaded: StartWorker) -> None:
    worker = await start_loaded(tokens_per_second=1000)

    async with worker.generate(ask(200)) as slow, worker.generate(ask(200)) as quick:
        await read_text(quick)
        updates = [update async for update in slow]

    assert len(updates) == 1
    assert updates[0].HasField("started")
    assert updates[0].HasField("finished")
    assert "".join(delta.text for delta in updates[0].deltas.deltas) == expected_text(200)


async def test_a_failure_of_one_generation_is_raised_and_the_worker_goes_on(
    start_loaded: StartWorker,
) -> None:
    worker = await start_loaded(context_size_tokens=10)

    with pytest.raises(InvalidFieldError) as caught:
        async with worker.generate(ask(5, prompt="x" * 11)) as generation:
            await read_text(generation)

    assert caught.value.reason == Reason.CONTEXT_LENGTH_EXCEEDED
    assert caught.value.metadata == {"model": "m", "prompt_tokens": "11", "context_tokens": "10"}
    async with worker.generate(ask(3)) as generation:
        assert await read_text(generation) == expected_text(3)


async def test_a_worker_that_is_full_says_so(start_loaded: StartWorker) -> None:
    worker = await start_loaded(slot_count=1, queue_limit=0, tokens_per_second=100)

    async with worker.generate(ask(ENDLESS)) as running:
        await anext(running)
        async with worker.generate(ask(1)) as refused:
            with pytest.raises(ModelUnavailableError) as caught:
                await anext(refused)

    assert caught.value.reason == Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds is not None


async def test_calls_are_answered_beside_running_generations(start_loaded: StartWorker) -> None:
    worker = await start_loaded(tokens_per_second=100)

    async with worker.generate(ask(ENDLESS)) as running:
        await anext(running)
        replies = await asyncio.gather(
            worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="né", include_pieces=True))),
            worker.call(worker_pb2.Call(detokenize=pb.DetokenizeRequest(token_ids=[110, 195, 169]))),
            worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=["a", "b"]))),
        )

    assert list(replies[0].tokenize.pieces) == [b"n", b"\xc3", b"\xa9"]
    assert replies[1].detokenize.text == "né"
    assert len(replies[2].embed.embeddings) == 2


async def test_a_call_that_fails_names_the_field(start_loaded: StartWorker) -> None:
    worker = await start_loaded()

    with pytest.raises(InvalidFieldError) as caught:
        await worker.call(worker_pb2.Call(detokenize=pb.DetokenizeRequest(token_ids=[0, 999])))

    assert caught.value.violations[0].field == "token_ids[1]"


async def test_a_call_that_is_cancelled_does_not_disturb_the_next(start_loaded: StartWorker) -> None:
    worker = await start_loaded()
    os.kill(worker.pid, signal.SIGSTOP)
    abandoned = asyncio.create_task(worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="a"))))
    await asyncio.sleep(0)

    abandoned.cancel()
    await asyncio.wait({abandoned})
    os.kill(worker.pid, signal.SIGCONT)

    reply = await worker.call(worker_pb2.Call(tokenize=pb.TokenizeRequest(text="b")))
    assert reply.tokenize.token_ids == [98]


async def test_a_call_whose_caller_leaves_is_cancelled_and_only_it(
    start_loaded: StartWorker, ring: LogRing
) -> None:
    worker = await start_loaded()
    await worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=["a"])))
    os.kill(worker.pid, signal.SIGSTOP)  # so that no answer comes before the cancel
    left, kept = (
        asyncio.create_task(worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=[text]))))
        for text in ("b", "c")
    )
    await asyncio.sleep(0)

    left.cancel()
    await asyncio.wait({left})
    os.kill(worker.pid, signal.SIGCONT)

    assert len((await kept).embed.embeddings) == 1
    await eventually(lambda: "cancelled call 2" in ring.tail(10))
    assert "cancelled call 1" not in ring.tail(10), "what has been answered is not cancelled"
    assert "cancelled call 3" not in ring.tail(10)
    # The fake answered call 2 all the same: a reply that crosses the cancel is no breach of the protocol.
    await worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=["d"])))


async def test_a_call_that_failed_is_not_cancelled(start_loaded: StartWorker, ring: LogRing) -> None:
    worker = await start_loaded()

    with pytest.raises(InvalidFieldError):
        await worker.call(worker_pb2.Call(detokenize=pb.DetokenizeRequest(token_ids=[999])))
    os.kill(worker.pid, signal.SIGSTOP)
    left = asyncio.create_task(worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=["a"]))))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait({left})
    os.kill(worker.pid, signal.SIGCONT)

    await eventually(lambda: "cancelled call 2" in ring.tail(10))
    assert "cancelled call 1" not in ring.tail(10)


async def test_a_generation_is_for_use_once(start_loaded: StartWorker) -> None:
    worker = await start_loaded()
    generation = worker.generate(ask(1))

    with pytest.raises(RuntimeError, match="inside `async with`"):
        await anext(generation)
    async with generation:
        await read_text(generation)
        with pytest.raises(StopAsyncIteration):
            await anext(generation)
    with pytest.raises(RuntimeError, match="twice"):
        await generation.__aenter__()


async def test_heartbeats_say_what_the_worker_does(start_loaded: StartWorker) -> None:
    worker = await start_loaded(heartbeat_seconds=0.02, tokens_per_second=100)

    async with worker.generate(ask(ENDLESS)) as running:
        await anext(running)
        await eventually(lambda: worker.heartbeat is not None and worker.heartbeat.active_sequence_count == 1)

    assert worker.last_frame_time <= asyncio.get_running_loop().time()


async def test_a_request_too_large_for_a_frame_is_refused(start_loaded: StartWorker) -> None:
    worker = await start_loaded()

    with pytest.raises(PaddockError, match="too large for a worker") as caught:
        async with worker.generate(ask(1, prompt="x" * (64 << 20))):
            pass

    assert caught.value.reason == Reason.INVALID_FIELD
    async with worker.generate(ask(2)) as generation:
        assert await read_text(generation) == expected_text(2)


async def test_a_worker_that_does_not_read_is_not_given_more(start_loaded: StartWorker) -> None:
    worker = await start_loaded()
    os.kill(worker.pid, signal.SIGSTOP)
    large = ask(1, prompt="x" * (33 << 20))

    async with worker.generate(large), worker.generate(large):
        with pytest.raises(ModelUnavailableError, match="does not take requests") as caught:
            async with worker.generate(ask(1)):
                pass

    assert caught.value.reason == Reason.QUEUE_FULL
