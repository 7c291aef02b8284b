"""foal, the demo model: what it must answer is known, whatever else goes on (models/foal/answers.json)."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from models.foal import corpus
from paddock import Client, ModelChanged, ModelState
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.config import DEMO_DIR
from tests.servers import ServerProcess, paddock_up, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

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


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[], AbstractContextManager[ServerProcess]]:
    """What starts a server with room for one model, always on the same directories."""
    models = tmp_path / "models"
    models.mkdir()
    for name in (MODEL, "mine"):
        (models / f"{name}.gguf").write_bytes((DEMO_DIR / "foal.gguf").read_bytes())
    flags = ("--models-max", "1", "--state-dir", str(tmp_path / "state"))
    return lambda: paddock_up(models, tmp_path / "log.jsonl", *flags)


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


async def wrong_on_both_fronts(server: ServerProcess) -> list[tuple[str, str, str]]:
    """Ask some of the questions over HTTP and over gRPC; return front, question and answer of wrong ones."""
    wrong: list[tuple[str, str, str]] = []
    async with (
        AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0) as http,
        Client.connect(server.grpc_address) as grpc,
    ):
        for pair in ANSWERS[:6]:
            asked = messages(pair["question"])
            over_http = await http.chat.completions.create(model=MODEL, messages=asked, temperature=0)
            over_grpc = await grpc.complete(
                MODEL, [{"role": "user", "content": pair["question"]}], temperature=0
            )
            answers = {"HTTP": over_http.choices[0].message.content, "gRPC": over_grpc.choices[0].text}
            wrong += [
                (front, pair["question"], str(answer))
                for front, answer in answers.items()
                if answer != pair["answer"]
            ]
    return wrong


async def test_answers_are_the_same_after_eviction_and_reload(
    alone: Callable[[], AbstractContextManager[ServerProcess]],
) -> None:
    with alone() as server:
        async with Client.connect(server.grpc_address) as client:
            for _ in range(2):
                assert await wrong_on_both_fronts(server) == []
                await client.complete("mine", "x", max_tokens=1)
                assert (await client.get(MODEL)).state is ModelState.UNLOADED
            assert await wrong_on_both_fronts(server) == []


async def test_answers_are_the_same_after_sleep_and_wake(
    alone: Callable[[], AbstractContextManager[ServerProcess]],
) -> None:
    with alone() as server:
        async with Client.connect(server.grpc_address) as client:
            for _ in range(2):
                assert await wrong_on_both_fronts(server) == []
                assert (await client.sleep(MODEL)).state is ModelState.SLEEPING
            assert await wrong_on_both_fronts(server) == []


async def test_answers_are_the_same_after_the_server_was_killed_and_started_again(
    alone: Callable[[], AbstractContextManager[ServerProcess]],
) -> None:
    with alone() as server:
        async with Client.connect(server.grpc_address) as client, client.load(MODEL) as load:
            async for _ in load:
                pass
        assert await wrong_on_both_fronts(server) == []
        workers = server.workers()
        server.process.kill()
        assert await asyncio.to_thread(psutil.wait_procs, workers, 10) == (workers, [])
    with alone() as server:
        # It comes back by itself: nobody asks for it before it is loaded.
        async with Client.connect(server.grpc_address) as client, client.watch([MODEL]) as watch:
            async for event in watch:
                if isinstance(event, ModelChanged) and event.model.state is ModelState.LOADED:
                    break
        assert await wrong_on_both_fronts(server) == []


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
