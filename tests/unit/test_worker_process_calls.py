"""What a worker's main and answer threads do with calls, without a model: stubs stand for the engine."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, cast

import pytest

from paddock.v1 import model_manager_pb2
from paddock_server.worker.embed import EmbedJob
from paddock_server.worker.engine import CancelCallCommand
from paddock_server.worker.process import WorkerProcess
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from paddock_server.worker.connection import Connection
    from paddock_server.worker.engine import Command, Engine
    from paddock_server.worker.logs import NativeLog
    from paddock_server.worker.requests import Preparer

STOP = 99
"""Number of the call with which the stub of a preparer ends the answer thread's loop."""


class LoopEnd(BaseException):
    """Ends a loop that has no end of its own."""


class SentFrames:
    """Stands for the connection."""

    def __init__(self) -> None:
        self.replies: list[worker_pb2.Reply] = []

    def send(self, frame: worker_pb2.WorkerFrame) -> None:
        self.replies.append(frame.reply)


class PostedCommands:
    """Stands for the engine."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def post(self, command: Command) -> None:
        self.commands.append(command)


class CancelledMeanwhile:
    """Stands for the preparer; while it prepares a call, the server's cancel of it arrives."""

    def __init__(self, process: WorkerProcess) -> None:
        self._process = process

    def embedding(self, call: int, request: model_manager_pb2.EmbedRequest) -> EmbedJob:
        if call == STOP:
            raise LoopEnd
        cancel(self._process, call)
        return EmbedJob(call, [array("i", [1])] * len(request.texts), normalize=False)

    def answer(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        cancel(self._process, call.call)
        return worker_pb2.Reply(call=call.call, tokenize=model_manager_pb2.TokenizeResponse())


class Bench:
    """A worker process that has loaded, as far as its main thread can tell, and whose threads do not run."""

    def __init__(self, *, most_waiting: int = 8) -> None:
        self.sent = SentFrames()
        self.engine = PostedCommands()
        self.process = WorkerProcess(
            cast("Connection", self.sent), cast("NativeLog", None), exit_process=lambda _: None
        )
        self.process._engine = cast("Engine", self.engine)
        self.process._most_waiting = most_waiting

    def answer_all(self) -> None:
        """Run the answer thread's loop over what waits."""
        embed(self.process, STOP)
        preparer = CancelledMeanwhile(self.process)
        with pytest.raises(LoopEnd):
            self.process._answer(cast("Engine", self.engine), cast("Preparer", preparer))


def embed(process: WorkerProcess, call: int) -> None:
    request = model_manager_pb2.EmbedRequest(texts=["a"])
    process._dispatch(worker_pb2.ServerFrame(call=worker_pb2.Call(call=call, embed=request)))


def tokenize(process: WorkerProcess, call: int) -> None:
    request = model_manager_pb2.TokenizeRequest(text="a")
    process._dispatch(worker_pb2.ServerFrame(call=worker_pb2.Call(call=call, tokenize=request)))


def cancel(process: WorkerProcess, call: int) -> None:
    process._dispatch(worker_pb2.ServerFrame(cancel_call=worker_pb2.CancelCall(call=call)))


def test_more_calls_than_may_wait_are_refused_and_no_others() -> None:
    bench = Bench(most_waiting=2)

    for call in range(1, 6):
        tokenize(bench.process, call)

    assert [reply.call for reply in bench.sent.replies] == [4, 5]
    assert {reply.failed.reason for reply in bench.sent.replies} == {"QUEUE_FULL"}
    cancel(bench.process, 2)
    tokenize(bench.process, 6)
    assert len(bench.sent.replies) == 2, "a call that was cancelled makes room"


def test_a_call_cancelled_before_it_is_answered_reaches_neither_engine_nor_server() -> None:
    bench = Bench()
    embed(bench.process, 1)
    tokenize(bench.process, 2)

    for call in (1, 2):
        cancel(bench.process, call)
    bench.answer_all()

    assert not bench.engine.commands
    assert not bench.sent.replies


def test_a_call_cancelled_while_it_is_tokenized_is_cancelled_in_the_engine_behind_its_job() -> None:
    bench = Bench()
    embed(bench.process, 1)

    bench.answer_all()

    job, command = bench.engine.commands
    assert isinstance(job, EmbedJob)
    assert command == CancelCallCommand(1)


def test_an_answer_to_a_call_cancelled_meanwhile_is_not_sent() -> None:
    bench = Bench()
    tokenize(bench.process, 1)

    bench.answer_all()

    assert not bench.sent.replies


def test_the_cancel_of_a_call_that_is_not_waiting_goes_to_the_engine() -> None:
    bench = Bench()

    cancel(bench.process, 7)

    assert bench.engine.commands == [CancelCallCommand(7)]
