"""llama.cpp, typed: thin owners of its objects around the ctypes bindings of llama-cpp-python.

This module and `samplers` are the only ones that touch the bindings. Objects are freed by `close`, in the
order sampler, context, model; nothing relies on the garbage collector. Sizes are in tokens unless a name says
otherwise. A context belongs to the thread that decodes with it; a model's vocabulary may be used by any
thread.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paddock_server.worker.cache_types import CACHE_TYPE_NUMBERS, DEFAULT_CACHE_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_SLOTS: Final = 256
"""llama.cpp's `LLAMA_MAX_SEQ`: most sequences a context can hold."""

DECODE_OK: Final = 0
DECODE_NO_CELLS: Final = 1
DECODE_ABORTED: Final = 2

POOLING_UNSPECIFIED: Final = -1
POOLING_NONE: Final = 0
POOLING_MEAN: Final = 1
POOLING_RANK: Final = 4

LOG_DEBUG: Final = 1
LOG_INFO: Final = 2
LOG_ERROR: Final = 4
_LOG_CONTINUES: Final = 5

_LOAD_MODE_MMAP: Final = 1


def _import_bindings() -> Any:
    """Import the low-level bindings alone.

    The package's `__init__` imports its high-level API and with it numpy, jinja2 and more: half a second and
    20 MB that a worker has no use for. A module made from the package's spec, never executed, is enough to
    import submodules from.
    """
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            text = "llama-cpp-python is not installed; install paddock[server]"
            raise ImportError(text)
        sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("llama_cpp.llama_cpp")


bindings: Final = _import_bindings()
"""The bindings. Only for `samplers`; everyone else uses the types here."""

_c: Final = bindings


class LlamaError(RuntimeError):
    """llama.cpp did what it must not: a bug, here or there. The process cannot go on."""


def supports_gpu_offload() -> bool:
    """Return whether layers can be offloaded: the build has a GPU backend and the machine such a device."""
    return bool(_c.llama_supports_gpu_offload())


def init_backend() -> None:
    """Initialise llama.cpp. Once per process, before the first model."""
    _c.llama_backend_init()


_log_callback: Any = None  # must outlive every call into the library


def set_log_sink(sink: Callable[[int, str], None]) -> None:
    """Send llama.cpp's log to `sink(level, line)`: whole lines, without line ends, continuations joined."""
    global _log_callback
    pending: list[str] = []
    pending_level = LOG_INFO

    def on_log(level: int, text: bytes, _user_data: object) -> None:
        nonlocal pending_level
        if level != _LOG_CONTINUES:
            if pending:
                sink(pending_level, "".join(pending))
                pending.clear()
            pending_level = level
        *lines, rest = text.decode("utf-8", "replace").split("\n")
        for line in lines:
            sink(pending_level, "".join([*pending, line]))
            pending.clear()
        if rest:
            pending.append(rest)

    callback = _c.llama_log_callback(on_log)
    _c.llama_log_set(callback, None)
    _log_callback = callback


