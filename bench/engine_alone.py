"""The worker's engine loop with nothing around it: no server, no socket, nobody who listens.

Run as `python -m bench.engine_alone MODEL SLOTS CONTEXT`: a job (`bench.jobs.Job`) as a line of JSON in, a
result as a line of JSON out. Prompts, tokens and steps are those the server's worker gets.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from bench.jobs import Job, grpc_request, own_cpu_seconds
from paddock_server.worker.environment import set_library_environment

set_library_environment()  # as a worker does, before the import of llama_cpp

from paddock_server.worker import llama  # noqa: E402
from paddock_server.worker.engine import Engine  # noqa: E402
from paddock_server.worker.loading import load_model  # noqa: E402
from paddock_server.worker.logs import NativeLog  # noqa: E402
from paddock_server.worker.requests import Preparer  # noqa: E402
from paddock_server.worker.v1 import worker_pb2  # noqa: E402

if TYPE_CHECKING:
    from paddock_server.worker.loading import LoadedModel


class EngineAlone:
    """A loaded model whose engine is driven by the caller."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._preparer = Preparer(loaded)
        self._engine = Engine(loaded, send=self._count)
        self._tokens = 0
        self._number = 0

    def run(self, job: Job) -> dict[str, float]:
        """Run a job to its end."""
        self._tokens = 0
        cpu, begin = own_cpu_seconds(), time.perf_counter()
        for stream in range(job.streams):
            self._number += 1
            request = grpc_request(job, stream)
            self._engine.submit(self._preparer.generation(self._number, request))
        while not self._engine.idle:
            self._engine.step()
        wall = time.perf_counter() - begin
        if self._tokens != job.streams * job.max_tokens:
            message = f"made {self._tokens} of {job.streams * job.max_tokens} tokens"
            raise RuntimeError(message)
        return {
            "wall_seconds": wall,
            "cpu_seconds": own_cpu_seconds() - cpu,
            "completion_tokens": self._tokens,
        }

    def _count(self, frame: worker_pb2.WorkerFrame) -> None:
        self._tokens += sum(
            delta.token_count for update in frame.step.updates for delta in update.deltas.deltas
        )


def main() -> None:
    """Load the model and run jobs until standard input ends."""
    path, slots, context = sys.argv[1:4]
    log = NativeLog()
    log.install()
    llama.init_backend()
    request = worker_pb2.Load(
        model_path=path,
        context_size_tokens=int(context),
        gpu_layer_count=-1,
        slot_count=int(slots),
        batch_size_tokens=512,
        queue_limit=128,
        target_step_milliseconds=50,
    )
    engine = EngineAlone(load_model(request, log=log))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(engine.run(Job(**json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
