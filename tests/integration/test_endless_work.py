"""A request that would keep a real worker busy without end: refused, or ended, or the worker is replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from paddock.errors import PaddockError, Reason
from paddock.v1 import generation_pb2 as gen
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import Catalog
from paddock_server.manager import ManagerConfig, ModelManager
from paddock_server.supervisor import LocalLauncher, RestartPolicy, SupervisorTimeouts
from paddock_server.worker import constrained
from tests.integration.engines import lab, refusal, request
from tests.integration.test_worker_process import environment

if TYPE_CHECKING:
    from pathlib import Path

LONG_TO_PREPARE: Final = "root ::= " + "|".join(['"a"'] * 60_000)
"""llama.cpp compares each of these alternates with all those before it: seconds on any machine."""


async def generate(manager: ModelManager, request: pb.GenerateRequest) -> int:
    """Generate as the service does; return the number of tokens."""
    tokens = 0
    lease = await manager.acquire(request.model)
    async with lease, lease.worker.generate(request) as updates:
        async for update in updates:
            tokens += sum(delta.token_count for delta in update.deltas.deltas)
    return tokens


async def test_a_model_is_served_again_after_a_grammar_that_takes_too_long_to_prepare(
    models_dir: Path,
) -> None:
    launcher = LocalLauncher(
        timeouts=SupervisorTimeouts(hang=8.0, preparation=1.5),
        extra_env={"PYTHONPATH": environment()["PYTHONPATH"]},
    )
    config = ManagerConfig(
        stop_grace_seconds=1.0, slot_count=4, restart=RestartPolicy(max_delay_seconds=0.05)
    )
    manager = ModelManager(catalog=Catalog([models_dir]), launcher=launcher, config=config)
    await manager.start()
    try:
        ordinary = pb.GenerateRequest(
            model="noise", prompt="one two", stop=gen.StopParams(max_tokens=3, ignore_eos=True)
        )
        hostile = pb.GenerateRequest(
            model="noise",
            prompt="one two",
            choice_count=4,
            constraint=gen.OutputConstraint(grammar=LONG_TO_PREPARE),
        )
        assert await generate(manager, ordinary) == 3

        with pytest.raises(PaddockError) as caught:
            await generate(manager, hostile)

        assert caught.value.reason == Reason.WORKER_CRASHED
        assert caught.value.metadata["cause"] == "it prepared one request for longer than 1.5 s"
        assert await generate(manager, ordinary) == 3
    finally:
        await manager.stop(drain_seconds=0)


def test_a_grammar_that_would_never_be_read_is_refused_by_its_field(models_dir: Path) -> None:
    rules = "".join(f"r{level} ::= r{level + 1} | r{level + 1}\n" for level in range(64))
    grammar = f'root ::= r0\n{rules}r64 ::= "a"'

    with lab(models_dir / "noise.gguf") as noise:
        error = refusal(noise.preparer, request(constraint={"grammar": grammar}))

    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "constraint.grammar")


def test_a_grammar_whose_states_double_with_every_character_ends_its_request_and_no_other(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrained, "MOST_SECONDS_PER_TOKEN", 0.05)
    doubling = 'root ::= "a" root "b" | "a" root "c" | "a" root'

    with lab(models_dir / "noise.gguf") as noise:
        endless, free = noise.generate(
            request(constraint={"grammar": doubling}),
            request(stop={"maxTokens": 30, "ignoreEos": True}),
        )

    assert endless.failure is not None
    assert (endless.failure.reason, endless.failure.field) == (Reason.INVALID_GRAMMAR, "constraint")
    assert "at most 0.05 s are allowed" in endless.failure.message
    assert free.finished.usage.completion_tokens == 30
