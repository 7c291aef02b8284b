"""Measure Paddock beside its own engine loop with nothing around it, in one run.

    python -m bench [--short] [--rounds N] [--streams 1,8,32] [--paths grpc,gateway] [--json FILE]

For 1, 8 and 32 streams: tokens a second of the engine alone, through gRPC and through the gateway, in turns,
with the CPU time per token of every process; the memory of the idle server and of a worker; and how evenly
streams go on while a prompt of 2,000 tokens is taken in. README.md beside this says what the paths are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.processes import LineProcess, cpu_seconds, memory
from tests.models.bench import SHAPE, make_bench_model
from tests.servers import ServerProcess, paddock_gateway, paddock_up

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL: Final = "bench"
SLOTS: Final = 33
"""Room for 32 streams and one more."""

CONTEXT_TOKENS: Final = 8192
PROMPT_TOKENS: Final = 16
LONG_PROMPT_TOKENS: Final = 2000
WORKLOADS: Final = {1: 512, 8: 256, 32: 192}
"""Streams at once, and the tokens each of them makes."""

PATHS: Final = ("engine", "grpc", "gateway", "grpc.aio", "gateway alone")
PARTS: Final = ("server", "gateway", "worker", "client")
MIB: Final = 1024 * 1024


@dataclass(slots=True)
class Measurement:
    """One path with one number of streams, over all rounds."""

    rates: list[float] = field(default_factory=list[float])
    """Tokens a second."""

    cpu_us: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Microseconds of CPU time per token, by process."""

    def add(self, tokens: int, seconds: float, cpu: dict[str, float]) -> None:
        """Take in one round."""
        self.rates.append(tokens / seconds)
        for part, used in cpu.items():
            self.cpu_us.setdefault(part, []).append(used / tokens * 1e6)


class Bench:
    """The processes of one run."""

    def __init__(self, server: ServerProcess, gateway: ServerProcess, model: Path) -> None:
        self.server = server
        self.gateway = gateway
        self.model = model
        self.engine = LineProcess("bench.engine_alone", str(model), str(SLOTS), str(CONTEXT_TOKENS))
        self.client = LineProcess("bench.load")
        self.results: dict[tuple[str, int], Measurement] = {}

    def close(self) -> None:
        """End the helpers."""
        self.engine.close()
        self.client.close()

    def job(
        self, path: str, streams: int, max_tokens: int, *, prompt_tokens: int = PROMPT_TOKENS, seed: int = 0
    ) -> dict[str, Any]:
        """Return a job as the helpers take it."""
        addresses = {"gateway": self.server.http_address, "gateway alone": self.gateway.http_address}
        fields = {"path": path, "address": addresses.get(path, self.server.grpc_address)}
        fields |= {"model": MODEL, "streams": streams}
        return fields | {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "seed": seed}

    def measure(self, path: str, streams: int, max_tokens: int, seed: int) -> None:
        """Run one path once and keep what it gave."""
        measurement = self.results.setdefault((path, streams), Measurement())
        job = self.job(path, streams, max_tokens, seed=seed)
        if path == "engine":
            answer = self.engine.ask(job)
            measurement.add(
                answer["completion_tokens"], answer["wall_seconds"], {"worker": answer["cpu_seconds"]}
            )
            return
        (worker,) = self.server.workers()
        pids = {"server": self.server.process.pid, "worker": worker.pid}
        if path == "gateway alone":
            pids["gateway"] = self.gateway.process.pid
        before = {part: cpu_seconds(pid) for part, pid in pids.items()}
        answer = self.client.ask(job)
        cpu = {part: cpu_seconds(pid) - before[part] for part, pid in pids.items()}
        measurement.add(
            answer["completion_tokens"], answer["wall_seconds"], cpu | {"client": answer["cpu_seconds"]}
        )


def run(rounds: int, workloads: dict[int, int], paths: Sequence[str]) -> dict[str, Any]:
    """Measure the paths, the memory and the gaps, and return it all as a plain structure."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "models" / f"{MODEL}.gguf"
        model.parent.mkdir()
        say("making the model (about 100 million parameters, Q8_0)")
        make_bench_model(model)
        flags = ("--parallel", str(SLOTS), "--ctx-size", str(CONTEXT_TOKENS))
        with ExitStack() as stack:
            server = stack.enter_context(paddock_up(model.parent, Path(directory) / "server.jsonl", *flags))
            idle = memory(server.process.pid)  # before others run who share its libraries
            gateway_log = Path(directory) / "gateway.jsonl"
            gateway = stack.enter_context(paddock_gateway(server.grpc_address, gateway_log))
            bench = Bench(server, gateway, model)
            try:
                for path in paths[1:]:
                    bench.client.ask(bench.job(path, 1, 4))
                for seed in range(rounds):
                    for streams, max_tokens in workloads.items():
                        # Back and forth, so that a machine that grows slower or faster favours no path.
                        for path in paths if seed % 2 == 0 else reversed(paths):
                            say(f"round {seed + 1} of {rounds}: {path}, {streams} streams")
                            bench.measure(path, streams, max_tokens, seed)
                say("a long prompt beside four streams")
                return {
                    "speed": speed_rows(bench.results),
                    "memory": memory_rows(server, model, idle.pss),
                    "long_prompt": long_prompt(bench),
                }
            finally:
                bench.close()


def speed_rows(results: dict[tuple[str, int], Measurement]) -> list[dict[str, Any]]:
    """Return one row per number of streams and path; the ratio is the median of the rounds' own ratios."""
    rows: list[dict[str, Any]] = []
    for path, streams in sorted(results, key=lambda key: (key[1], PATHS.index(key[0]))):
        measured, alone = results[path, streams], results["engine", streams]
        ratios = [rate / base for rate, base in zip(measured.rates, alone.rates, strict=True)]
        row: dict[str, Any] = {"streams": streams, "path": path}
        row |= {"tokens_per_second": statistics.median(measured.rates), "ratio": statistics.median(ratios)}
        row |= {"ratio_error": standard_error(ratios), "ratios": ratios}
        row |= {f"{part}_us": statistics.median(used) for part, used in measured.cpu_us.items()}
        rows.append(row)
    return rows


