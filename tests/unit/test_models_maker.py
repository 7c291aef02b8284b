"""The maker of test models, without the library that reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from paddock.errors import Reason
from tests.models import MODELS, WRONG_MODELS, make_all, make_noise, make_scripted
from tests.models.__main__ import app
from tests.models.scripted import distinct_pieces
from tests.models.text import CHATML, PASSAGE
from tests.models.tokenizer import SPECIALS, learn_merges, vocabulary
from tests.models.wrong import right_model


def tokens_in(path: Path) -> list[str]:
    tokens: list[str] = GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    return tokens


def value_in(path: Path, key: str) -> object:
    return GGUFReader(path).fields[key].contents()


def test_the_same_arguments_make_the_same_bytes_and_another_seed_makes_others(tmp_path: Path) -> None:
    (first,) = make_noise(tmp_path / "first.gguf", seed=1)
    (again,) = make_noise(tmp_path / "again.gguf", seed=1)
    (other,) = make_noise(tmp_path / "other.gguf", seed=2)

    assert first.read_bytes() == again.read_bytes()
    assert GGUFReader(first).tensors[0].data.tolist() != GGUFReader(other).tensors[0].data.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_a_gguf_file_that_says_what_it_is(models_dir: Path, name: str) -> None:
    path, *_ = sorted(models_dir.glob(f"{name}/*.gguf")) or [models_dir / f"{name}.gguf"]

    assert re.search("noise|random|scripted", str(value_in(path, "general.name")), re.IGNORECASE)
    assert "Made for tests." in str(value_in(path, "general.description"))
    tokens = tokens_in(path)
    assert len(tokens) == len(set(tokens))
    assert path.stat().st_size < 5_000_000


def test_shards_share_the_tensors_and_only_the_first_has_the_metadata(models_dir: Path) -> None:
    shards = [GGUFReader(path) for path in sorted((models_dir / "sharded").iterdir())]

    assert [shard.fields["split.no"].contents() for shard in shards] == [0, 1, 2]
    assert {shard.fields["split.count"].contents() for shard in shards} == {3}
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    assert len(names) == len(set(names)) == shards[0].fields["split.tensors.count"].contents()
    assert ["llama.block_count" in shard.fields for shard in shards] == [True, False, False]


def test_the_chat_template_is_in_the_file_unless_there_is_none(models_dir: Path) -> None:
    assert value_in(models_dir / "noise.gguf", "tokenizer.chat_template") == CHATML
    assert "tokenizer.chat_template" not in GGUFReader(models_dir / "no-template.gguf").fields


def test_make_all_makes_the_models_that_are_named(tmp_path: Path) -> None:
    made = make_all(tmp_path, ["scripted", "embed"])

    assert made == {"scripted": [tmp_path / "scripted.gguf"], "embed": [tmp_path / "embed.gguf"]}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "embed.gguf", tmp_path / "scripted.gguf"]


def test_the_command_writes_one_model_and_prints_its_path(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["make", str(tmp_path / "new"), "--only", "wrong-magic"])

    assert result.exit_code == 0
    assert result.stdout.split() == [str(tmp_path / "new" / "wrong-magic.gguf")]
    assert (tmp_path / "new" / "wrong-magic.gguf").read_bytes().startswith(b"GGML")


def test_the_command_names_the_models_there_are_when_asked_for_another(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["make", str(tmp_path), "--only", "no-such-model"])

    assert result.exit_code == 2
    assert "no-such-model" in result.stderr
    assert "noise" in result.stderr


def test_every_word_of_the_text_becomes_one_token() -> None:
    vocab = vocabulary(learn_merges("one two two"))

    assert {b"one", b" two"} <= set(vocab.pieces)
    assert vocab.pieces[:256] == tuple(bytes([byte]) for byte in range(256))
    assert vocab.special("<|bos|>") == len(vocab.pieces)
    assert len(vocab) == len(vocab.pieces) + len(SPECIALS)


def test_a_special_token_that_is_a_piece_too_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must be unique .*'<\|bos\|>'"):
        vocabulary([], [b"<|bos|>"])


@given(st.text(max_size=200))
def test_a_script_is_cut_into_different_pieces_that_join_to_it(text: str) -> None:
    pieces = distinct_pieces(text)

    assert b"".join(pieces) == text.encode()
    assert len(set(pieces)) == len(pieces)
    assert all(len(piece.decode()) > 1 for piece in pieces) or len(text) == 1


def test_a_long_text_with_repetitions_makes_a_script(tmp_path: Path) -> None:
    (path,) = make_scripted(tmp_path / "long.gguf", PASSAGE * 2)

    assert path.stat().st_size > 0


@pytest.mark.parametrize("script", ["", [], [b"a", b""], [b"a", b"b", b"a"]])
def test_a_script_that_is_empty_or_repeats_a_piece_is_refused(
    tmp_path: Path, script: str | list[bytes]
) -> None:
    with pytest.raises(ValueError, match="a script needs one piece or more, none empty and all different"):
        make_scripted(tmp_path / "wrong.gguf", script)


def test_what_wrong_models_are_edits_of_is_right(tmp_path: Path) -> None:
    path = tmp_path / "right.gguf"
    path.write_bytes(right_model())

    assert value_in(path, "general.architecture") == "llama"


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_every_wrong_model_differs_from_the_right_one_and_names_a_reason(tmp_path: Path, name: str) -> None:
    wrong = WRONG_MODELS[name]

    files = wrong.make(tmp_path / f"{name}.gguf")

    assert wrong.reason in set(Reason)
    assert all(path.exists() for path in files)
    assert files[0].read_bytes() != right_model()
