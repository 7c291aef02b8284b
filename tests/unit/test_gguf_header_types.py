from __future__ import annotations

import ctypes

import gguf
import pytest

from paddock_server.catalog.ggml_types import FILE_TYPES, REMOVED_TENSOR_TYPES, TENSOR_TYPES


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    # gguf counts 40 bytes for a block of Q8_1, which ggml has stored in 36 since its sums became half floats.
    known = {number: size for number, size in gguf.GGML_QUANT_SIZES.items() if number.name != "Q8_1"}

    for number, (block_elements, block_bytes) in known.items():
        assert TENSOR_TYPES[number] == (number.name, block_elements, block_bytes)


def test_the_file_type_table_agrees_with_the_gguf_package() -> None:
    for number in gguf.LlamaFileType:
        if number is not gguf.LlamaFileType.GUESSED:
            assert FILE_TYPES[number] == number.name.removeprefix("MOSTLY_").removeprefix("ALL_")


def test_the_type_tables_agree_with_the_ggml_that_is_installed() -> None:
    ggml = pytest.importorskip("llama_cpp._ggml").libggml
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t

    for number, tensor_type in TENSOR_TYPES.items():
        name: bytes = ggml.ggml_type_name(number)
        installed = (name.decode().upper(), ggml.ggml_blck_size(number), ggml.ggml_type_size(number))
        assert installed == tensor_type
    for number in REMOVED_TENSOR_TYPES:
        assert ggml.ggml_blck_size(number) == 0
    assert not TENSOR_TYPES.keys() & REMOVED_TENSOR_TYPES.keys()
