from __future__ import annotations

import dataclasses
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddock_server.catalog import (
    GgufError,
    ModelFacts,
    OmittedValue,
    UnsupportedGgufError,
    model_facts,
    read_header,
)
from paddock_server.catalog import gguf as reader
from tests.unit import gguf_bytes as gb
from tests.unit.gguf_bytes import Gguf, Tensor

LONG_STRING = "x" * 300_000

EVERY_KIND = Gguf(
    pairs=[
        ("general.architecture", gb.text("llama")),
        *((f"n.{kind}", gb.number(kind, 1)) for kind in range(13) if kind not in {gb.STRING, gb.ARRAY}),
        ("n.negative", gb.number(gb.INT64, -(2**63))),
        ("a.numbers", gb.numbers(gb.INT16, [3, -1, 2])),
        ("a.flags", gb.numbers(gb.BOOL, [True, False])),
        ("a.empty", gb.numbers(gb.FLOAT64, [])),
        ("tokenizer.ggml.tokens", gb.strings(["<s>", "", "\u00e9", LONG_STRING, "b"])),
        ("tokenizer.ggml.scores", gb.numbers(gb.FLOAT32, [0.0] * 5000)),
        ("general.description", gb.text(LONG_STRING)),
        ("tokenizer.chat_template", gb.text("{{ messages }}" + "y" * 100_000)),
    ],
    tensors=[
        Tensor("token_embd.weight", (32, 4), gb.Q8_0, 136),
        Tensor("blk.0.attn_q.weight", (256, 2), gb.Q4_K, 288),
        Tensor("scalar", (), gb.F32, 4),
        Tensor("output_norm.weight", (32,), gb.F32, 128),
    ],
)


