"""An engine on a tiny model, driven step by step in this process, and what came out of it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format

from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.worker import llama
from paddock_server.worker.engine import CancelCommand, Engine
from paddock_server.worker.errors import WorkerError
from paddock_server.worker.loading import LoadedModel, load_model
from paddock_server.worker.logs import NativeLog
from paddock_server.worker.requests import Preparer
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from pathlib import Path

LOG = NativeLog()
"""Installed once for the test process; its lines go to standard error, where pytest keeps them."""


@dataclass
class Output:
    """Everything the engine said of one generation."""

    updates: list[worker_pb2.GenerationUpdate] = field(default_factory=list[worker_pb2.GenerationUpdate])

    @property
    def deltas(self) -> list[generation_pb2.Delta]:
        return [delta for update in self.updates for delta in update.deltas.deltas]

    def of(self, choice: int) -> list[generation_pb2.Delta]:
        return [delta for delta in self.deltas if delta.choice_index == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.of(choice))

    def tokens(self, choice: int = 0) -> list[int]:
        """Return the tokens; only known when log probabilities were asked for."""
        return [entry.token_id for delta in self.of(choice) for entry in delta.logprobs]

    def end(self, choice: int = 0) -> tuple[generation_pb2.FinishReason.ValueType, str]:
        last = self.of(choice)[-1]
        return last.finish_reason, last.stop_sequence

    @property
    def failure(self) -> worker_pb2.Failure | None:
        return self.updates[-1].failed if self.updates[-1].HasField("failed") else None

    @property
    def finished(self) -> worker_pb2.GenerationFinished:
        assert self.updates[-1].HasField("finished"), self.updates[-1]
        return self.updates[-1].finished


class Lab:
    """An engine and what it sent."""

    def __init__(
        self, loaded: LoadedModel, *, cells: int | None = None, longest_gap_seconds: float = 0
    ) -> None:
        self.loaded = loaded
        self.preparer = Preparer(loaded)
        self.engine = Engine(loaded, send=self.take, cells=cells, longest_gap_seconds=longest_gap_seconds)
        self.outputs: dict[int, Output] = {}
        self.replies: dict[int, worker_pb2.Reply] = {}
        self.frames: list[worker_pb2.WorkerFrame] = []
        self._next = 1

    def take(self, frame: worker_pb2.WorkerFrame) -> None:
        self.frames.append(frame)
        if frame.HasField("reply"):
            self.replies[frame.reply.call] = frame.reply
        for update in frame.step.updates:
            self.outputs.setdefault(update.generation, Output()).updates.append(update)

    def submit(self, request: model_manager_pb2.GenerateRequest) -> int:
        number, self._next = self._next, self._next + 1
        self.engine.submit(self.preparer.generation(number, request))
        return number

    def run(self, until: Callable[[], bool] = lambda: False, *, steps: int = 20_000) -> None:
        """Step until there is nothing to do or `until` holds."""
        for _ in range(steps):
            if self.engine.idle or until():
                return
            self.engine.step()
        pytest.fail(f"not done after {steps} steps")

    def generate(self, *requests: model_manager_pb2.GenerateRequest) -> list[Output]:
        """Run requests together, each to its end."""
        numbers = [self.submit(request) for request in requests]
        self.run()
        return [self.outputs[number] for number in numbers]

    def alone(self, requests: Iterable[model_manager_pb2.GenerateRequest]) -> list[Output]:
        """Run requests one after the other."""
        return [self.generate(request)[0] for request in requests]

    def cancel(self, number: int) -> None:
        self.engine.post(CancelCommand(number))


@contextmanager
def lab(
    path: Path, *, cells: int | None = None, longest_gap_seconds: float = 0, **sizes: int
) -> Generator[Lab]:
    """Load a model for the time of a test; `sizes` are fields of `worker_pb2.Load`.

    Every step is a frame unless tokens may wait (news.py).
    """
    with load(path, **sizes) as loaded:
        made = Lab(loaded, cells=cells, longest_gap_seconds=longest_gap_seconds)
        try:
            yield made
        finally:
            made.engine.close()


def load(path: Path, **sizes: int) -> LoadedModel:
    """Load a model with one thread, which is enough and leaves the others alone."""
    LOG.install()
    llama.init_backend()
    values: dict[str, Any] = {
        "model_path": str(path),
        "context_size_tokens": 4096,
        "slot_count": 32,
        "thread_count": 1,
        "batch_size_tokens": 256,
        "queue_limit": 64,
        "target_step_milliseconds": 50,
        **sizes,
    }
    return load_model(worker_pb2.Load(**values), log=LOG)


def request(prompt: str | Sequence[int] = "Once", **fields: Any) -> model_manager_pb2.GenerateRequest:
    """Make a request, greedy unless `sampling` says otherwise; fields are written as in JSON."""
    message = model_manager_pb2.GenerateRequest()
    if isinstance(prompt, str):
        message.prompt = prompt
    else:
        message.tokens.token_ids.extend(prompt)
    json_format.ParseDict({"sampling": {"temperature": 0}, **fields}, message)
    return message


def chat(*messages: tuple[str, str], **fields: Any) -> model_manager_pb2.GenerateRequest:
    """Make a request from messages, each a role and a text."""
    turns = [{"role": f"ROLE_{role.upper()}", "content": [{"text": text}]} for role, text in messages]
    message = model_manager_pb2.GenerateRequest()
    json_format.ParseDict({"sampling": {"temperature": 0}, "chat": {"messages": turns}, **fields}, message)
    return message


def refusal(preparer: Preparer, message: model_manager_pb2.GenerateRequest) -> WorkerError:
    """Return the error a request is refused with."""
    try:
        preparer.generation(1, message).close()
    except WorkerError as error:
        return error
    pytest.fail("the request was not refused")
