"""Loading a model: reading the file with honest progress, making the context, running the first batch.

Failures become a reason and llama.cpp's own words. A file that makes ggml abort ends the process: that is
what the process is for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from paddock_server.worker import llama
from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS, DEFAULT_CACHE_TYPE
from paddock_server.worker.embed import open_embedding_context
from paddock_server.worker.errors import Reason, WorkerError, reject
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paddock_server.worker.logs import NativeLog

    Stage = worker_pb2.LoadStage.ValueType

PROGRESS_SECONDS: Final = 0.1
"""Shortest time between two reports of progress; the first and the last of a stage always go out."""

READING_SHARE: Final = 0.9
"""Part of the stage that reading the file is; the rest is llama.cpp taking the weights over."""

MICRO_BATCH_TOKENS: Final = 256
"""Most tokens computed at once by a CPU: more cost memory for activations and gain nothing."""

MICRO_BATCH_TOKENS_OFFLOADED: Final = 512
"""Most tokens computed at once by an accelerator, which needs more of them to be busy."""

EMBED_TOKENS: Final = 2048
"""Most tokens of a text to embed, unless the trained context is shorter or the batch is larger."""

_READ_BYTES: Final = 4 * 1024 * 1024
_SHARD: Final = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf$")

_UNSUPPORTED: Final = re.compile(
    r"unknown model architecture|unsupported model architecture|unknown (pre-)?tokenizer|"
    r"no longer supported|only supports up to version|not supported|does not support|not implemented|"
    r"cannot be used as main model|requires ctx_other|endianness",
    re.IGNORECASE,
)
_NO_MEMORY: Final = re.compile(
    r"unable to allocate|failed to (allocate|reserve)|bad_alloc|out of memory|cannot allocate memory|"
    r"alloc_buffer|alloc_tensor_range",
    re.IGNORECASE,
)
_CACHE_TYPE: Final = re.compile(
    r"cache type .* does not divide|quantized V cache|different K \(.*\) and V \(.*\) cache types",
)
_ORIGIN: Final = re.compile(r"^\w+: (error loading model: )?")


@dataclass(slots=True)
class LoadedModel:
    """A model ready to compute, and the sizes it was given. Closes what it holds."""

    model: llama.Model
    context: llama.Context | None
    """For generation; None for a model that only embeds."""

    embedding_context: llama.Context | None
    """Of a model that only embeds; None for others, which get theirs on first use."""

    context_size: int
    sequence_limit: int
    embed_limit: int
    batch_size: int
    slot_count: int
    thread_count: int
    queue_limit: int
    target_step_milliseconds: float
    gpu_layer_count: int

    @property
    def generation_context(self) -> llama.Context:
        """The context for generation.

        Raises:
            LlamaError: The model only embeds: requests to generate must have been refused before.
        """
        if self.context is None:
            text = "this model cannot generate"
            raise llama.LlamaError(text)
        return self.context

    def to_ready(self, *, has_chat_template: bool) -> worker_pb2.Ready:
        """Return what the server is told."""
        return worker_pb2.Ready(
            context_size_tokens=self.context_size,
            sequence_limit_tokens=self.sequence_limit,
            slot_count=self.slot_count,
            vocabulary_size=self.model.vocab.size,
            trained_context_tokens=self.model.trained_context,
            embedding_dimension_count=self.model.embedding_dimension_count,
            parameter_count=self.model.parameter_count,
            weight_bytes=self.model.weight_bytes,
            has_chat_template=has_chat_template,
            can_generate=self.context is not None,
            gpu_layer_count=self.gpu_layer_count,
            thread_count=self.thread_count,
            batch_size_tokens=self.batch_size,
        )

    def close(self) -> None:
        """Free contexts and weights."""
        for context in (self.context, self.embedding_context):
            if context is not None:
                context.close()
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Progress:
    """Reports progress, not too often and never backwards, and says when to give up."""

    def __init__(self, report: Callable[[Stage, float], None], aborted: Callable[[], bool]) -> None:
        self._report = report
        self._aborted = aborted
        self._stage: Stage = worker_pb2.LOAD_STAGE_UNSPECIFIED
        self._fraction = 0.0
        self._reported_at = 0.0

    def begin(self, stage: Stage) -> None:
        """Enter a stage, at 0."""
        self.check()
        self._stage = stage
        self._fraction = 0.0
        self._send(0.0)

    def advance(self, fraction: float) -> bool:
        """Note how far the stage is; False when the load is to be given up."""
        fraction = min(fraction, 1.0)
        done = fraction == 1.0 and self._fraction < 1.0
        if done or (fraction > self._fraction and monotonic() - self._reported_at >= PROGRESS_SECONDS):
            self._send(fraction)
        return not self._aborted()

    def check(self) -> None:
        """Raise LOAD_ABORTED when the load is to be given up."""
        if self._aborted():
            raise WorkerError(Reason.LOAD_ABORTED, "The load was given up.")

    def _send(self, fraction: float) -> None:
        self._fraction = fraction
        self._reported_at = monotonic()
        self._report(self._stage, fraction)


def load_model(
    request: worker_pb2.Load,
    *,
    log: NativeLog,
    report: Callable[[Stage, float], None] = lambda _stage, _fraction: None,
    aborted: Callable[[], bool] = lambda: False,
) -> LoadedModel:
    """Load a model and run its first batch, in the thread that will decode with it.

    Args:
        request: What to load; every field is filled in.
        log: Where llama.cpp's log goes.
        report: Takes stage and fraction, about ten times a second.
        aborted: Asked often; the load is given up once it says so.

    Raises:
        WorkerError: The model cannot be loaded.
    """
    check_load(request)
    progress = Progress(report, aborted)
    progress.begin(worker_pb2.LOAD_STAGE_WEIGHTS)
    log.take_errors()
    model = _load_weights(request, log, progress)
    try:
        progress.advance(1.0)
        progress.begin(worker_pb2.LOAD_STAGE_WARMUP)
        loaded = _open(model, request, log)
    except WorkerError:
        model.close()
        raise
    try:
        _warm_up(loaded)
        progress.advance(1.0)
        progress.check()
    except WorkerError:
        loaded.close()
        raise
    return loaded


def check_load(request: worker_pb2.Load) -> None:
    """Check the numbers of a load request.

    Raises:
        WorkerError: INVALID_FIELD, naming the field.
    """
    if not 1 <= request.slot_count <= llama.MAX_SLOTS:
        reject("slot_count", f"is {request.slot_count}; must be in [1, {llama.MAX_SLOTS}]")
    if request.batch_size_tokens < 1:
        reject("batch_size_tokens", f"is {request.batch_size_tokens}; must be 1 or more")
    if request.target_step_milliseconds < 1:
        reject("target_step_milliseconds", f"is {request.target_step_milliseconds}; must be 1 or more")
    if request.gpu_layer_count < -1:
        reject("gpu_layer_count", f"is {request.gpu_layer_count}; must be -1 or more")
    for field in ("cache_type_k", "cache_type_v"):
        name = getattr(request, field)
        if name and name not in CACHE_TYPE_NUMBERS:
            reject(field, f"is {name!r}; must be one of {', '.join(CACHE_TYPE_NUMBERS)}")
    for field in ("context_size_tokens", "thread_count", "queue_limit"):
        value = getattr(request, field)
        if value < 0:
            reject(field, f"is {value}; must be 0 or more")


def _load_weights(request: worker_pb2.Load, log: NativeLog, progress: Progress) -> llama.Model:
    path = request.model_path
    try:
        read_ahead(shards_of(path), lambda fraction: progress.advance(READING_SHARE * fraction))
    except OSError as error:
        file = str(error.filename or path)
        what = error.strerror or str(error)
        text = f"{path} cannot be loaded: {file} cannot be read: {what}"
        metadata = {"file": path, "what": f"{file}: {what}"}
        raise WorkerError(Reason.MODEL_CORRUPT, text, metadata=metadata) from error
    progress.check()
    model = llama.Model.load(
        path,
        gpu_layer_count=request.gpu_layer_count,
        on_progress=lambda fraction: progress.advance(READING_SHARE + (1 - READING_SHARE) * fraction),
    )
    if model is None:
        progress.check()
        raise classify(path, log.take_errors())
    if model.is_diffusion or (model.has_encoder and model.has_decoder):
        kind = "diffusion" if model.is_diffusion else "encoder-decoder"
        model.close()
        raise WorkerError(
            Reason.UNSUPPORTED_MODEL,
            f"{path}: {kind} models are not supported",
            metadata={"file": path, "what": f"{kind} model"},
        )
    return model


def shards_of(path: str) -> list[str]:
    """Return the files of a model from the path of the only or the first one."""
    match = _SHARD.match(Path(path).name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [
        str(Path(path).with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf"))
        for index in range(1, count + 1)
    ]


def read_ahead(paths: Sequence[str], advance: Callable[[float], bool]) -> None:
    """Bring files into the page cache, calling `advance(fraction)` as they come; stop when it returns False.

    llama.cpp maps a file and lets the kernel read all of it inside one system call: minutes of silence with a
    large model on a slow disk, and no way to stop. Read beforehand, piece by piece, the mapping finds
    everything in memory.

    Raises:
        OSError: A file cannot be read.
    """
    total = sum(os.stat(path).st_size for path in paths) or 1  # noqa: PTH116  names come from C
    done = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file, _Reader(file.fileno()) as reader:  # noqa: PTH123
            while count := reader.read(_READ_BYTES):
                done += count
                if not advance(min(done / total, 1.0)):
                    return


class _Reader:
    """Reads a file and throws the bytes away, where possible without copying them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._offset = 0
        self._buffer: bytearray | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._sink)

    def read(self, size: int) -> int:
        """Read up to `size` bytes; returns how many, 0 at the end."""
        count = self._splice(size) if self._buffer is None else -1
        if count < 0:
            self._buffer = self._buffer or bytearray(1024 * 1024)
            count = os.preadv(self._descriptor, [self._buffer], self._offset)
        self._offset += count
        return count

    def _splice(self, size: int) -> int:
        """Send pages from the cache to nowhere; -1 where the system cannot."""
        try:
            return os.sendfile(self._sink, self._descriptor, self._offset, size)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTSOCK}:
                return -1
            raise


