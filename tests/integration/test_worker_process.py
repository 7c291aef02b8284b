"""A worker process, spoken to in frames over a socket pair as the server does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from paddock.v1 import model_manager_pb2
from paddock_server.worker.framing import PROTOCOL_VERSION, FrameDecoder, encode_frame
from paddock_server.worker.process import HEARTBEAT_SECONDS
from paddock_server.worker.v1 import worker_pb2
from tests.integration.engines import request
from tests.models import WRONG_MODELS
from tests.models.bench import make_bench_model

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROOT = Path(__file__).parents[2]
BOUND_SECONDS = 30.0
"""Way out for a test whose worker never answers."""
LONG_TEXTS = ["The morning. " * 160] * 64
"""What to embed in 64 batches, half a second's work."""


class Peer:
    """The server's side of a worker."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self.socket = sock
        self._decoder = FrameDecoder()
        self._frames: list[worker_pb2.WorkerFrame] = []

    def send(self, **frame: Any) -> None:
        self.socket.sendall(encode_frame(worker_pb2.ServerFrame(**frame)))

    def next(self) -> worker_pb2.WorkerFrame:
        """Return the next frame that is no heartbeat."""
        while True:
            frame = self.next_of_any_kind()
            if not frame.HasField("heartbeat"):
                return frame

    def next_of_any_kind(self) -> worker_pb2.WorkerFrame:
        while not self._frames:
            data = self.socket.recv(65536)
            if not data:
                pytest.fail(f"the worker closed the socket: {self.log()}")
            self._frames += [worker_pb2.WorkerFrame.FromString(body) for body in self._decoder.feed(data)]
        return self._frames.pop(0)

    def load(self, path: Path, **sizes: Any) -> worker_pb2.WorkerFrame:
        """Load a model; returns the frame that ends the load."""
        self.send(load=load_frame(path, **sizes))
        while True:
            frame = self.next()
            if not frame.HasField("load_progress"):
                return frame

    def start(self, number: int, message: model_manager_pb2.GenerateRequest) -> None:
        self.send(start=worker_pb2.Start(generation=number, request=message))

    def updates(self, number: int) -> Generator[worker_pb2.GenerationUpdate]:
        """Yield the updates of one generation to its end."""
        while True:
            for update in self.next().step.updates:
                if update.generation == number:
                    yield update
                    if update.HasField("finished") or update.HasField("failed"):
                        return

    def exit_code(self) -> int:
        return self.process.wait(BOUND_SECONDS)

    def log(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read().decode("utf-8", "replace")


def load_frame(path: Path, **sizes: Any) -> worker_pb2.Load:
    values: dict[str, Any] = {
        "model_path": str(path),
        "context_size_tokens": 2048,
        "slot_count": 4,
        "thread_count": 1,
        "batch_size_tokens": 256,
        "queue_limit": 8,
        "target_step_milliseconds": 50,
        **sizes,
    }
    return worker_pb2.Load(**values)


def environment() -> dict[str, str]:
    """Return the environment of a worker that finds this source tree."""
    path = os.pathsep.join(str(ROOT / part) for part in ("clients/python", "server", "gateway"))
    return {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}


@contextmanager
def worker(*, parent_pid: int | None = None, greet: bool = True) -> Generator[Peer]:
    """Start a worker as the launcher does, and leave none behind."""
    ours, theirs = socket.socketpair()
    ours.settimeout(BOUND_SECONDS)
    parent = os.getpid() if parent_pid is None else parent_pid
    arguments = ["--fd", str(theirs.fileno()), "--instance-id", "token", "--parent-pid", str(parent)]
    process = subprocess.Popen(
        [sys.executable, "-m", "paddock_server.worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env=environment(),
    )
    theirs.close()
    with ours, process:
        try:
            peer = Peer(process, ours)
            if greet:
                assert peer.next_of_any_kind().HasField("hello")
            yield peer
        finally:
            process.kill()


@pytest.fixture
def noise(models_dir: Path) -> Path:
    return models_dir / "noise.gguf"


def test_the_first_frame_introduces_the_worker() -> None:
    with worker(greet=False) as peer:
        hello = peer.next_of_any_kind().hello
        assert hello.protocol_version == PROTOCOL_VERSION
        assert hello.instance_id == "token"
        assert hello.pid == peer.process.pid
        assert hello.engine.startswith("llama-cpp-python 0.")


def test_a_worker_whose_parent_is_gone_already_exits(tmp_path: Path) -> None:
    with worker(parent_pid=1, greet=False) as peer:
        assert peer.exit_code() == 0


def test_a_load_reports_both_stages_from_0_to_1_and_then_ready(noise: Path) -> None:
    with worker() as peer:
        peer.send(load=load_frame(noise))
        progress: list[tuple[int, float]] = []
        while (frame := peer.next()).HasField("load_progress"):
            progress.append((frame.load_progress.stage, frame.load_progress.fraction))
        assert progress[0] == (worker_pb2.LOAD_STAGE_WEIGHTS, 0)
        assert (worker_pb2.LOAD_STAGE_WEIGHTS, 1) in progress
        assert (worker_pb2.LOAD_STAGE_WARMUP, 0) in progress
        assert progress[-1] == (worker_pb2.LOAD_STAGE_WARMUP, 1)
        assert progress == sorted(progress)
        ready = frame.ready
        assert (ready.context_size_tokens, ready.sequence_limit_tokens, ready.slot_count) == (2048, 2048, 4)
        assert (ready.vocabulary_size, ready.trained_context_tokens) == (709, 2048)
        assert ready.has_chat_template
        assert ready.can_generate
        assert ready.weight_bytes > 3_000_000
        assert ready.parameter_count == 858752
        assert ready.thread_count == 1


def test_a_model_in_shards_loads_from_its_first(models_dir: Path) -> None:
    with worker() as peer:
        frame = peer.load(models_dir / "sharded" / "sharded-00001-of-00003.gguf", context_size_tokens=0)
        assert frame.ready.parameter_count == 858752
        assert frame.ready.context_size_tokens == frame.ready.trained_context_tokens


def test_generations_calls_and_heartbeats_share_the_socket(noise: Path) -> None:
    with worker() as peer:
        peer.load(noise)
        peer.start(1, request("A", stop={"maxTokens": 20, "ignoreEos": True}))
        peer.start(2, request("B", sampling={"topP": 7}))
        peer.start(3, request("C", stop={"maxTokens": 20, "ignoreEos": True}))
        for call, message in enumerate(("The lamp", "Fish"), start=1):
            question = model_manager_pb2.TokenizeRequest(text=message)
            peer.send(call=worker_pb2.Call(call=call, tokenize=question))
        peer.send(call=worker_pb2.Call(call=3, embed=model_manager_pb2.EmbedRequest(texts=["Fish"])))
        peer.send(
            call=worker_pb2.Call(call=4, detokenize=model_manager_pb2.DetokenizeRequest(token_ids=[-1]))
        )
        updates: dict[int, list[worker_pb2.GenerationUpdate]] = {1: [], 2: [], 3: []}
        replies: dict[int, worker_pb2.Reply] = {}
        ended: set[int] = set()
        while len(ended) < 3 or len(replies) < 4:
            frame = peer.next()
            if frame.HasField("reply"):
                replies[frame.reply.call] = frame.reply
            for update in frame.step.updates:
                assert update.generation not in ended
                updates[update.generation].append(update)
                if update.HasField("finished") or update.HasField("failed"):
                    ended.add(update.generation)
        assert updates[2][0].failed.field == "sampling.top_p"
        for number in (1, 3):
            assert updates[number][0].HasField("started")
            assert not any(update.HasField("started") for update in updates[number][1:])
            assert updates[number][-1].finished.usage.completion_tokens == 20
        assert replies[1].tokenize.token_ids != replies[2].tokenize.token_ids
        assert len(replies[3].embed.embeddings[0].values) == 128
        assert replies[4].failed.reason == "INVALID_FIELD"


def test_heartbeats_come_while_idle_and_while_computing(noise: Path) -> None:
    with worker() as peer:
        while not peer.next_of_any_kind().HasField("heartbeat"):
            pass
        peer.load(noise)
        peer.start(1, request("A", stop={"maxTokens": 2000, "ignoreEos": True}))
        beats: list[worker_pb2.Heartbeat] = []
        while len(beats) < 2:
            frame = peer.next_of_any_kind()
            if frame.HasField("heartbeat"):
                beats.append(frame.heartbeat)
        assert beats[-1].step_count > 0


def test_heartbeats_come_in_the_middle_of_a_decode_that_is_longer_than_their_interval(tmp_path: Path) -> None:
    (path,) = make_bench_model(tmp_path / "bench.gguf")
    with worker() as peer:
        peer.load(path, context_size_tokens=8192, batch_size_tokens=8192)
        peer.start(1, request("abc " * 3000, stop={"maxTokens": 1}))
        beats: list[worker_pb2.Heartbeat] = []
        while not any(beat.step_milliseconds > HEARTBEAT_SECONDS * 1000 for beat in beats):
            frame = peer.next_of_any_kind()
            assert not frame.step.updates or not frame.step.updates[0].HasField("finished"), beats
            if frame.HasField("heartbeat"):
                beats.append(frame.heartbeat)


def test_cancel_stops_a_generation_and_frees_its_slot(noise: Path) -> None:
    with worker() as peer:
        peer.load(noise, slot_count=1)
        peer.start(1, request("A", stop={"ignoreEos": True}))
        peer.start(2, request("B", stop={"maxTokens": 3, "ignoreEos": True}))
        next(peer.updates(1))
        peer.send(cancel=worker_pb2.Cancel(generation=1))
        peer.send(cancel=worker_pb2.Cancel(generation=77))
        assert [*peer.updates(2)][-1].finished.usage.completion_tokens == 3


def test_a_generation_cancelled_at_once_is_not_computed(noise: Path) -> None:
    with worker() as peer:
        peer.load(noise, slot_count=1, context_size_tokens=0)
        for number in range(1, 6):
            peer.start(number, request("A " * 300, stop={"ignoreEos": True}))
            peer.send(cancel=worker_pb2.Cancel(generation=number))
        peer.start(9, request("B", stop={"maxTokens": 3, "ignoreEos": True}))
        assert [*peer.updates(9)][-1].finished.usage.completion_tokens == 3


def embed(peer: Peer, call: int, *texts: str) -> None:
    """Ask for embeddings; `Peer.next` brings the answer."""
    peer.send(call=worker_pb2.Call(call=call, embed=model_manager_pb2.EmbedRequest(texts=texts)))


def test_a_cancelled_embedding_frees_the_engine_for_the_next(models_dir: Path) -> None:
    with worker() as peer:
        peer.load(models_dir / "embed.gguf")
        embed(peer, 1, "Fish")
        assert peer.next().reply.call == 1
        for call in range(2, 11):
            embed(peer, call, *LONG_TEXTS)
        question = model_manager_pb2.TokenizeRequest(text="Fish")
        peer.send(call=worker_pb2.Call(call=11, tokenize=question))
        answered: list[int] = []
        while (reply := peer.next().reply).call != 11:  # answered behind them: all are in the engine then
            answered.append(reply.call)
        for call in (*range(1, 11), 77):  # answered, in the engine, unknown
            peer.send(cancel_call=worker_pb2.CancelCall(call=call))
        embed(peer, 12, "Fish")
        while (reply := peer.next().reply).call != 12:
            answered.append(reply.call)
        assert len(reply.embed.embeddings) == 1
        # Were this thread slow, the first could be over before its cancel is sent; hardly all of them.
        assert len(answered) < 9


def test_more_embeddings_than_may_wait_are_refused_and_the_others_served(models_dir: Path) -> None:
    with worker() as peer:
        peer.load(models_dir / "embed.gguf", slot_count=1, queue_limit=0)
        calls = range(1, 21)
        for call in calls:
            embed(peer, call, *LONG_TEXTS)
        replies = [peer.next().reply for _ in calls]
        assert sorted(reply.call for reply in replies) == [*calls]
        served = {reply.call for reply in replies if len(reply.embed.embeddings) == len(LONG_TEXTS)}
        refused = {reply.call for reply in replies if reply.failed.reason == "QUEUE_FULL"}
        assert 1 in served
        assert refused
        assert served | refused == {*calls}
        embed(peer, 21, "Fish")
        assert len(peer.next().reply.embed.embeddings) == 1


def test_a_template_that_loops_delays_nobody_who_streams(noise: Path, tmp_path: Path) -> None:
    from tests.models import make_noise

    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (path,) = make_noise(tmp_path / "loops.gguf", chat_template=loop)
    with worker() as peer:
        peer.load(path)
        peer.start(1, request("A", stop={"ignoreEos": True, "maxTokens": 400}))
        next(peer.updates(1))
        message = model_manager_pb2.GenerateRequest()
        message.chat.messages.add(role=2).content.add(text="Hi")
        peer.start(2, message)
        ends: list[int] = []
        while len(ends) < 2:
            for update in peer.next().step.updates:
                if update.HasField("finished"):
                    ends.append(update.generation)
                if update.HasField("failed"):
                    assert update.failed.reason == "TEMPLATE_ERROR"
                    ends.append(update.generation)
        assert ends == [1, 2]


@pytest.mark.parametrize("busy", ["greeting", "loaded", "decoding"])
@pytest.mark.parametrize("how", ["eof", "sigterm", "shutdown"])
def test_eof_sigterm_and_shutdown_end_the_process_at_once_with_code_0(
    noise: Path, how: str, busy: str
) -> None:
    ends: dict[str, Callable[[Peer], None]] = {
        "eof": lambda peer: peer.socket.shutdown(socket.SHUT_WR),
        "sigterm": lambda peer: peer.process.send_signal(signal.SIGTERM),
        "shutdown": lambda peer: peer.send(shutdown=worker_pb2.Shutdown()),
    }
    with worker() as peer:
        if busy != "greeting":
            peer.load(noise)
        if busy == "decoding":
            for number in range(4):
                peer.start(number, request("A", stop={"ignoreEos": True}))
            next(peer.updates(3))
        ends[how](peer)
        assert peer.exit_code() == 0


@pytest.mark.parametrize("how", ["eof", "sigterm"])
def test_a_load_in_progress_is_no_reason_to_stay(slow_file: Path, how: str) -> None:
    with worker() as peer:
        peer.send(load=load_frame(slow_file))
        assert peer.next().HasField("load_progress")
        if how == "eof":
            peer.socket.shutdown(socket.SHUT_WR)
        else:
            peer.process.send_signal(signal.SIGTERM)
        assert peer.exit_code() == 0


@pytest.fixture
def slow_file(tmp_path: Path) -> Path:
    """A file that can be opened and whose reading never ends: nobody writes to the pipe behind it."""
    path = tmp_path / "slow.gguf"
    os.mkfifo(path)
    return path


def test_an_aborted_load_says_so_and_exits_with_code_0(models_dir: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.gguf"
    data = (models_dir / "noise.gguf").read_bytes()
    with big.open("wb") as file:  # sparse: long to read, short to write
        file.write(data)
        file.truncate(16 * 1024**3)
    with worker() as peer:
        peer.send(load=load_frame(big))
        assert peer.next().HasField("load_progress")
        peer.send(abort_load=worker_pb2.AbortLoad())
        while (frame := peer.next()).HasField("load_progress"):
            assert frame.load_progress.fraction < 1
        assert frame.load_failed.reason == "LOAD_ABORTED"
        assert peer.exit_code() == 0


@pytest.mark.parametrize("name", [name for name, wrong in WRONG_MODELS.items() if wrong.signal is None])
def test_a_wrong_file_fails_the_load_with_its_reason(tmp_path: Path, name: str) -> None:
    wrong = WRONG_MODELS[name]
    path = wrong.make(tmp_path / f"{name}.gguf")[0]
    with worker() as peer:
        failed = peer.load(path).load_failed
        assert failed.reason == wrong.reason, failed.message
        assert str(path) in failed.message
        assert failed.metadata["file"] == str(path)
        assert peer.exit_code() == 0
        assert wrong.says in failed.message + peer.log()


@pytest.mark.parametrize("name", [name for name, wrong in WRONG_MODELS.items() if wrong.signal is not None])
def test_a_file_that_makes_llama_cpp_abort_ends_this_process_only(tmp_path: Path, name: str) -> None:
    wrong = WRONG_MODELS[name]
    path = wrong.make(tmp_path / f"{name}.gguf")[0]
    with worker() as peer:
        peer.send(load=load_frame(path))
        assert wrong.signal is not None
        assert peer.exit_code() == -wrong.signal
        assert wrong.says in peer.log()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot_count", 0),
        ("slot_count", 257),
        ("thread_count", -1),
        ("batch_size_tokens", 0),
        ("cache_type_k", "q9"),
        ("cache_type_v", "F16"),
    ],
)
def test_sizes_that_cannot_be_fail_the_load_by_their_field(noise: Path, field: str, value: int | str) -> None:
    with worker() as peer:
        failed = peer.load(noise, **{field: value}).load_failed
        assert (failed.reason, failed.field) == ("INVALID_FIELD", field)


def test_a_file_that_is_not_there_fails_the_load(tmp_path: Path) -> None:
    with worker() as peer:
        failed = peer.load(tmp_path / "absent.gguf").load_failed
        assert failed.reason == "MODEL_CORRUPT"
        assert "No such file" in failed.message


def test_a_broken_protocol_is_a_bug_with_a_traceback_and_code_70() -> None:
    with worker() as peer:
        peer.socket.sendall(b"\xff\xff\xff\xff")
        assert peer.exit_code() == 70
        assert "FrameError" in peer.log()
    with worker() as peer:
        peer.send()
        assert peer.exit_code() == 70
        assert "ProtocolError" in peer.log()


def test_the_log_of_llama_cpp_comes_line_by_line(noise: Path) -> None:
    with worker() as peer:
        peer.load(noise)
        peer.send(shutdown=worker_pb2.Shutdown())
        peer.exit_code()
        lines = peer.log().splitlines()
        assert any(line.startswith("llama_context: n_ctx ") for line in lines)
        assert all(line.strip() for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_worker_dies_with_its_parent() -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.set_inheritable(True)\n"  # so that the worker cannot notice by its socket
        "theirs.set_inheritable(True)\n"
        "arguments = ['--fd', str(theirs.fileno()), '--instance-id', 'x', '--parent-pid', str(os.getpid())]\n"
        "command = [sys.executable, '-m', 'paddock_server.worker', *arguments]\n"
        "child = subprocess.Popen(command, close_fds=False, stdout=2)\n"
        "ours.recv(9)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        timeout=BOUND_SECONDS,
        env=environment(),
        check=False,
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + BOUND_SECONDS
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_worker_that_sleeps_gives_its_memory_back_and_says_the_same_when_woken(models_dir: Path) -> None:
    def answer(number: int) -> str:
        peer.start(number, request("The morning", stop={"maxTokens": 8}, sampling={"temperature": 0}))
        return "".join(delta.text for update in peer.updates(number) for delta in update.deltas.deltas)

    def resident() -> int:
        return psutil.Process(peer.process.pid).memory_info().rss

    big = {"context_size_tokens": 32768}
    with worker() as peer:
        before = resident()
        assert peer.load(models_dir / "noise.gguf", **big).HasField("ready")
        awake = resident()
        first = answer(1)
        peer.send(sleep=worker_pb2.Sleep())
        assert peer.next().HasField("slept")
        # Of what a model takes, libraries that were first used stay: less than half.
        assert resident() - before < (awake - before) / 2
        assert peer.load(models_dir / "noise.gguf", **big).HasField("ready")
        assert answer(2) == first


def test_a_second_load_without_a_sleep_is_a_broken_protocol(noise: Path) -> None:
    with worker() as peer:
        assert peer.load(noise).HasField("ready")
        peer.send(load=load_frame(noise))
        assert peer.exit_code() == 70
