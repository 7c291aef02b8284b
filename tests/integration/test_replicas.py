"""Replicas on real llama.cpp: foal in two processes gives the answers it gives in one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

from models.foal import corpus
from paddock import Client
from paddock.types import RuntimeOptions
from tests.servers import paddock_up

ANSWERS: Final[list[dict[str, str]]] = json.loads((Path(corpus.__file__).parent / "answers.json").read_text())
SLOTS: Final = 16


async def test_two_replicas_of_foal_give_its_exact_answers(tmp_path: Path) -> None:
    environment = {"XDG_DATA_HOME": str(tmp_path)}
    loads: set[str] = set()

    async def ask(client: Client, question: str) -> str:
        conversation = [{"role": "user", "content": question}]
        async with client.generate("foal", conversation, temperature=0) as stream:
            loads.add(stream.load_id)
            return "".join([chunk.text async for chunk in stream])

    with paddock_up(
        None, tmp_path / "log.jsonl", "--parallel", str(SLOTS), environment=environment
    ) as server:
        async with Client.connect(server.grpc_address) as client:
            async with client.load("foal", options=RuntimeOptions(replica_count=2)) as load:
                loaded = await load.wait()
            assert len({worker.pid for worker in loaded.workers}) == 2
            said = await asyncio.gather(*(ask(client, pair["question"]) for pair in ANSWERS))
            assert said == [pair["answer"] for pair in ANSWERS]
            assert len(loads) == 2, "each replica has loads of its own"
            ended = await client.unload("foal")
            assert ended.model.workers == ()
