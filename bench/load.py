"""The client side of a measurement, run in a process of its own so that its CPU time is counted apart.

As cheap as a client can be, so that the figures are the server's: sockets, and no more understanding of what
comes than it takes to count it. `grpc.aio` is the exception: there a Python client reads, as users do.
Run as `python -m bench.load`: a JSON job a line on its input, a JSON result a line on its output.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Final

import grpc.aio

from bench import http2
from bench.jobs import Job, Result, check_last_message, grpc_request, own_cpu_seconds, prompt

METHOD: Final = "/paddock.v1.ModelManager/Generate"
READ_BYTES: Final = 65536
TIMEOUT_SECONDS: Final = 300.0


def run(job: Job) -> Result:
    """Run a job and measure it from the first request to the last answer."""
    if job.path == "grpc.aio":
        return asyncio.run(_run_grpc_aio(job))
    return _run_grpc(job) if job.path == "grpc" else _run_http(job)


def _result(job: Job, begin: float, cpu: float, times: list[list[float]]) -> Result:
    wall = time.perf_counter() - begin
    gaps = [after - before for stamps in times for before, after in pairwise(stamps)]
    return Result(wall, own_cpu_seconds() - cpu, job.streams * job.max_tokens, gaps)


def _connect(job: Job) -> socket.socket:
    host, _, port = job.address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _run_grpc(job: Job) -> Result:
    """Run all streams over one connection, as a channel does."""
    numbers = range(1, 2 * job.streams, 2)
    calls = [
        http2.request(number, job.address, METHOD, grpc_request(job, index).SerializeToString())
        for index, number in enumerate(numbers)
    ]
    with _connect(job) as sock:
        sock.sendall(http2.opening())
        time.sleep(job.delay)
        cpu, begin = own_cpu_seconds(), time.perf_counter()
        sock.sendall(b"".join(calls))
        reader = _GrpcReader(sock, list(numbers))
        while reader.open:
            reader.read()
        for last in reader.last.values():
            check_last_message(job, last)
        return _result(job, begin, cpu, [stamps[1:-1] for stamps in reader.stamps.values()])


class _GrpcReader:
    """Reads the answers of the streams of one connection."""

    def __init__(self, sock: socket.socket, numbers: list[int]) -> None:
        self.open = set(numbers)
        self.last = dict.fromkeys(numbers, b"")
        self.stamps: dict[int, list[float]] = {number: [] for number in numbers}
        self._sock = sock
        self._buffer = bytearray()
        self._partial = {number: bytearray() for number in numbers}

    def read(self) -> None:
        """Wait for bytes and take in what they complete."""
        data = self._sock.recv(READ_BYTES)
        if not data:
            text = "the server closed the connection"
            raise RuntimeError(text)
        now = time.perf_counter()
        self._buffer += data
        for kind, flags, stream, payload in http2.frames(self._buffer):
            if kind == http2.DATA:
                partial = self._partial[stream]
                partial += payload
                for message in http2.messages(partial):
                    self.last[stream] = message
                    self.stamps[stream].append(now)
            elif kind == http2.PING and not flags & http2.ACK:
                self._sock.sendall(http2.frame(http2.PING, http2.ACK, 0, payload))
            elif kind == http2.SETTINGS and not flags & http2.ACK:
                self._sock.sendall(http2.frame(http2.SETTINGS, http2.ACK, 0, b""))
            elif kind in (http2.RST_STREAM, http2.GOAWAY):
                text = f"the server ended stream {stream}: {payload!r}"
                raise RuntimeError(text)
            if kind in (http2.DATA, http2.HEADERS) and flags & http2.END_STREAM:
                self.open.discard(stream)


def _run_http(job: Job) -> Result:
    """Run every stream over a connection of its own, as HTTP/1.1 has it."""
    requests = [_http_request(job, stream) for stream in range(job.streams)]
    socks = [_connect(job) for _ in requests]
    streams = {sock.fileno(): _HttpStream(sock) for sock in socks}
    time.sleep(job.delay)
    cpu, begin = own_cpu_seconds(), time.perf_counter()
    for sock, request in zip(socks, requests, strict=True):
        sock.sendall(request)
    if len(socks) == 1:
        while streams[socks[0].fileno()].read():
            pass
    else:
        _read_all(dict(streams))
    for stream in streams.values():
        stream.check(job)
    return _result(job, begin, cpu, [stream.stamps[:-1] for stream in streams.values()])


def _read_all(streams: dict[int, _HttpStream]) -> None:
    with select.epoll() as poll:  # which forgets a socket that is closed
        for number in streams:
            poll.register(number, select.EPOLLIN)
        while streams:
            for number, _ in poll.poll(TIMEOUT_SECONDS):
                if not streams[number].read():
                    del streams[number]


class _HttpStream:
    """Reads one answer of server-sent events."""

    def __init__(self, sock: socket.socket) -> None:
        self.stamps: list[float] = []
        self._sock = sock
        self._tail = b""

    def read(self) -> bool:
        """Wait for bytes and count them in; False at the end."""
        data = self._sock.recv(READ_BYTES)
        if not data:
            self._sock.close()
            return False
        if b"data: " in data:
            self.stamps.append(time.perf_counter())
        self._tail = data if len(data) > 2048 else (self._tail + data)[-2048:]
        return True

    def check(self, job: Job) -> None:
        """Make sure the stream made all of its tokens."""
        if b"data: [DONE]" in self._tail and f'"completion_tokens":{job.max_tokens}'.encode() in self._tail:
            return
        text = f"the stream did not end with {job.max_tokens} tokens: {self._tail[-300:]!r}"
        raise RuntimeError(text)


def _http_request(job: Job, stream: int) -> bytes:
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
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def _run_grpc_aio(job: Job) -> Result:
    async with grpc.aio.insecure_channel(job.address) as channel:
        await channel.channel_ready()
        await asyncio.sleep(job.delay)
        cpu, begin = own_cpu_seconds(), time.perf_counter()
        times = await asyncio.gather(
            *(_grpc_aio_stream(channel, job, stream) for stream in range(job.streams))
        )
        return _result(job, begin, cpu, times)


async def _grpc_aio_stream(channel: grpc.aio.Channel, job: Job, stream: int) -> list[float]:
    untyped: Any = channel  # bytes in, bytes out: no serialisers
    call = untyped.unary_stream(METHOD)
    stamps: list[float] = []
    last = b""
    async for message in call(grpc_request(job, stream).SerializeToString()):
        last = message
        stamps.append(time.perf_counter())
    check_last_message(job, last)
    return stamps[1:-1]


def main() -> None:
    """Run jobs until standard input ends."""
    for line in sys.stdin:
        result = run(Job(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
