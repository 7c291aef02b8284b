"""Every wait of the supervisor, by name, with where its length comes from."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SupervisorTimeouts:
    """Bounds in seconds. None of them paces anything: each is the second way out of a wait for an event."""

    handshake: float = 30.0
    """From the start of the process to its `hello`. An interpreter takes 0.2 s; a cold disk and a machine
    whose cores all decode, a hundred times that."""

    hang: float = 20.0
    """Without a frame of any kind, after which a worker is killed. Ten heartbeats of two seconds: a page
    fault or a busy core delays some of them, nothing healthy delays ten."""

    step: float = 600.0
    """One step of the engine. The full batch of a large model on a slow CPU takes minutes; what takes longer
    does not end, such as a grammar whose states double with every character."""

    preparation: float = 60.0
    """Of one request: checking, rendering, tokenizing, reading its grammar. Milliseconds, and seconds for the
    longest text; what takes longer does not end. Nobody else's request is prepared meanwhile."""

    load_stall: float = 60.0
    """Without progress while weights are read. Progress comes per tensor; the largest tensors are about 2
    GiB, which a disk of 50 MB/s reads in 40 s."""

    load_base: float = 300.0
    """Constant part of the longest load."""

    load_per_gib: float = 20.0
    """Part of the longest load that grows with the file: a disk of 50 MB/s."""

    abort: float = 5.0
    """From `abort_load` to its answer, before the worker is killed instead. llama.cpp asks between
    tensors."""

    exit_after_eof: float = 0.5
    """From the end of a worker's connection to its exit. The kernel closes both in one go; the bound is for a
    worker that closed its socket and lives on, whose streams must still end within a second."""

    drain_after_exit: float = 0.4
    """From the exit to the end of the socket and of the log pipe. What was in them is there at once; the
    bound is for a grandchild that left the process group and holds them open."""

    terminate: float = 2.0
    """From SIGTERM to SIGKILL. A worker obeys SIGTERM in milliseconds or not at all."""

    kill: float = 10.0
    """From SIGKILL to the exit, before the worker is given up as unkillable. Freeing tens of gigabytes takes
    seconds; a process stuck in a driver never dies."""

    def load_stall_in_warmup(self, size_bytes: int) -> float:
        """Return how long the warm-up may go without progress: a mapped file is read by its first batch, in
        one go."""
        return self.load_stall + self.load_per_gib * size_bytes / _GIB

    def load_ceiling(self, size_bytes: int) -> float:
        """Return how long the load of a file may take, however much progress it reports."""
        return self.load_base + self.load_per_gib * size_bytes / _GIB