def standard_error(values: Sequence[float]) -> float:
    """Return by how much the mean of so many values may well be wrong; 0 for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def memory_rows(server: ServerProcess, model: Path, idle_server: int) -> dict[str, float]:
    """Return proportional memory in MiB."""
    (worker,) = server.workers()
    used = memory(worker.pid, model)
    kv_bytes = kv_cache_bytes()
    return {
        "idle_server_mib": idle_server / MIB,
        "server_after_mib": memory(server.process.pid).pss / MIB,
        "worker_mib": used.pss / MIB,
        "worker_weights_mib": used.file_pss / MIB,
        "kv_cache_mib": kv_bytes / MIB,
        "worker_beyond_mib": (used.pss - used.file_pss - kv_bytes) / MIB,
    }


def kv_cache_bytes() -> int:
    """Return the bytes of the KV cache: keys and values of 16 bits for every cell, layer and head."""
    return CONTEXT_TOKENS * SHAPE.layers * SHAPE.heads_kv * SHAPE.head * 2 * 2


def long_prompt(bench: Bench) -> dict[str, float]:
    """Return the gaps between streams' tokens while a long prompt is taken in, in milliseconds."""
    quiet = bench.client.ask(bench.job("gateway", 4, 96))
    second = LineProcess("bench.load")
    try:
        second.ask(bench.job("gateway", 1, 1))
        stdin = second.process.stdin
        assert stdin is not None
        streams = bench.job("gateway", 4, 160, seed=1)
        stdin.write(
            json.dumps(bench.job("gateway", 1, 1, prompt_tokens=LONG_PROMPT_TOKENS, seed=2) | {"delay": 1.0})
            + "\n"
        )
        stdin.flush()
        busy = bench.client.ask(streams)
        stdout = second.process.stdout
        assert stdout is not None
        prompt = json.loads(stdout.readline())
    finally:
        second.close()
    return {
        "prompt_seconds": prompt["wall_seconds"],
        "gap_p50_ms_quiet": percentile(quiet["gaps_seconds"], 50) * 1000,
        "gap_p99_ms_quiet": percentile(quiet["gaps_seconds"], 99) * 1000,
        "gap_p50_ms_beside_prompt": percentile(busy["gaps_seconds"], 50) * 1000,
        "gap_p99_ms_beside_prompt": percentile(busy["gaps_seconds"], 99) * 1000,
        "gap_max_ms_beside_prompt": max(busy["gaps_seconds"]) * 1000,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def say(text: str) -> None:
    """Tell the person what is being done."""
    print(f"bench: {text}", flush=True)


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        f"\n{'streams':>7}  {'path':<13} {'tokens/s':>9} {'ratio':>14}   CPU us per token: "
        + "  ".join(f"{part:>7}" for part in PARTS)
    )
    for row in result["speed"]:
        used = [row.get(f"{part}_us") for part in PARTS]
        cpu = "  ".join(f"{'-':>7}" if us is None else f"{us:7.0f}" for us in used)
        rate = f"{row['tokens_per_second']:9.1f} {row['ratio']:7.3f} ±{row['ratio_error']:.3f}"
        print(f"{row['streams']:>7}  {row['path']:<13} {rate}   {'':18}{cpu}")
    for title in ("memory", "long_prompt"):
        print(f"\n{title.replace('_', ' ')}:")
        for name, value in result[title].items():
            print(f"  {name:<28} {value:9.1f}")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="one round with few tokens: that it runs, not how fast"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=_streams, default=WORKLOADS, help="numbers of streams, of 1, 8, 32")
    parser.add_argument("--paths", type=_paths, default=PATHS, help="paths beside the engine; all by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    workloads = dict.fromkeys(arguments.streams, 8) if arguments.short else arguments.streams
    result = run(1 if arguments.short else arguments.rounds, workloads, arguments.paths)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _streams(text: str) -> dict[int, int]:
    """Parse numbers of streams."""
    wanted = [int(part) for part in text.split(",")]
    if not set(wanted) <= set(WORKLOADS):
        message = f"of {', '.join(map(str, WORKLOADS))}"
        raise argparse.ArgumentTypeError(message)
    return {streams: WORKLOADS[streams] for streams in wanted}


def _paths(text: str) -> tuple[str, ...]:
    """Parse names of paths; the engine is always measured."""
    wanted = text.split(",")
    if not set(wanted) <= set(PATHS):
        message = f"of {', '.join(PATHS)}"
        raise argparse.ArgumentTypeError(message)
    return tuple(path for path in PATHS if path == PATHS[0] or path in wanted)


if __name__ == "__main__":
    main()