class Model:
    """A loaded model file: weights, vocabulary and metadata."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self.vocab = Vocab(_c.llama_model_get_vocab(pointer))
        self.layer_count = int(_c.llama_model_n_layer(pointer))
        self.embedding_dimension_count = int(_c.llama_model_n_embd_out(pointer))
        self.parameter_count = int(_c.llama_model_n_params(pointer))
        self.weight_bytes = int(_c.llama_model_size(pointer))
        self.has_encoder = bool(_c.llama_model_has_encoder(pointer))
        self.has_decoder = bool(_c.llama_model_has_decoder(pointer))
        self.is_diffusion = bool(_c.llama_model_is_diffusion(pointer))
        self.sliding_window_tokens: int = _c.llama_model_n_swa(pointer)
        self.has_state_per_sequence = bool(
            _c.llama_model_is_recurrent(pointer) or _c.llama_model_is_hybrid(pointer)
        )
        """Recurrent or hybrid: a sequence has one state, which cannot be shared up to a position."""

    @classmethod
    def load(cls, path: str, *, gpu_layer_count: int, on_progress: Callable[[float], bool]) -> Model | None:
        """Load a GGUF file, or all shards from the first; None when llama.cpp refused (see its log).

        `on_progress(fraction)` is called in this thread; returning False aborts. `gpu_layer_count` -1
        offloads all.
        """
        params = _c.llama_model_default_params()
        params.n_gpu_layers = gpu_layer_count
        if gpu_layer_count == 0:
            params.load_mode = _LOAD_MODE_MMAP

        def on_fraction(fraction: float, _user_data: object) -> bool:
            return on_progress(fraction)

        callback = _c.llama_progress_callback(on_fraction)
        params.progress_callback = callback
        pointer = _c.llama_model_load_from_file(path.encode(), params)
        return cls(pointer) if pointer else None

    @property
    def trained_context(self) -> int:
        """Context length the model was trained with. Creating a context may adjust it (YaRN)."""
        return int(_c.llama_model_n_ctx_train(self._pointer))

    def metadata(self, key: str) -> str:
        """Return a scalar of the file's metadata as text; empty when there is none."""
        size = _c.llama_model_meta_val_str(self._pointer, key.encode(), None, 0)
        if size < 0:
            return ""
        buffer = ctypes.create_string_buffer(size + 1)
        _c.llama_model_meta_val_str(self._pointer, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def chat_template(self, name: str | None = None) -> str:
        """Return the chat template of that name, the default one without a name; empty when there is none."""
        template = _c.llama_model_chat_template(self._pointer, None if name is None else name.encode())
        return template.decode("utf-8", "replace") if template else ""

    def close(self) -> None:
        """Free the weights. Every context must be closed before."""
        if self._pointer:
            _c.llama_model_free(self._pointer)
            self._pointer = None

    @property
    def pointer(self) -> Any:
        """The C object."""
        return self._pointer


class Vocab:
    """The tokens of a model. Thread-safe."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self.size = int(_c.llama_vocab_n_tokens(pointer))
        self.bos = int(_c.llama_vocab_bos(pointer))
        self.eos = int(_c.llama_vocab_eos(pointer))
        self.adds_bos = bool(_c.llama_vocab_get_add_bos(pointer))
        self.adds_eos = bool(_c.llama_vocab_get_add_eos(pointer))

    @property
    def pointer(self) -> Any:
        """The C object."""
        return self._pointer

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> array[int]:
        """Return the tokens of `text`, as an array of 32-bit integers."""
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = _c.llama_tokenize(self._pointer, data, len(data), buffer, room, add_special, parse_special)
        if count < -room:
            room = -count
            buffer = (ctypes.c_int32 * room)()
            count = _c.llama_tokenize(
                self._pointer, data, len(data), buffer, room, add_special, parse_special
            )
        if count < 0:
            text = f"llama_tokenize wants {-count} tokens of room for {len(data)} bytes"
            raise LlamaError(text)
        tokens = array("i")
        tokens.frombytes(ctypes.string_at(buffer, 4 * count))
        return tokens

    def detokenize(self, tokens: Sequence[int], *, include_special: bool) -> bytes:
        """Return the text of `tokens` as bytes; not always valid UTF-8."""
        source = (ctypes.c_int32 * len(tokens))(*tokens)
        room = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = _c.llama_detokenize(
                self._pointer, source, len(tokens), buffer, room, not include_special, include_special
            )
            if size >= 0:
                return ctypes.string_at(buffer, size)
            room = -size

    def piece(self, token: int, *, special: bool) -> bytes:
        """Return the bytes of one token inside a text; of a special token only when `special`."""
        buffer = ctypes.create_string_buffer(64)
        size = _c.llama_token_to_piece(self._pointer, token, buffer, 64, 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = _c.llama_token_to_piece(self._pointer, token, buffer, -size, 0, special)
        return ctypes.string_at(buffer, size)

    def ends_generation(self, token: int) -> bool:
        """Return whether the token ends a generation (EOS, EOT and the like)."""
        return bool(_c.llama_vocab_is_eog(self._pointer, token))

    def suppressed(self) -> list[int]:
        """Return the tokens that the model file bans."""
        count = ctypes.c_int32()
        tokens = _c.llama_vocab_get_suppress_tokens(self._pointer, ctypes.byref(count))
        return [int(tokens[index]) for index in range(count.value)]


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made of."""

    context_size: int
    """Cells of the KV cache; llama.cpp rounds up to a multiple of 256."""

    batch_size: int
    micro_batch_size: int
    slot_count: int
    thread_count: int
    embeddings: bool = False
    pooling: int = POOLING_UNSPECIFIED
    cache_type_k: str = DEFAULT_CACHE_TYPE
    """One of `CACHE_TYPE_NUMBERS`, like the next."""

    cache_type_v: str = DEFAULT_CACHE_TYPE


class AbortFlag:
    """A byte that stops the decode in progress when it is set, from any thread.

    llama.cpp asks a callback before every operation of the graph, thousands of times per step. One written in
    Python would cost more than the step: `strlen` of a text of at most one character answers the same
    question.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(16)
        strlen = ctypes.CDLL(None).strlen
        self.callback = _c.ggml_abort_callback(ctypes.cast(strlen, ctypes.c_void_p).value)

    @property
    def address(self) -> int:
        """Where the byte is."""
        return ctypes.addressof(self._text)

    def set(self) -> None:
        """Stop the decode in progress."""
        self._text[0] = b"\x01"

    def clear(self) -> None:
        """Let the next decode run."""
        self._text[0] = b"\x00"


class Context:
    """Sequences in a KV cache, and the decode that extends them."""

    def __init__(self, pointer: Any, abort_flag: AbortFlag) -> None:
        self._pointer = pointer
        self._memory = _c.llama_get_memory(pointer)
        self._abort_flag = abort_flag
        sampling = _c.llama_sampler_chain_default_params()
        sampling.no_perf = True
        self._sampling = _c.llama_sampler_chain_init(sampling)
        _c.llama_set_abort_callback(pointer, abort_flag.callback, abort_flag.address)

    @classmethod
    def create(cls, model: Model, params: ContextParams) -> Context | None:
        """Return a context whose sequences share the KV cache; None when llama.cpp refused (see its log)."""
        native = _c.llama_context_default_params()
        native.n_ctx = params.context_size
        native.n_batch = params.batch_size
        native.n_ubatch = params.micro_batch_size
        native.n_seq_max = params.slot_count
        native.n_threads = params.thread_count
        native.n_threads_batch = params.thread_count
        native.kv_unified = True
        native.no_perf = True
        native.embeddings = params.embeddings
        native.pooling_type = params.pooling
        native.type_k = CACHE_TYPE_NUMBERS[params.cache_type_k]
        native.type_v = CACHE_TYPE_NUMBERS[params.cache_type_v]
        if not params.embeddings:
            native.n_outputs_max = params.slot_count
        pointer = _c.llama_init_from_model(model.pointer, native)
        return cls(pointer, AbortFlag()) if pointer else None

    @property
    def abort_flag(self) -> AbortFlag:
        """Stops the decode in progress."""
        return self._abort_flag

    @property
    def has_memory(self) -> bool:
        """Whether there is a KV cache or state; encoder models have none."""
        return bool(self._memory)

    @property
    def context_size(self) -> int:
        """Cells of the KV cache."""
        return int(_c.llama_n_ctx(self._pointer))

    @property
    def batch_size(self) -> int:
        """Most tokens of one decode."""
        return int(_c.llama_n_batch(self._pointer))

    @property
    def pooling(self) -> int:
        """How token embeddings become one vector, a `POOLING_*`."""
        return int(_c.llama_pooling_type(self._pointer))

    def decode(self, batch: Batch) -> int:
        """Compute a batch and wait for the result. Returns one of the `DECODE_*`.

        With `DECODE_NO_CELLS` nothing was changed; with `DECODE_ABORTED` part of the batch may be in the
        cache.

        Raises:
            LlamaError: llama.cpp failed.
        """
        result = int(_c.llama_decode(self._pointer, batch.native))
        if result not in {DECODE_OK, DECODE_NO_CELLS, DECODE_ABORTED}:
            text = f"llama_decode returned {result} for a batch of {len(batch)} tokens"
            raise LlamaError(text)
        _c.llama_synchronize(self._pointer)
        return result

    def encode(self, batch: Batch) -> None:
        """Compute a batch with a model that has no KV cache.

        Raises:
            LlamaError: llama.cpp failed.
        """
        result = int(_c.llama_encode(self._pointer, batch.native))
        if result != 0:
            text = f"llama_encode returned {result} for a batch of {len(batch)} tokens"
            raise LlamaError(text)
        _c.llama_synchronize(self._pointer)

    def clear(self) -> None:
        """Forget every sequence."""
        if self._memory:
            _c.llama_memory_clear(self._memory, False)

    def forget(self, slot: int) -> None:
        """Forget one sequence."""
        _c.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def share(self, source: int, target: int, count: int) -> None:
        """Let `target`, which is empty, begin with the first `count` tokens of `source`, in its cells."""
        _c.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def logits(self, row: int) -> Any:
        """Return a pointer to the logits of batch row `row`: float32, one per token of the vocabulary."""
        return _c.llama_get_logits_ith(self._pointer, row)

    def sample(self, chain: Any, row: int) -> int:
        """Pick the token that follows batch row `row` of the last decode, and have the chain count it.

        The chain works inside one of the context's. llama.cpp keeps an array of candidates for each chain it
        is asked to sample with, 12 bytes per token of the vocabulary: so there is one, not one per sequence.
        """
        _c.llama_sampler_chain_add(self._sampling, chain)
        token = int(_c.llama_sampler_sample(self._sampling, self._pointer, row))
        _c.llama_sampler_chain_remove(self._sampling, 0)
        return token

    def pooled_embedding(self, slot: int, length: int) -> list[float]:
        """Return the vector of a sequence that was just computed."""
        values = _c.llama_get_embeddings_seq(self._pointer, slot)
        if not values:
            text = f"llama.cpp has no embedding for sequence {slot}"
            raise LlamaError(text)
        return [float(value) for value in values[:length]]

    def close(self) -> None:
        """Free the KV cache and the buffers."""
        if self._pointer:
            _c.llama_sampler_free(self._sampling)
            _c.llama_free(self._pointer)
            self._pointer = None


class Batch:
    """Rows for one decode. Allocated once; each row is one token of one sequence."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens = (ctypes.c_int32 * capacity)()
        self._positions = (ctypes.c_int32 * capacity)()
        self._counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        self._slots = (ctypes.c_int32 * capacity)()
        first = ctypes.addressof(self._slots)
        row_type = ctypes.POINTER(ctypes.c_int32)
        self._slot_rows = (row_type * capacity)(
            *(ctypes.cast(first + 4 * row, row_type) for row in range(capacity))
        )
        self._outputs = (ctypes.c_int8 * capacity)()
        self.native = _c.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._slot_rows,
            logits=self._outputs,
        )

    def __len__(self) -> int:
        return int(self.native.n_tokens)

    def clear(self) -> None:
        """Drop all rows."""
        self.native.n_tokens = 0

    def add(self, slot: int, tokens: Sequence[int], position: int, *, output_last: bool) -> int:
        """Append tokens of one sequence, the first at `position`; returns the row of the last one.

        `output_last` asks for the logits of that row.
        """
        start = self.native.n_tokens
        count = len(tokens)
        end = start + count
        if count == 1:
            self._tokens[start] = tokens[0]
            self._positions[start] = position
            self._slots[start] = slot
        else:
            self._tokens[start:end] = list(tokens)
            self._positions[start:end] = range(position, position + count)
            self._slots[start:end] = [slot] * count
            ctypes.memset(ctypes.addressof(self._outputs) + start, 0, count)
        self._outputs[end - 1] = output_last
        self.native.n_tokens = end
        return end - 1

    def output_all(self) -> None:
        """Ask for the output of every row, as pooled embeddings need."""
        ctypes.memset(self._outputs, 1, len(self))
