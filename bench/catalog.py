"""Measures a directory of many models: the scan at start-up, one that finds nothing new, a page of List.

    python -m bench.catalog [--models 10000] [--directory EMPTY_DIRECTORY]

Everything runs in one process, without a worker: the service is called as an embedded gateway calls it, and
over gRPC. The files are the smallest that are models; of real ones the vocabulary takes its time too.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from paddock.transport import GrpcApi, connect
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.app import serving
from paddock_server.catalog import Catalog
from paddock_server.config import ServerConfig
from paddock_server.logs import configure_logging
from tests.unit.gguf_bytes import Gguf

if TYPE_CHECKING:
    from paddock.api import ModelManagerApi

ROUNDS = 20


def generate(directory: Path, count: int) -> None:
    """Write so many models: half directly in the directory, half in folders of folders."""
    original = directory / "model-00000.gguf"
    content = Gguf().write(original).read_bytes()
    for number in range(1, count):
        place = (
            directory if number % 2 else directory / f"publisher-{number % 100:02}" / f"repository-{number}"
        )
        place.mkdir(parents=True, exist_ok=True)
        (place / f"model-{number:05}.gguf").write_bytes(content)


async def page_seconds(api: ModelManagerApi, page_size: int) -> list[float]:
    """Ask for the first page some times; return how long each took."""
    seconds: list[float] = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        await api.list(pb.ListRequest(page_size=page_size))
        seconds.append(time.perf_counter() - begin)
    return seconds


async def measure_server(directory: Path) -> None:
    """Start a server over the directory and ask it for pages."""
    config = ServerConfig.load({"models_dir": (directory,), "grpc_port": 0, "state_dir": None})
    begin, used = time.perf_counter(), time.process_time()
    async with serving(config) as server, connect(server.grpc_address) as channel:
        print(
            f"server ready               {time.perf_counter() - begin:8.3f} s, "
            f"of the processor {time.process_time() - used:.3f} s"
        )
        for name, api in (("in process", server.service), ("over gRPC", GrpcApi(channel))):
            for size in (50, 1000):
                seconds = await page_seconds(api, size)
                print(
                    f"page of {size:4} {name}  first {seconds[0] * 1000:7.2f} ms, "
                    f"median {statistics.median(seconds) * 1000:7.2f} ms"
                )
        begin = time.perf_counter()
        response = await server.service.reload(pb.ReloadRequest())
        print(f"reload, {response.unchanged_count} unchanged   {time.perf_counter() - begin:8.3f} s")


def measure_scans(directory: Path) -> None:
    """Scan twice with one catalog."""
    catalog = Catalog([directory])
    for name in ("first scan", "second scan"):
        begin, used = time.perf_counter(), time.process_time()
        found = catalog.scan()
        print(
            f"{name:12} {len(found):6} models {time.perf_counter() - begin:8.3f} s, "
            f"of the processor {time.process_time() - used:.3f} s"
        )


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    configure_logging("warning", "console")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        generate(directory, arguments.models)
        measure_scans(directory)
        asyncio.run(measure_server(directory))


if __name__ == "__main__":
    main()
