"""Makes files that are not what they should be, and says what the real library does with each."""

from __future__ import annotations

import signal
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, Literal

from gguf import GGMLQuantizationType, GGUFValueType

from tests.models.noise import make_noise
from tests.models.scripted import make_scripted

if TYPE_CHECKING:
    from collections.abc import Callable

    Edit = Callable[[bytes], bytes]
    Maker = Callable[[Path], list[Path]]

Reason = Literal["MODEL_CORRUPT", "UNSUPPORTED_MODEL", "CRASH_LOOP"]
Stage = Literal["load", "context", "decode"]
Field = Literal["dimensions", "sizes", "type", "offset"]

# Of a GGUF file: magic, version, number of tensors, number of keys, then the keys.
VERSION_AT: Final = 4
TENSORS_AT: Final = 8
KEYS_AT: Final = 16
FIRST_KEY_AT: Final = 24

TOKENS: Final = "tokenizer.ggml.tokens"
OUTPUT: Final = "output.weight"
UNKNOWN_TYPE: Final = 999
REMOVED_TYPE: Final = 4


@dataclass(frozen=True, slots=True)
class WrongModel:
    """A wrong file: how to make it, what a server should answer to a Load of it, what llama.cpp does with it.

    `make` takes the path of a `.gguf` and returns the files it wrote, first the one to load. llama.cpp
    fails at `stage` (loading the model, making a context, decoding the first token): it refuses, or kills its
    process with `signal`. `says` is part of what it logs then, empty when it dies without a word.
    """

    make: Maker
    reason: Reason
    stage: Stage
    signal: signal.Signals | None
    says: str


@cache
def right_model() -> bytes:
    """The file that most wrong ones are edits of: nothing is wrong with it."""
    with TemporaryDirectory() as folder:
        (path,) = make_scripted(Path(folder) / "right.gguf", "All is well.")
        return path.read_bytes()


def put(at: int, format_: str, *values: int) -> Edit:
    """Overwrite numbers, packed little-endian, at an offset."""

    def edit(data: bytes) -> bytes:
        packed = struct.pack(f"<{format_}", *values)
        return data[:at] + packed + data[at + len(packed) :]

    return edit


def rename(old: str, new: str) -> Edit:
    """Replace a string of the header by one of the same length, where it first stands."""

    def edit(data: bytes) -> bytes:
        packed = [struct.pack("<Q", len(text)) + text.encode() for text in (old, new)]
        if len(old) != len(new) or packed[0] not in data:
            message = f"cannot rename {old!r} to {new!r}: not there, or of another length"
            raise ValueError(message)
        return data.replace(packed[0], packed[1], 1)

    return edit


def _behind_name(data: bytes, name: str) -> int:
    packed = struct.pack("<Q", len(name)) + name.encode()
    return data.index(packed) + len(packed)


def in_key(key: str, at: int, format_: str, *values: int) -> Edit:
    """Overwrite numbers of a key: at 0 its type, at 4 its value (of an array: element type, at 8 length)."""
    return lambda data: put(_behind_name(data, key) + at, format_, *values)(data)


def in_tensor(name: str, field: Field, format_: str, *values: int) -> Edit:
    """Overwrite numbers of a tensor's entry in the header."""

    def edit(data: bytes) -> bytes:
        at = _behind_name(data, name)
        (dimensions,) = struct.unpack_from("<I", data, at)
        behind = {"dimensions": 0, "sizes": 4, "type": 4 + 8 * dimensions, "offset": 8 + 8 * dimensions}
        return put(at + behind[field], format_, *values)(data)

    return edit


def cut_before(text: bytes) -> Edit:
    """End the file where the text first stands."""
    return lambda data: data[: data.index(text)]


