"""The client side of a measurement, run in a process of its own so that its CPU time is counted apart.

As cheap as a client can be: gRPC responses stay bytes, HTTP responses are searched for the few bytes that
matter. Run as `python -m bench.load`: a JSON job a line on its input, a JSON result a line on its output.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import grpc.aio

from paddock.v1 import generation_pb2, model_manager_pb2

VOCABULARY = 20_000
"""Token ids of prompts stay below: the bench model has more tokens than that."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Job:
    """Generations to run at once."""

    path: Literal["grpc", "gateway"]
    address: str
    model: str
    streams: int
    prompt_tokens: int
    max_tokens: int
    seed: int = 0
    delay: float = 0
    """Seconds to wait before the first request."""


@dataclass(slots=True)
class Result:
    """What became of a job."""

    wall_seconds: float
    cpu_seconds: float
    completion_tokens: int
    gaps_seconds: list[float] = field(default_factory=list)
    """Time between two messages with text, of all streams."""


def prompt(job: Job, stream: int) -> list[int]:
    """Return a prompt no other stream has."""
    start = 1 + 977 * (stream + 64 * job.seed)
    return [1 + (start + 31 * index) % VOCABULARY for index in range(job.prompt_tokens)]


async def run(job: Job) -> Result:
    """Run a job and measure it from the first request to the last answer."""
    one = _grpc_stream if job.path == "grpc" else _gateway_stream
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(job.address, options=options) as channel:
        if job.path == "grpc":
            await channel.channel_ready()
        await asyncio.sleep(job.delay)
        cpu, begin = _cpu_seconds(), time.perf_counter()
        times = await asyncio.gather(*(one(channel, job, stream) for stream in range(job.streams)))
        wall = time.perf_counter() - begin
    gaps = [after - before for stamps in times for before, after in pairwise(stamps)]
    return Result(wall, _cpu_seconds() - cpu, job.streams * job.max_tokens, gaps)


async def _grpc_stream(channel: grpc.aio.Channel, job: Job, stream: int) -> list[float]:
    request = model_manager_pb2.GenerateRequest(
        model=job.model,
        tokens=generation_pb2.TokenInput(token_ids=prompt(job, stream)),
        sampling=generation_pb2.SamplingParams(temperature=0),
        stop=generation_pb2.StopParams(max_tokens=job.max_tokens, ignore_eos=True),
    )
    untyped: Any = channel  # bytes in, bytes out: no serialisers
    call = untyped.unary_stream("/paddock.v1.ModelManager/Generate")
    stamps: list[float] = []
    last = b""
    async for message in call(request.SerializeToString()):
        last = message
        stamps.append(time.perf_counter())
    generated = model_manager_pb2.GenerateResponse.FromString(last).generated
    if generated.usage.completion_tokens != job.max_tokens:
        message = f"the stream ended with {generated.usage.completion_tokens} of {job.max_tokens} tokens"
        raise RuntimeError(message)
    return stamps[1:-1]


async def _gateway_stream(_channel: grpc.aio.Channel, job: Job, stream: int) -> list[float]:
    host, _, port = job.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(
        {
            "model": job.model,
            "prompt": prompt(job, stream),
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {job.address}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    stamps: list[float] = []
    tail = b""
    while data := await reader.read(65536):
        tail = (tail + data)[-2048:]
        stamps.extend([time.perf_counter()] * min(1, data.count(b"data: ")))
    writer.close()
    if b"data: [DONE]" not in tail or f'"completion_tokens":{job.max_tokens}'.encode() not in tail:
        message = f"the stream did not end with {job.max_tokens} tokens: {tail[-300:]!r}"
        raise RuntimeError(message)
    return stamps[:-1]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run jobs until standard input ends."""
    for line in sys.stdin:
        result = asyncio.run(run(Job(**json.loads(line))))
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
