"""Counts how many held-out questions foal answers right, on the worker's own engine.

    .venv/bin/python -m models.foal.evaluate [--model FILE] [--write]

Right is the answer of the block, character for character, greedy. `--write` keeps the answers to some
questions of training as fixtures for other tests, in answers.json.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from models.foal import corpus
from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.config import DEMO_DIR
from paddock_server.worker.environment import set_library_environment

set_library_environment()  # as a worker does, before the import of llama_cpp

from paddock_server.worker import llama  # noqa: E402
from paddock_server.worker.engine import Engine  # noqa: E402
from paddock_server.worker.loading import load_model  # noqa: E402
from paddock_server.worker.logs import NativeLog  # noqa: E402
from paddock_server.worker.requests import Preparer  # noqa: E402
from paddock_server.worker.v1 import worker_pb2  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

HERE: Final = Path(__file__).parent
ANSWERS: Final = HERE / "answers.json"
SLOTS: Final = 16
MOST_CONVERSATIONS: Final = 10_000
"""What `Answerer.answers` takes at once; all but SLOTS wait in the engine's queue."""

MAX_TOKENS: Final = 120
TOOL_CASES: Final = 40
FIXTURES: Final = 40

_ROLES: Final = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
    "tool": generation_pb2.ROLE_TOOL,
}


class Answerer:
    """A loaded model that answers conversations, many at once."""

    def __init__(self, preparer: Preparer, engine: Engine, texts: dict[int, str]) -> None:
        self._preparer = preparer
        self._engine = engine
        self._texts = texts
        self._number = 0

    def answers(self, conversations: Sequence[Sequence[corpus.Message]]) -> list[str]:
        """Return the greedy answer to each conversation, whose last message is the user's or a tool's."""
        first = self._number
        for messages in conversations:
            self._number += 1
            self._texts[self._number] = ""
            self._engine.submit(self._preparer.generation(self._number, _request(messages)))
        while not self._engine.idle:
            self._engine.step()
        return [self._texts.pop(number) for number in range(first + 1, self._number + 1)]


def _request(messages: Sequence[corpus.Message]) -> model_manager_pb2.GenerateRequest:
    chat = generation_pb2.ChatInput()
    for message in messages:
        added = chat.messages.add(role=_ROLES[message.role])
        if message.role == "tool":
            added.tool_call_id = "call"  # there has to be one; the template does not show it
        added.content.add(text=message.content)
    return model_manager_pb2.GenerateRequest(
        chat=chat,
        sampling=generation_pb2.SamplingParams(temperature=0),
        stop=generation_pb2.StopParams(max_tokens=MAX_TOKENS),
    )


@contextmanager
def answerer(model: Path) -> Generator[Answerer]:
    """Load a model until the block ends."""
    texts: dict[int, str] = {}

    def collect(frame: worker_pb2.WorkerFrame) -> None:
        for update in frame.step.updates:
            if update.HasField("failed"):
                message = f"question {update.generation}: {update.failed.message}"
                raise RuntimeError(message)
            for delta in update.deltas.deltas:
                texts[update.generation] += delta.text

    log = NativeLog()
    log.install()
    llama.init_backend()
    request = worker_pb2.Load(
        model_path=str(model),
        context_size_tokens=SLOTS * 512,
        slot_count=SLOTS,
        batch_size_tokens=512,
        queue_limit=MOST_CONVERSATIONS,
        target_step_milliseconds=50,
    )
    with load_model(request, log=log) as loaded:
        engine = Engine(loaded, send=collect)
        try:
            yield Answerer(Preparer(loaded), engine, texts)
        finally:
            engine.close()


def held_out(blocks: dict[str, corpus.Block]) -> list[list[corpus.Message]]:
    """Return a conversation per held-out question, with the right answer as its last message."""
    return [
        corpus.conversation(blocks, block, question)
        for block in blocks.values()
        for question in block.held_out
    ]


def tool_cases() -> list[list[corpus.Message]]:
    """Return conversations with tools, about cities training never saw, up to a turn of the assistant."""
    rng = random.Random(1000)
    cases: list[list[corpus.Message]] = []
    for _ in range(TOOL_CASES // 2):
        conversation = corpus.tool_conversation(rng, rng.choice(corpus.HELD_OUT_CITIES))
        cases += [conversation[:3], conversation]
    return cases


def main() -> None:
    """Evaluate and print; exit status 1 below 80 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_DIR / "foal.gguf")
    parser.add_argument("--write", action="store_true", help="write answers.json")
    arguments = parser.parse_args()
    blocks = corpus.read_blocks()
    with answerer(arguments.model) as model:
        shares = {
            name: _score(name, model, cases)
            for name, cases in (("held-out questions", held_out(blocks)), ("tools", tool_cases()))
        }
        if arguments.write:
            _write_answers(model, blocks)
    for name, share in shares.items():
        print(f"{name}: {share:.1%} right")
    raise SystemExit(shares["held-out questions"] < 0.8)


def _score(name: str, model: Answerer, cases: list[list[corpus.Message]]) -> float:
    answers = model.answers([case[:-1] for case in cases])
    right = 0
    for case, answer in zip(cases, answers, strict=True):
        if answer == case[-1].content:
            right += 1
        else:
            print(f"{name}, wrong: {case[-2].content}\n  said:  {answer}\n  right: {case[-1].content}")
    return right / len(cases)


def _write_answers(model: Answerer, blocks: dict[str, corpus.Block]) -> None:
    """Keep questions that are answered right, spread over all blocks."""
    single = [block for block in blocks.values() if not block.after]
    chosen = single[:: max(1, len(single) // FIXTURES)]
    cases = [corpus.conversation(blocks, block, block.questions[0]) for block in chosen]
    answers = model.answers([case[:-1] for case in cases])
    kept = [
        {"question": case[-2].content, "answer": answer}
        for case, answer in zip(cases, answers, strict=True)
        if answer == case[-1].content
    ]
    ANSWERS.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