def _open(model: llama.Model, request: worker_pb2.Load, log: NativeLog) -> LoadedModel:
    """Make the context a model needs and put the sizes together."""
    slots = request.slot_count
    threads = request.thread_count or physical_core_count()
    batch = max(request.batch_size_tokens, slots)
    embed_limit = min(model.trained_context or EMBED_TOKENS, max(EMBED_TOKENS, batch))
    generates = model.has_decoder and not model.has_encoder
    offloaded = _offloaded_layers(model, request.gpu_layer_count)
    if generates:
        context = llama.Context.create(
            model,
            llama.ContextParams(
                context_size=max(request.context_size_tokens or model.trained_context, slots),
                batch_size=batch,
                micro_batch_size=min(
                    batch, MICRO_BATCH_TOKENS_OFFLOADED if offloaded else MICRO_BATCH_TOKENS
                ),
                slot_count=slots,
                thread_count=threads,
                cache_type_k=request.cache_type_k or DEFAULT_CACHE_TYPE,
                cache_type_v=request.cache_type_v or DEFAULT_CACHE_TYPE,
            ),
        )
    else:
        context = open_embedding_context(model, token_limit=embed_limit, thread_count=threads)
    if context is None:
        errors = log.take_errors()
        _reject_cache_type(errors)
        raise classify(request.model_path, errors)
    if generates and not context.has_memory:
        context.close()
        context = open_embedding_context(model, token_limit=embed_limit, thread_count=threads)
        generates = False
        if context is None:
            raise classify(request.model_path, log.take_errors())
    cells = context.context_size
    return LoadedModel(
        model=model,
        context=context if generates else None,
        embedding_context=None if generates else context,
        context_size=cells,
        sequence_limit=min(cells, model.trained_context or cells),
        embed_limit=embed_limit,
        batch_size=min(batch, context.batch_size) if generates else batch,
        slot_count=slots,
        thread_count=threads,
        queue_limit=request.queue_limit,
        target_step_milliseconds=float(request.target_step_milliseconds),
        gpu_layer_count=offloaded,
    )


