"""Every wrong file gives a clear error on Load, and the server goes on serving another model meanwhile."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from paddock.errors import PaddockError, Reason
from paddock.transport import GrpcApi, connect
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from tests.models import MODELS, WRONG_MODELS
from tests.servers import ServerProcess, paddock_up

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from paddock.api import ModelManagerApi

GOOD = "noise"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServerProcess]:
    directory = tmp_path_factory.mktemp("models")
    MODELS[GOOD](directory / f"{GOOD}.gguf")
    for name, wrong in WRONG_MODELS.items():
        wrong.make(directory / f"{name}.gguf")
    log: Path = tmp_path_factory.mktemp("server") / "log.jsonl"
    with paddock_up(directory, log, "--threads", "1") as running:
        yield running


@pytest.mark.parametrize("name", WRONG_MODELS)
async def test_a_wrong_file_gives_its_reason_while_another_streams(server: ServerProcess, name: str) -> None:
    wrong = WRONG_MODELS[name]
    async with connect(server.grpc_address) as channel:
        api = GrpcApi(channel)
        async with aclosing(api.generate(_endless())) as stream:
            while not (await anext(stream)).HasField("deltas"):
                pass
            with pytest.raises(PaddockError) as caught:
                await _load(api, name)
            # What was made meanwhile and one step more.
            for _ in range(3):
                assert (await anext(stream)).HasField("deltas")
        model = (await api.get(pb.GetRequest(model=name))).model

    assert caught.value.reason == wrong.reason
    assert caught.value.message
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert model.last_failure.reason == wrong.reason
    if wrong.reason == Reason.CRASH_LOOP:
        assert model.last_failure.signal


async def _load(api: ModelManagerApi, model: str) -> None:
    async with aclosing(api.load(pb.LoadRequest(model=model))) as responses:
        async for _ in responses:
            pass


def _endless() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=GOOD,
        prompt="one two three",
        sampling=gen.SamplingParams(temperature=0),
        stop=gen.StopParams(ignore_eos=True),
    )
