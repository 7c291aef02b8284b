from __future__ import annotations

from pathlib import Path

import pytest

from paddock_server.catalog import Catalog
from tests.models.embed import make_embedder
from tests.models.noise import make_noise
from tests.models.wrong import WRONG_MODELS

# Faults that only show when llama.cpp builds the model: the worker answers for these.
SEEN_ONLY_BY_LLAMA_CPP = frozenset(
    {
        "missing-tensor",
        "missing-key",
        "wrong-key-type",
        "wrong-shape",
        "unknown-architecture",
        "unknown-tokenizer",
        "unknown-pre-tokenizer",
        "no-layers",
        "duplicate-token",
        "integer-embedding",
        "integer-norm",
        "integer-output",
    }
)


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_file_is_an_entry_with_the_reason_that_a_load_must_give(tmp_path: Path, name: str) -> None:
    wrong = WRONG_MODELS[name]
    wrong.make(tmp_path / f"{name}.gguf")

    (entry,) = Catalog([tmp_path]).scan().values()

    assert entry.id == name
    reason = None if entry.problem is None else entry.problem.reason
    assert reason == (None if name in SEEN_ONLY_BY_LLAMA_CPP else wrong.reason)


def test_right_files_have_no_problem(tmp_path: Path) -> None:
    make_noise(tmp_path / "one.gguf")
    make_noise(tmp_path / "Set" / "many.gguf", shards=3)
    make_embedder(tmp_path / "embedder.gguf")

    entries = Catalog([tmp_path]).scan()

    assert {id_: entry.problem for id_, entry in entries.items()} == {
        "Set": None,
        "embedder": None,
        "one": None,
    }
    one, many = entries["one"].facts, entries["Set"].facts
    assert one is not None
    assert many is not None
    assert (many.parameter_count, many.tensor_count) == (one.parameter_count, one.tensor_count)
    embedder = entries["embedder"].facts
    assert embedder is not None
    assert embedder.is_embedding_model