def _reject_cache_type(errors: Sequence[str]) -> None:
    """Raise INVALID_FIELD where llama.cpp refused a context for the types of its cache."""
    for line in errors:
        if _CACHE_TYPE.search(line):
            cause = _ORIGIN.sub("", line).strip()
            field = "cache_type_k" if cause.startswith("K cache") else "cache_type_v"
            reject(field, f"does not suit this model: {cause}; f16 suits every model")


def _offloaded_layers(model: llama.Model, requested: int) -> int:
    if not llama.supports_gpu_offload():
        return 0
    return model.layer_count if requested < 0 else min(requested, model.layer_count)


def _warm_up(loaded: LoadedModel) -> None:
    """Run one token through, which touches every weight and starts the threads that compute."""
    context = loaded.context or loaded.embedding_context
    if context is None:
        return
    batch = llama.Batch(1)
    batch.add(0, [max(loaded.model.vocab.bos, 0)], 0, output_last=True)
    context.decode(batch)
    context.clear()


def classify(path: str, errors: Sequence[str]) -> WorkerError:
    """Return the error for a file llama.cpp refused, from the errors it logged: the first is the cause."""
    lines = [_ORIGIN.sub("", line).strip() for line in errors] or ["llama.cpp gave no reason"]
    reason, cause = Reason.MODEL_CORRUPT, lines[0]
    for pattern, candidate in _CAUSES.items():
        match = next((line for line in lines if pattern.search(line)), None)
        if match is not None:
            reason, cause = candidate, match
            break
    text = f"{path} cannot be loaded: {cause}"
    return WorkerError(reason, text, metadata={"file": path, "what": cause})


_CAUSES: Final[Mapping[re.Pattern[str], Reason]] = MappingProxyType(
    {_NO_MEMORY: Reason.INSUFFICIENT_MEMORY, _UNSUPPORTED: Reason.UNSUPPORTED_MODEL}
)
"""Everything else is a corrupt file."""


def physical_core_count() -> int:
    """Return the number of physical cores this process may use; at least 1."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    with contextlib.suppress(AttributeError):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(cores, 1)