def _error(path: Path, data: bytes) -> GgufError:
    path.write_bytes(data)
    with pytest.raises(GgufError) as caught:
        read_header(path)
    assert caught.value.path == str(path)
    return caught.value


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_gives_keys_tensors_and_where_the_data_starts(tmp_path: Path, version: int) -> None:
    file = dataclasses.replace(EVERY_KIND, version=version)

    header = read_header(file.write(tmp_path / "m.gguf"))

    assert header.version == version
    assert header.alignment == 32
    assert header.data_offset == -(-len(file.header()) // 32) * 32
    assert [(t.name, t.dims, t.type, t.offset, t.size_bytes) for t in header.tensors] == [
        ("token_embd.weight", (32, 4), "Q8_0", 0, 136),
        ("blk.0.attn_q.weight", (256, 2), "Q4_K", 160, 288),
        ("scalar", (), "F32", 448, 4),
        ("output_norm.weight", (32,), "F32", 480, 128),
    ]
    assert header.parameter_count == 128 + 512 + 1 + 32
    assert header.tensor_bytes == 136 + 288 + 4 + 128


def test_small_values_are_kept_and_large_ones_only_measured(tmp_path: Path) -> None:
    header = read_header(EVERY_KIND.write(tmp_path / "m.gguf"))

    assert list(header.metadata) == [key for key, _ in EVERY_KIND.pairs]
    numbers = {f"n.{kind}": 1 for kind in range(13) if kind not in {gb.STRING, gb.ARRAY}}
    assert dict(header.metadata) == numbers | {
        "general.architecture": "llama",
        "n.negative": -(2**63),
        "a.numbers": (3, -1, 2),
        "a.flags": (True, False),
        "a.empty": (),
        "tokenizer.ggml.tokens": OmittedValue(is_array=True, length=5),
        "tokenizer.ggml.scores": OmittedValue(is_array=True, length=5000),
        "general.description": OmittedValue(is_array=False, length=len(LONG_STRING)),
        "tokenizer.chat_template": "{{ messages }}" + "y" * 100_000,
    }


def test_keys_are_found_where_the_offsets_say(tmp_path: Path) -> None:
    data = EVERY_KIND.content()

    header = read_header(EVERY_KIND.write(tmp_path / "m.gguf"))

    assert list(header.key_offsets) == list(header.metadata)
    for key, offset in header.key_offsets.items():
        assert data[offset:].startswith(gb.name(key))


def test_arrays_of_strings_are_passed_over_across_chunk_borders(tmp_path: Path) -> None:
    tokens = [b"t" * (index * 7919 % 61) for index in range(60_000)]
    file = Gguf().plus(("tokens", gb.strings(tokens)), ("after", gb.u32(7)))

    header = read_header(file.write(tmp_path / "m.gguf"))

    assert header.metadata["tokens"] == OmittedValue(is_array=True, length=len(tokens))
    assert header.metadata["after"] == 7
    assert header.tensors[0].name == "token_embd.weight"


def test_a_template_longer_than_its_bound_is_only_measured(tmp_path: Path) -> None:
    length = reader.MAX_KEPT_TEMPLATE_BYTES + 1
    file = Gguf().plus((reader.TEMPLATE_KEY, gb.text("z" * length)))

    header = read_header(file.write(tmp_path / "m.gguf"))

    assert header.metadata[reader.TEMPLATE_KEY] == OmittedValue(is_array=False, length=length)


def test_kept_array_elements_have_one_budget_for_the_whole_file(tmp_path: Path) -> None:
    full = gb.numbers(gb.UINT8, [1] * reader.MAX_KEPT_ARRAY_LENGTH)
    fitting = reader.MAX_KEPT_ARRAY_ELEMENTS // reader.MAX_KEPT_ARRAY_LENGTH
    file = Gguf().plus(*((f"a.{index}", full) for index in range(fitting + 1)))

    header = read_header(file.write(tmp_path / "m.gguf"))

    assert isinstance(header.metadata[f"a.{fitting - 1}"], tuple)
    assert header.metadata[f"a.{fitting}"] == OmittedValue(is_array=True, length=reader.MAX_KEPT_ARRAY_LENGTH)


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    header = read_header(Gguf(tensors=[]).write(tmp_path / "vocabulary.gguf"))

    assert header.tensors == ()
    assert header.parameter_count == header.tensor_bytes == 0


def test_the_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    tensors = [Tensor("a", (1,), gb.F32, 4), Tensor("b", (1,), gb.F32, 4)]
    file = Gguf([("general.alignment", gb.u32(256))], tensors, alignment=256)

    header = read_header(file.write(tmp_path / "m.gguf"))

    assert header.data_offset % 256 == 0
    assert [tensor.offset for tensor in header.tensors] == [0, 256]


def _array(element_type: int, length: int) -> bytes:
    return struct.pack("<IIQ", gb.ARRAY, element_type, length)


TENSORS_AT = 24 + len(gb.name("general.architecture") + gb.text("llama"))

WRONG: dict[str, tuple[Gguf, str, int]] = {
    "magic": (Gguf(magic=b"GGML"), "is no GGUF file: it starts with b'GGML' and not with GGUF", 0),
    "git lfs pointer": (Gguf(magic=b"vers"), "is a Git LFS pointer", 0),
    "version 0": (Gguf(version=0), "has GGUF version 0", 4),
    "too many tensors": (Gguf(tensor_count=2**63), "the number of tensors is 9223372036854775808", 8),
    "too many keys": (Gguf(pair_count=4097), "the number of keys is 4097; at most 4096", 16),
    "empty key": (Gguf([("", gb.u32(1))]), "key 1 of 1 is empty", 24),
    "long key": (Gguf([("k" * 1025, gb.u32(1))]), "key 1 of 1 has 1025 bytes in its name", 24),
    "key cut off": (Gguf([(b"abc", b"")], [], pair_count=2), "the file ends in key 'abc'", 35),
    "key that is not UTF-8": (Gguf([(b"\xff", gb.u32(1))]), r"a name that is not UTF-8: b'\xff'", 24),
    "key with a zero": (Gguf([(b"a\0", gb.u32(1))]), "has a zero byte in its name", 24),
    "key twice": (Gguf([("a", gb.u32(1)), ("a", gb.u32(1))]), "key 'a' is there twice", 41),
    "unknown value type": (Gguf([("a", struct.pack("<II", 13, 0))]), "key 'a' has unknown value type 13", 33),
    "array of arrays": (Gguf([("a", _array(gb.ARRAY, 1))]), "key 'a' is an array of arrays", 37),
    "array of unknown": (Gguf([("a", _array(99, 1))]), "key 'a' is an array of unknown value type 99", 37),
    "absurd array": (Gguf([("a", _array(gb.UINT64, 2**64 - 1))]), "the file ends in key 'a'", 49),
    "absurd strings": (
        Gguf([("a", _array(gb.STRING, 2**64 - 1))]),
        "key 'a' has 18446744073709551615 strings",
        37,
    ),
    "more strings than bytes": (Gguf([("a", _array(gb.STRING, 1000))]), "the file ends in key 'a'", 49),
    "absurd string": (
        Gguf([("a", struct.pack("<IQ", gb.STRING, 2**64 - 1))]),
        "the file ends in key 'a'",
        45,
    ),
    "absurd string in an array": (
        Gguf([("a", _array(gb.STRING, 2) + gb.name("ok") + struct.pack("<Q", 2**64 - 1))]),
        "the file ends in key 'a'",
        59,
    ),
    "alignment 0": (Gguf([("general.alignment", gb.u32(0))]), "must be a power of two", 24),
    "alignment 33": (Gguf([("general.alignment", gb.u32(33))]), "must be a power of two", 24),
    "alignment of another type": (
        Gguf([("general.alignment", gb.number(gb.UINT64, 32))]),
        "key 'general.alignment' has value type 10; it must be 4",
        49,
    ),
    "long tensor name": (
        Gguf(tensors=[Tensor("t" * 64)]),
        "tensor 1 of 1 has 64 bytes in its name",
        TENSORS_AT,
    ),
    "tensor name with a zero": (Gguf(tensors=[Tensor(b"a\0b")]), "has a zero byte in its name", TENSORS_AT),
    "five dimensions": (Gguf(tensors=[Tensor("t", (1,) * 5)]), "tensor 't' has 5 dimensions", TENSORS_AT),
    "empty dimension": (
        Gguf(tensors=[Tensor("t", (32, 0))]),
        "tensor 't' has dimensions (32, 0)",
        TENSORS_AT,
    ),
    "overflowing product": (
        Gguf(tensors=[Tensor("t", (2**32, 2**32))]),
        "tensor 't' has dimensions (4294967296, 4294967296), more values than can be counted",
        TENSORS_AT,
    ),
    "unknown tensor type": (
        Gguf(tensors=[Tensor("t", type=999)]),
        "bad tensor type 999 of tensor 't'",
        TENSORS_AT,
    ),
    "broken block": (
        Gguf(tensors=[Tensor("t", (33, 32), gb.Q4_0)]),
        "tensor 't' has rows of 33 values; type Q4_0 needs a multiple of 32",
        TENSORS_AT,
    ),
    "tensor twice": (
        Gguf(tensors=[Tensor("t"), Tensor("t")]),
        "tensor 't' is there twice",
        TENSORS_AT + len(Tensor("t").info(0)),
    ),
    "unaligned tensor": (
        Gguf(tensors=[Tensor("t"), Tensor("u", offset=513)]),
        "tensor 'u' has offset 513; it must be 512",
        TENSORS_AT + len(Tensor("t").info(0)),
    ),
    "overlapping tensors": (
        Gguf(tensors=[Tensor("t"), Tensor("u", offset=0)]),
        "tensor 'u' has offset 0; it must be 512",
        TENSORS_AT + len(Tensor("t").info(0)),
    ),
    "tensor outside": (
        Gguf(tensors=[Tensor("t", (32, 2**40))]),
        "is truncated: tensor 't' goes 140737488354816 bytes past the end",
        TENSORS_AT,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_header_is_refused_with_what_and_where(tmp_path: Path, wrong: str) -> None:
    file, what, offset = WRONG[wrong]

    error = _error(tmp_path / "wrong.gguf", file.content() if file.tensors else file.header())

    assert what in error.what
    assert error.offset == offset
    assert str(error) == f"{tmp_path}/wrong.gguf: {error.what} (at byte {offset})"


UNSUPPORTED: dict[str, tuple[Gguf, str]] = {
    "version 1": (Gguf(version=1), "has GGUF version 1; 2 and 3 are known"),
    "version 4": (Gguf(version=4), "has GGUF version 4; 2 and 3 are known"),
    "big-endian": (Gguf(version=3 << 24), "is a big-endian GGUF file; convert it to little-endian"),
    "removed type": (
        Gguf(tensors=[Tensor("t", type=31)]),
        "tensor 't' has type Q4_0_4_4, which llama.cpp no",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_sound_file_of_another_kind_is_unsupported_and_not_damaged(tmp_path: Path, kind: str) -> None:
    file, what = UNSUPPORTED[kind]

    error = _error(tmp_path / "other.gguf", file.content())

    assert isinstance(error, UnsupportedGgufError)
    assert what in error.what


def test_every_truncation_is_an_error_and_only_the_whole_file_is_none(tmp_path: Path) -> None:
    pairs = [("general.architecture", gb.text("llama")), ("tokens", gb.strings(["a", "bc"]))]
    data = Gguf(pairs, tensors=[Tensor("a"), Tensor("b", (32,), gb.F32, 128)]).content()
    path = tmp_path / "m.gguf"

    for length in range(len(data)):
        assert _error(path, data[:length]).offset <= length

    path.write_bytes(data)
    assert len(read_header(path).tensors) == 2


def test_a_header_larger_than_the_bound_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    length = reader.MAX_HEADER_BYTES
    path.write_bytes(Gguf([("a", _array(gb.UINT8, length))], []).header())
    os.truncate(path, 2 * length)

    with pytest.raises(GgufError, match=f"the header goes on past {length} bytes, in key 'a'"):
        read_header(path)


def test_a_large_header_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    keys = [(f"k{index}".ljust(1024, "k"), gb.text("v" * 1024)) for index in range(100)]
    pairs = [*keys, ("s", _array(gb.STRING, 200_000) + struct.pack("<Q", 50_000_000))]
    path.write_bytes(Gguf(pairs, []).header())
    os.truncate(path, 100_000_000)

    tracemalloc.start()
    try:
        read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4_000_000


def test_messages_stay_small_and_printable_whatever_the_names_are(tmp_path: Path) -> None:
    key = "\x1b[31m" + "k" * 1000
    error = _error(tmp_path / "m.gguf", Gguf([(key, struct.pack("<I", 77))], []).header())

    assert len(error.what) < 200
    assert error.what.isprintable()


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)

    with pytest.raises(GgufError, match="is not a regular file"):
        read_header(path)


def test_a_file_that_cannot_be_opened_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        read_header(tmp_path)


def test_an_error_names_its_file_in_utf_8_and_survives_pickling() -> None:
    error = UnsupportedGgufError(os.fsdecode(b"/m/\xff.gguf"), "is odd", 3)

    assert str(error).encode() == "/m/\ufffd.gguf: is odd (at byte 3)".encode()
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - bytes of our own
    assert (type(copy), copy.path, copy.what, copy.offset) == (UnsupportedGgufError, error.path, "is odd", 3)


def test_a_file_by_the_gguf_package_reads_as_its_own_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_name("Written")
    writer.add_context_length(2048)
    writer.add_head_count_kv([4, 8])
    writer.add_token_list(["<s>", "</s>", "a"])
    writer.add_custom_alignment(64)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), dtype=np.float32))
    quantized = np.zeros((4, 34), dtype=np.uint8)
    writer.add_tensor("output.weight", quantized, raw_dtype=gguf_package.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    reference = gguf_package.GGUFReader(path)

    assert header.data_offset == reference.data_offset
    assert [(t.name, t.dims, t.type, t.size_bytes) for t in header.tensors] == [
        (t.name, tuple(int(dim) for dim in t.shape), t.tensor_type.name, t.n_bytes) for t in reference.tensors
    ]
    assert header.data_offset + header.tensors[1].offset == reference.tensors[1].data_offset
    assert header.metadata["llama.attention.head_count_kv"] == (4, 8)
    assert header.metadata["general.name"] == "Written"
    assert header.metadata["tokenizer.ggml.tokens"] == OmittedValue(is_array=True, length=3)


SEED = EVERY_KIND.plus(("split.no", gb.number(gb.UINT16, 0)), ("split.count", gb.number(gb.UINT16, 2)))
SEED_BYTES = Gguf(
    [pair for pair in SEED.pairs if len(pair[1]) < 1000], [*SEED.tensors, Tensor("z", (32,), gb.F32, 128)]
).content()
INTERESTING = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]

overwrites = st.tuples(
    st.integers(0, len(SEED_BYTES) - 1),
    st.binary(min_size=1, max_size=8)
    | st.sampled_from([struct.pack("<Q", value) for value in INTERESTING])
    | st.sampled_from([struct.pack("<I", value) for value in INTERESTING if value < 2**32])
    | st.integers(0, 130).map(lambda value: struct.pack("<I", value)),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mutations=st.lists(overwrites, max_size=4),
    inserted=st.none() | st.tuples(st.integers(0, len(SEED_BYTES)), st.binary(max_size=40)),
    removed=st.none() | st.tuples(st.integers(0, len(SEED_BYTES)), st.integers(1, 40)),
    length=st.none() | st.integers(0, len(SEED_BYTES)),
)
def test_any_bytes_are_read_or_refused_and_nothing_else(
    tmp_path: Path,
    mutations: list[tuple[int, bytes]],
    inserted: tuple[int, bytes] | None,
    removed: tuple[int, int] | None,
    length: int | None,
) -> None:
    data = bytearray(SEED_BYTES)
    for at, replacement in mutations:
        data[at : at + len(replacement)] = replacement
    if inserted is not None:
        data[inserted[0] : inserted[0]] = inserted[1]
    if removed is not None:
        del data[removed[0] : removed[0] + removed[1]]
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data[:length])

    outcome = _facts_or_error(path)

    if isinstance(outcome, GgufError):
        assert 0 <= outcome.offset <= len(data)
        assert len(str(outcome)) < 1000
    else:
        assert outcome.tensor_bytes <= len(data)
        assert 0 <= outcome.parameter_count < 2**63


def _facts_or_error(path: Path) -> ModelFacts | GgufError:
    try:
        return model_facts(read_header(path))
    except GgufError as error:
        return error