def _edited(edit: Edit) -> Maker:
    def make(path: Path) -> list[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(edit(right_model()))
        return [path]

    return make


def _without_second_shard(path: Path) -> list[Path]:
    first, second, third = make_noise(path.with_suffix("") / path.name, shards=3)
    second.unlink()
    return [first, third]


def _corrupt(edit: Edit, says: str) -> WrongModel:
    return WrongModel(_edited(edit), "MODEL_CORRUPT", "load", None, says)


def _unsupported(edit: Edit, says: str) -> WrongModel:
    return WrongModel(_edited(edit), "UNSUPPORTED_MODEL", "load", None, says)


def _crashes(edit: Edit, stage: Stage, signal_: signal.Signals, says: str) -> WrongModel:
    return WrongModel(_edited(edit), "CRASH_LOOP", stage, signal_, says)


_I32 = GGMLQuantizationType.I32
WRONG_MODELS: Final = {
    # Not a GGUF file, or one of another time.
    "empty": _corrupt(lambda _: b"", "failed to read magic"),
    "text": _corrupt(
        lambda _: b"This is a text, whatever its name says.\n", "invalid magic characters: 'This'"
    ),
    "wrong-magic": _corrupt(lambda data: b"GGML" + data[4:], "invalid magic characters: 'GGML'"),
    "old-version": _unsupported(put(VERSION_AT, "I", 1), "GGUFv1 is no longer supported"),
    "future-version": _unsupported(put(VERSION_AT, "I", 99), "this GGUF file is version 99"),
    "big-endian": _unsupported(put(VERSION_AT, "I", 3 << 24), "failed to read header"),
    # Cut off.
    "truncated-header": _corrupt(cut_before(b"tokenizer.ggml.merges"), "failed to read key-value pairs"),
    "truncated-tensors": _corrupt(cut_before(b"blk.0.ffn_up.weight"), "failed to read tensor info"),
    "truncated-data": _corrupt(lambda data: data[:-20_000], "data is not within the file bounds"),
    # Absurd numbers.
    "huge-key-count": _corrupt(put(KEYS_AT, "Q", 1 << 60), "number of key value pairs is 1152921504606"),
    "huge-tensor-count": _corrupt(put(TENSORS_AT, "Q", 1 << 60), "number of tensors is 1152921504606846976"),
    "huge-string": _corrupt(put(FIRST_KEY_AT, "Q", 1 << 62), "string length 4611686018427387904 exceeds"),
    "huge-array": _corrupt(in_key(TOKENS, 8, "Q", 1 << 40), "failed to read key-value pairs"),
    "nested-array": _corrupt(in_key(TOKENS, 4, "I", GGUFValueType.ARRAY), "invalid GGUF type 9"),
    "unknown-value-type": _corrupt(in_key(TOKENS, 0, "I", 77), "invalid GGUF type 77"),
    "huge-dimensions": _corrupt(
        in_tensor(OUTPUT, "sizes", "QQ", 1 << 40, 1 << 40), "may cause overflow errors"
    ),
    "huge-dimension": _corrupt(in_tensor(OUTPUT, "sizes", "QQ", 32, 1 << 50), "not within the file bounds"),
    "negative-dimension": _corrupt(in_tensor(OUTPUT, "sizes", "q", -5), "invalid number of elements: -5"),
    "many-dimensions": _corrupt(in_tensor(OUTPUT, "dimensions", "I", 9), "invalid number of dimensions: 9"),
    "offset-beyond-file": _corrupt(in_tensor(OUTPUT, "offset", "Q", 1 << 40), "has offset 1099511627776"),
    # Sound as a file, wrong as a model.
    "duplicate-key": _corrupt(
        rename("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eos_token_id"), "duplicate key"
    ),
    "duplicate-tensor": _corrupt(
        rename("blk.0.attn_v.weight", "blk.0.attn_k.weight"), "duplicate tensor name"
    ),
    "missing-tensor": _corrupt(rename("output_norm.weight", "output_norm.absent"), "not found"),
    "missing-key": _corrupt(rename("llama.context_length", "llama.context_absent"), "key not found in model"),
    "wrong-key-type": _corrupt(
        in_key("llama.attention.layer_norm_rms_epsilon", 0, "I", GGUFValueType.UINT32), "has wrong type u32"
    ),
    "wrong-shape": _corrupt(in_key("llama.embedding_length", 4, "I", 64), "has wrong shape"),
    "unknown-tensor-type": _corrupt(in_tensor(OUTPUT, "type", "I", UNKNOWN_TYPE), "invalid ggml type 999"),
    "removed-tensor-type": _corrupt(in_tensor(OUTPUT, "type", "I", REMOVED_TYPE), "of type 4 (DEPRECATED)"),
    "unknown-architecture": _unsupported(rename("llama", "llamb"), "unknown model architecture: 'llamb'"),
    "unknown-tokenizer": _unsupported(rename("gpt2", "gptx"), "unknown tokenizer: 'gptx'"),
    "unknown-pre-tokenizer": _unsupported(rename("smollm", "smolla"), "unknown pre-tokenizer type: 'smolla'"),
    # Kills the process that loads it, sooner or later.
    "no-layers": _crashes(
        in_key("llama.block_count", 4, "I", 0), "load", signal.SIGABRT, "GGML_ASSERT(hparams.n_layer_all > 0"
    ),
    "duplicate-token": _crashes(
        rename("<|pad|>", "<|bos|>"), "load", signal.SIGABRT, "id_to_token.size() == token_to_id.size()"
    ),
    "integer-embedding": _crashes(
        in_tensor("token_embd.weight", "type", "I", _I32), "context", signal.SIGABRT, "*cur_backend_id != -1"
    ),
    "integer-norm": _crashes(
        in_tensor("output_norm.weight", "type", "I", _I32), "decode", signal.SIGABRT, "unsupported types"
    ),
    "integer-output": _crashes(in_tensor(OUTPUT, "type", "I", _I32), "decode", signal.SIGSEGV, ""),
    # Incomplete as a set of files.
    "missing-shard": WrongModel(_without_second_shard, "MODEL_CORRUPT", "load", None, "00002-of-00003"),
}
