"""What a model takes in a real worker is what was estimated before: each buffer, and the process in all."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import psutil
import pytest
from gguf import LlamaFileType

from paddock.errors import InvalidFieldError, PaddockError, Reason
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.catalog import model_facts, read_header
from paddock_server.memory import (
    RAM,
    Estimate,
    LoadOptions,
    MachineWatch,
    PartKind,
    Shape,
    estimate,
    model_shape,
)
from paddock_server.memory.compute import work_bytes
from paddock_server.rpc.estimates import check_cache_types
from paddock_server.supervisor import LocalLauncher, LogRing, WorkerSpec
from paddock_server.worker.v1 import worker_pb2
from tests.models.sized import SIZED, make_narrow_heads

if TYPE_CHECKING:
    from pathlib import Path

    from paddock_server.supervisor import Worker

pytestmark = pytest.mark.timeout(120)

CONTEXT: Final = 8192
SLOTS: Final = 4
BATCH: Final = 512
MICRO_BATCH: Final = 256
PROMPT: Final = 320
"""More tokens than the worker computes at once."""

MIB: Final = 1024 * 1024
LOGGED: Final = MIB / 100
"""What a size in the log is rounded to."""

BUFFER: Final = re.compile(r"(\w+)\s+(KV|RS|compute|output|model) buffer size = +([\d.]+) MiB")
KINDS: Final = {
    ("CPU", "KV"): PartKind.KV_CACHE,
    ("CPU", "RS"): PartKind.RECURRENT_STATE,
    ("CPU_Mapped", "model"): PartKind.WEIGHTS,
    ("CPU_REPACK", "model"): PartKind.REPACKED_WEIGHTS,
}


class Measured:
    """A worker that has loaded a model and used all of it."""

    def __init__(self, worker: Worker, log: LogRing) -> None:
        self.resident_bytes = psutil.Process(worker.pid).memory_info().rss
        self.logged: dict[tuple[str, str], float] = defaultdict(float)
        contexts = 0
        for line in log.tail(2000, pid=worker.pid):
            found = BUFFER.search(line)
            if found is None:
                continue
            # An encoder is tried as a generator first: the buffers of that context are gone again.
            contexts += found[2] == "output"
            if contexts > 1 and found[2] in {"output", "compute"}:
                self.logged.pop((found[1], found[2]), None)
            self.logged[found[1], found[2]] += float(found[3]) * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sized")


def made(folder: Path, name: str, file_type: LlamaFileType) -> Path:
    path = folder / f"{name}-{file_type.name}.gguf"
    return path if path.exists() else SIZED[name](path, file_type)[0]


def shape_of(path: Path) -> Shape:
    return model_shape(model_facts(read_header(path)))


async def estimated(path: Path, cache_type: str) -> Estimate:
    machine = await MachineWatch().look()
    options = LoadOptions(CONTEXT, SLOTS, BATCH, cache_type_k=cache_type, cache_type_v=cache_type)
    return estimate(shape_of(path), options, machine.placement)


def load_frame(path: Path, cache_type: str = "f16") -> worker_pb2.Load:
    return worker_pb2.Load(
        model_path=str(path),
        context_size_tokens=CONTEXT,
        gpu_layer_count=-1,
        slot_count=SLOTS,
        thread_count=1,
        batch_size_tokens=BATCH,
        queue_limit=8,
        target_step_milliseconds=50,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
    )


async def measured(path: Path, cache_type: str) -> Measured:
    """Load a model in a worker of its own and have it compute as much at once as it ever will."""
    size = shape_of(path).weights.size_bytes
    log = LogRing()
    worker = await LocalLauncher().start(WorkerSpec(model_id=path.stem, load_id="1", log=log))
    try:
        ready = await worker.load(load_frame(path, cache_type), lambda _: None, size_bytes=size)
        if ready.can_generate:
            await asyncio.gather(*(generate(worker, first) for first in range(2)))
        else:
            await worker.call(worker_pb2.Call(embed=pb.EmbedRequest(texts=["one two three " * 160])))
        return Measured(worker, log)
    finally:
        await worker.stop(grace_seconds=5)


async def generate(worker: Worker, first: int) -> None:
    request = pb.GenerateRequest()
    request.tokens.token_ids.extend(300 + first + index for index in range(PROMPT))
    request.stop.max_tokens = 4
    async with worker.generate(request) as updates:
        async for _ in updates:
            pass


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", SIZED)
async def test_an_estimate_is_what_the_worker_takes(folder: Path, name: str, cache_type: str) -> None:
    path = made(folder, name, LlamaFileType.MOSTLY_Q8_0)
    before = await estimated(path, cache_type)
    after = await measured(path, cache_type)

    total = before.totals[RAM]
    print(  # noqa: T201  a row of the table in docs/memory.md
        f"| {name} | {cache_type} |",
        *(f"{before.of(kind) / MIB:.1f} |" for kind in PartKind if kind not in NEVER_HERE),
        f"{total / MIB:.1f} | {after.resident_bytes / MIB:.1f} | {total / after.resident_bytes - 1:+.1%} |",
    )
    assert total == pytest.approx(after.resident_bytes, rel=0.10)
    check_buffers(before, after, shape_of(path))


async def test_an_estimate_counts_weights_that_the_processor_reorders(folder: Path) -> None:
    path = made(folder, "experts", LlamaFileType.MOSTLY_Q4_0)
    before = await estimated(path, "f16")
    after = await measured(path, "f16")

    assert before.totals[RAM] == pytest.approx(after.resident_bytes, rel=0.10)
    reordered = after.logged["CPU_REPACK", "model"]
    assert before.of(PartKind.REPACKED_WEIGHTS) == pytest.approx(reordered, abs=LOGGED)


NEVER_HERE: Final = {PartKind.REPACKED_WEIGHTS, PartKind.PROJECTOR, PartKind.ADAPTERS}


def check_buffers(before: Estimate, after: Measured, shape: Shape) -> None:
    """Compare with what llama.cpp logged: to the byte, but for scratch memory and its rounding."""
    for logged, kind in KINDS.items():
        assert before.of(kind) == pytest.approx(after.logged[logged], abs=2 * LOGGED), kind
    outputs = SLOTS
    if not shape.has_memory:
        # Only what 64 sequences need is there from the beginning; it grows with the texts.
        outputs = 64
        assert before.of(PartKind.OUTPUT) > after.logged["CPU", "output"]
    else:
        first = 4 * outputs * shape.vocabulary_size
        assert before.of(PartKind.OUTPUT) == first
        assert first == pytest.approx(after.logged["CPU", "output"], abs=LOGGED)
    scratch = before.of(PartKind.COMPUTE) - work_bytes(shape, MICRO_BATCH if shape.has_memory else 512)
    assert scratch == pytest.approx(after.logged["CPU", "compute"], rel=0.02)


@pytest.mark.parametrize(
    ("key", "value", "field"), [("q8_0", "f16", "cache_type_k"), ("f16", "q8_0", "cache_type_v")]
)
async def test_a_cache_type_that_does_not_suit_the_model_is_named(
    tmp_path: Path, key: str, value: str, field: str
) -> None:
    (path,) = make_narrow_heads(tmp_path / "narrow.gguf")
    frame = load_frame(path)
    frame.cache_type_k, frame.cache_type_v = key, value
    worker = await LocalLauncher().start(WorkerSpec(model_id="narrow", load_id="1", log=LogRing()))
    with pytest.raises(PaddockError) as caught:
        await worker.load(frame, lambda _: None, size_bytes=1 << 20)
    assert caught.value.reason == Reason.INVALID_FIELD
    assert field in str(caught.value)
    assert "f16 suits every model" in str(caught.value)
    options = LoadOptions(CONTEXT, SLOTS, BATCH, cache_type_k=key, cache_type_v=value)
    with pytest.raises(InvalidFieldError) as estimated:
        check_cache_types(shape_of(path), options)
    assert caught.value.message in estimated.value.message  # an estimate says the same as the worker
