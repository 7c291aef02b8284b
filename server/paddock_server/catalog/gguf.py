"""A reader of GGUF headers that is bounded in time and memory, whatever the file holds.

Only the header is read: no tensor data, no vocabulary. Checks what llama.cpp checks of a header, so that a
file is refused with a sentence about it instead of a line in a worker's log.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct

from paddock_server.catalog.cursor import Cursor, GgufError, UnsupportedGgufError, quoted
from paddock_server.catalog.ggml_types import REMOVED_TENSOR_TYPES, TENSOR_TYPES

__all__ = [
    "GgufError",
    "GgufHeader",
    "MetadataValue",
    "OmittedValue",
    "TensorInfo",
    "UnsupportedGgufError",
    "read_header",
]

# The largest headers known (vocabularies of 260,000 tokens with their merges) have about 25 MiB, 800,000
# strings, 100 keys and 2,000 tensors.
MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_ARRAY_STRINGS = 4 * 1024 * 1024
MAX_KEY_VALUE_PAIRS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 1024
# llama.cpp keeps a tensor's name in 64 bytes with a closing zero, and four dimensions.
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_INT64 = 2**63 - 1

# What is kept in memory of one file; longer values become an OmittedValue.
MAX_KEPT_STRING_BYTES = 1024
MAX_KEPT_TEMPLATE_BYTES = 1024 * 1024
MAX_KEPT_ARRAY_LENGTH = 1024
MAX_KEPT_ARRAY_ELEMENTS = 65_536

TEMPLATE_KEY = "tokenizer.chat_template"
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_UINT32 = 4
_STRING = 8
_ARRAY = 9

_NUMBER_FORMATS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_NUMBERS = {value_type: Struct(f"<{code}") for value_type, code in _NUMBER_FORMATS.items()}


@dataclass(frozen=True, slots=True)
class OmittedValue:
    """A value too long to keep. `length` counts bytes of a string, elements of an array."""

    is_array: bool
    length: int


MetadataValue = bool | int | float | str | tuple[bool | int | float, ...] | OmittedValue


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it.

    `offset` counts bytes from the start of the tensor data, `size_bytes` leaves out padding.
    """

    name: str
    dims: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int

    @property
    def element_count(self) -> int:
        """Number of values."""
        return math.prod(self.dims)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file.

    `metadata` has every key, `key_offsets` the byte at which each key stands; `data_offset` is the byte at
    which the tensor data starts.
    """

    path: str
    version: int
    alignment: int
    metadata: Mapping[str, MetadataValue]
    key_offsets: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def parameter_count(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.element_count for tensor in self.tensors)


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Reads the header of a GGUF file, version 2 or 3, little-endian.

    Takes time in proportion to the header, at most MAX_HEADER_BYTES of it, and memory for one chunk and for
    what the MAX_KEPT bounds let through.

    Raises:
        GgufError: the file is not GGUF, or is damaged or hostile.
        UnsupportedGgufError: it is GGUF of a kind that is not read here.
        OSError: the file cannot be opened or read.
    """
    name = os.fspath(path)
    # Without O_NONBLOCK, opening a named pipe waits for its writer.
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise GgufError(name, "is not a regular file", 0)
        cursor = Cursor(file, name, status.st_size, MAX_HEADER_BYTES)
        version = _read_version(cursor)
        tensor_count = _read_count(cursor, "the number of tensors", MAX_TENSORS)
        pair_count = _read_count(cursor, "the number of keys", MAX_KEY_VALUE_PAIRS)
        metadata, key_offsets = _MetadataReader(cursor).read(pair_count)
        alignment = _alignment(cursor, metadata, key_offsets)
        tensors, info_offsets = _read_tensors(cursor, tensor_count, alignment)
        data_offset = _padded(cursor.offset, alignment)
        _check_data(cursor, tensors, info_offsets, status.st_size - data_offset)
    return GgufHeader(name, version, alignment, metadata, key_offsets, tensors, data_offset)


