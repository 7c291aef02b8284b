"""Assembles GGUF files byte by byte, right ones and wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, Q4_0, Q8_0, Q4_K = 0, 2, 8, 12

_CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}


def name(text: str | bytes) -> bytes:
    """A string with its length before it, as keys, tensor names and values have it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def number(value_type: int, value: float) -> bytes:
    """A value of a number type, with its type before it."""
    return struct.pack(f"<I{_CODES[value_type]}", value_type, value)


def u32(value: int) -> bytes:
    """The value most keys have."""
    return number(UINT32, value)


def text(value: str | bytes) -> bytes:
    """A string value, with its type before it."""
    return struct.pack("<I", STRING) + name(value)


def strings(values: Sequence[str | bytes]) -> bytes:
    """An array of strings, with its type before it."""
    return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(name(value) for value in values)


def numbers(element_type: int, values: Sequence[float]) -> bytes:
    """An array of numbers, with its type before it."""
    return struct.pack(f"<IIQ{len(values)}{_CODES[element_type]}", ARRAY, element_type, len(values), *values)


@dataclass(frozen=True)
class Tensor:
    """One tensor; `offset` None puts it behind the one before."""

    name: str | bytes = "token_embd.weight"
    dims: Sequence[int] = (32, 4)
    type: int = F32
    size_bytes: int = 512
    offset: int | None = None

    def info(self, offset: int) -> bytes:
        """Its description in the header."""
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return name(self.name) + dims + struct.pack("<IQ", self.type, offset)


@dataclass(frozen=True)
class Gguf:
    """A GGUF file. The counts are those of the lists unless told otherwise."""

    pairs: Sequence[tuple[str | bytes, bytes]] = (("general.architecture", text("llama")),)
    tensors: Sequence[Tensor] = field(default_factory=lambda: [Tensor()])
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    pair_count: int | None = None
    tensor_count: int | None = None

    def plus(self, *pairs: tuple[str | bytes, bytes]) -> Gguf:
        """The same file with more keys."""
        return replace(self, pairs=[*self.pairs, *pairs])

    def header(self) -> bytes:
        """Everything up to the padding before the tensor data."""
        pair_count = len(self.pairs) if self.pair_count is None else self.pair_count
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        parts = [self.magic, struct.pack("<IQQ", self.version, tensor_count, pair_count)]
        parts += [name(key) + value for key, value in self.pairs]
        offset = 0
        for tensor in self.tensors:
            parts.append(tensor.info(offset if tensor.offset is None else tensor.offset))
            offset += self._padded(tensor.size_bytes)
        return b"".join(parts)

    def content(self) -> bytes:
        """The whole file; tensor data is zeros."""
        header = self.header()
        data = sum(self._padded(tensor.size_bytes) for tensor in self.tensors)
        return header.ljust(self._padded(len(header)), b"\0") + bytes(data)

    def write(self, path: Path) -> Path:
        """Writes the file, with the folders it lies in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content())
        return path

    def _padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment
