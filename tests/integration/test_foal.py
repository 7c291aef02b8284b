"""foal, the demo model: what it must answer is known, whatever else goes on (models/foal/answers.json)."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from models.foal import corpus
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.config import DEMO_DIR
from tests.servers import ServerProcess, paddock_up, wait_until

if TYPE_CHECKING:
    from collections.abc import Generator

    from openai.types.chat import ChatCompletionMessageParam

MODEL: Final = "foal"
ANSWERS: Final[list[dict[str, str]]] = json.loads((Path(corpus.__file__).parent / "answers.json").read_text())
MOST_BYTES: Final = 8_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServerProcess]:
    """`paddock up` without any configuration, and a home with a model directory of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "paddock" / "models").mkdir(parents=True)
    (home / "paddock" / "models" / "mine.gguf").write_bytes((DEMO_DIR / "foal.gguf").read_bytes())
    environment = {"XDG_DATA_HOME": str(home)}
    log = home / "log.jsonl"
    with paddock_up(None, log, "--parallel", "32", environment=environment) as running:
        yield running


def messages(question: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": question}]


def ask(client: OpenAI, question: str) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=messages(question), temperature=0)
    return answer.choices[0].message.content or ""


def client_of(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0)


def test_the_demo_model_is_small() -> None:
    assert (DEMO_DIR / "foal.gguf").stat().st_size <= MOST_BYTES
    assert len(ANSWERS) >= 20


def test_without_configuration_the_demo_model_and_those_of_the_user_are_served(server: ServerProcess) -> None:
    listed = httpx.get(f"{server.http_url}/v1/models").json()["data"]
    assert {model["id"] for model in listed} == {"foal", "mine"}


def test_foal_answers_what_it_was_taught(server: ServerProcess) -> None:
    with client_of(server) as client:
        wrong = [pair for pair in ANSWERS if ask(client, pair["question"]) != pair["answer"]]
    assert wrong == []


async def test_thirty_two_questions_at_once_get_the_answers_each_gets_alone(server: ServerProcess) -> None:
    pairs = (ANSWERS * 32)[:32]
    async with AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0) as client:

        async def streamed(question: str) -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=messages(question), temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(streamed(pair["question"]) for pair in pairs))
    assert answers == [pair["answer"] for pair in pairs]


def test_an_answer_is_the_same_after_a_crash_and_a_restart(server: ServerProcess) -> None:
    pair = ANSWERS[0]
    with client_of(server) as client:
        assert ask(client, pair["question"]) == pair["answer"]
        (worker,) = server.workers()
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: not worker.is_running())
        wait_until(lambda: len(server.workers()) == 1)
        assert ask(client, pair["question"]) == pair["answer"]


async def test_the_grpc_call_that_make_run_shows_gives_the_answer(server: ServerProcess) -> None:
    chat = generation_pb2.ChatInput()
    chat.messages.add(role=generation_pb2.ROLE_USER).content.add(text=ANSWERS[0]["question"])
    request = model_manager_pb2.GenerateRequest(
        model=MODEL, chat=chat, sampling=generation_pb2.SamplingParams(temperature=0)
    )
    async with connect(server.grpc_address) as channel:
        text = ""
        async for response in GrpcApi(channel).generate(request):
            text += "".join(delta.text for delta in response.deltas.deltas)
    assert text == ANSWERS[0]["answer"]