def _padded(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment


def _read_version(cursor: Cursor) -> int:
    if cursor.size == 0:
        cursor.fail("the file is empty", 0)
    magic = cursor.take(4)
    if magic == b"vers":
        cursor.fail("is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`", 0)
    if magic != b"GGUF":
        cursor.fail(f"is no GGUF file: it starts with {magic!r} and not with GGUF", 0)
    cursor.subject = "the version"
    version = cursor.u32()
    if version == 0:
        cursor.fail("has GGUF version 0; 2 and 3 are known", 4)
    if version & 0xFFFF == 0:
        cursor.fail_unsupported("is a big-endian GGUF file; convert it to little-endian", 4)
    if version not in {2, 3}:
        cursor.fail_unsupported(f"has GGUF version {version}; 2 and 3 are known", 4)
    return version


def _read_count(cursor: Cursor, subject: str, limit: int) -> int:
    cursor.subject = subject
    start = cursor.offset
    count = cursor.u64()
    if count > limit:
        cursor.fail(f"{subject} is {count}; at most {limit} are read", start)
    return count


def _read_name(cursor: Cursor, limit: int) -> str:
    start = cursor.offset
    length = cursor.u64()
    if length > limit:
        cursor.fail(f"{cursor.subject} has {length} bytes in its name; at most {limit} are allowed", start)
    data = cursor.take(length)
    if b"\0" in data:
        cursor.fail(f"{cursor.subject} has a zero byte in its name", start)
    try:
        return data.decode()
    except UnicodeDecodeError:
        cursor.fail(f"{cursor.subject} has a name that is not UTF-8: {data[:64]!r}", start)


class _MetadataReader:
    """Reads the key-value pairs of one header, within one budget for all of them."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._strings_left = MAX_ARRAY_STRINGS
        self._elements_left = MAX_KEPT_ARRAY_ELEMENTS

    def read(self, pair_count: int) -> tuple[dict[str, MetadataValue], dict[str, int]]:
        """All pairs, and the byte at which each key starts."""
        cursor = self._cursor
        metadata: dict[str, MetadataValue] = {}
        offsets: dict[str, int] = {}
        for index in range(pair_count):
            cursor.subject = f"key {index + 1} of {pair_count}"
            start = cursor.offset
            key = _read_name(cursor, MAX_KEY_BYTES)
            if not key:
                cursor.fail(f"{cursor.subject} is empty", start)
            if key in metadata:
                cursor.fail(f"key {quoted(key)} is there twice", start)
            cursor.subject = f"key {quoted(key)}"
            metadata[key] = self._value(key)
            offsets[key] = start
        return metadata, offsets

    def _value(self, key: str) -> MetadataValue:
        cursor = self._cursor
        start = cursor.offset
        value_type = cursor.u32()
        if key == _ALIGNMENT_KEY and value_type != _UINT32:
            cursor.fail(f"{cursor.subject} has value type {value_type}; it must be {_UINT32} (uint32)", start)
        if value_type == _STRING:
            return self._string(MAX_KEPT_TEMPLATE_BYTES if key == TEMPLATE_KEY else MAX_KEPT_STRING_BYTES)
        if value_type == _ARRAY:
            return self._array()
        number = _NUMBERS.get(value_type)
        if number is None:
            cursor.fail(f"{cursor.subject} has unknown value type {value_type}", start)
        return number.unpack(cursor.take(number.size))[0]

    def _string(self, kept_bytes: int) -> MetadataValue:
        length = self._cursor.u64()
        if length > kept_bytes:
            self._cursor.skip(length)
            return OmittedValue(is_array=False, length=length)
        return self._cursor.take(length).decode("utf-8", "replace")

    def _array(self) -> MetadataValue:
        cursor = self._cursor
        start = cursor.offset
        element_type = cursor.u32()
        length = cursor.u64()
        if element_type == _STRING:
            if length > self._strings_left:
                cursor.fail(
                    f"{cursor.subject} has {length} strings; a file may have {MAX_ARRAY_STRINGS} in arrays",
                    start,
                )
            self._strings_left -= length
            cursor.skip_strings(length)
            return OmittedValue(is_array=True, length=length)
        if element_type == _ARRAY:
            cursor.fail(f"{cursor.subject} is an array of arrays, which llama.cpp does not read", start)
        number = _NUMBERS.get(element_type)
        if number is None:
            cursor.fail(f"{cursor.subject} is an array of unknown value type {element_type}", start)
        if length > min(MAX_KEPT_ARRAY_LENGTH, self._elements_left):
            cursor.skip(length * number.size)
            return OmittedValue(is_array=True, length=length)
        self._elements_left -= length
        code = _NUMBER_FORMATS[element_type]
        return Struct(f"<{length}{code}").unpack(cursor.take(length * number.size))


def _alignment(cursor: Cursor, metadata: Mapping[str, MetadataValue], key_offsets: Mapping[str, int]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment == 0 or alignment & (alignment - 1):
        cursor.fail(
            f"key {_ALIGNMENT_KEY!r} is {alignment}; it must be a power of two", key_offsets[_ALIGNMENT_KEY]
        )
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[tuple[TensorInfo, ...], list[int]]:
    tensors: list[TensorInfo] = []
    info_offsets: list[int] = []
    names: set[str] = set()
    expected_offset = 0
    for index in range(count):
        cursor.subject = f"the description of tensor {index + 1} of {count}"
        start = cursor.offset
        tensor = _read_tensor(cursor, start)
        if tensor.name in names:
            cursor.fail(f"tensor {tensor.name!r} is there twice", start)
        # llama.cpp reads only tensors that lie one behind the other, which also keeps them from overlapping.
        if tensor.offset != expected_offset:
            cursor.fail(
                f"tensor {tensor.name!r} has offset {tensor.offset}; it must be {expected_offset}", start
            )
        expected_offset += _padded(tensor.size_bytes, alignment)
        names.add(tensor.name)
        tensors.append(tensor)
        info_offsets.append(start)
    return tuple(tensors), info_offsets


def _read_tensor(cursor: Cursor, start: int) -> TensorInfo:
    name = _read_name(cursor, MAX_TENSOR_NAME_BYTES)
    dimension_count = cursor.u32()
    if dimension_count > MAX_DIMENSIONS:
        cursor.fail(
            f"tensor {name!r} has {dimension_count} dimensions; at most {MAX_DIMENSIONS} are allowed", start
        )
    dims = tuple(cursor.u64() for _ in range(dimension_count))
    type_number = cursor.u32()
    offset = cursor.u64()
    tensor_type = TENSOR_TYPES.get(type_number)
    if tensor_type is None:
        removed = REMOVED_TENSOR_TYPES.get(type_number)
        if removed is not None:
            cursor.fail_unsupported(
                f"tensor {name!r} has type {removed}, which llama.cpp no longer reads", start
            )
        cursor.fail(f"bad tensor type {type_number} of tensor {name!r}", start)
    element_count = math.prod(dims)
    if element_count == 0:
        cursor.fail(f"tensor {name!r} has dimensions {dims}, and with them no values", start)
    if element_count > MAX_INT64:
        cursor.fail(f"tensor {name!r} has dimensions {dims}, more values than can be counted", start)
    row_elements = dims[0] if dims else 1
    if row_elements % tensor_type.block_elements:
        cursor.fail(
            f"tensor {name!r} has rows of {row_elements} values; type {tensor_type.name} needs a multiple of "
            f"{tensor_type.block_elements}",
            start,
        )
    size_bytes = element_count // tensor_type.block_elements * tensor_type.block_bytes
    return TensorInfo(name, dims, tensor_type.name, offset, size_bytes)


def _check_data(
    cursor: Cursor, tensors: tuple[TensorInfo, ...], info_offsets: list[int], available_bytes: int
) -> None:
    for tensor, info_offset in zip(tensors, info_offsets, strict=True):
        end = tensor.offset + tensor.size_bytes
        if end > available_bytes:
            cursor.fail(
                f"is truncated: tensor {tensor.name!r} goes {end - available_bytes} bytes past the end",
                info_offset,
            )
