"""Names of models of the hub, and the files they mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddock_server.catalog.hub_names import (
    HubNameError,
    HubRef,
    NoSuchFileError,
    choose_model,
    choose_projector,
    hub_ref,
    parse_hub_name,
    quant_tag,
    shards_of,
)

QUANTS = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-BF16.gguf", "m-F16.gguf", "README.md"]
SHARDS = [f"Q6_K/m-Q6_K-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "ref"),
    [
        ("hf:org/repo", HubRef("org/repo", "main", "")),
        ("hf:org/repo:q4_k_m", HubRef("org/repo", "main", "Q4_K_M")),
        ("org/repo:Q4_K_M", HubRef("org/repo", "main", "Q4_K_M")),
        ("hf:org/repo@v1.0", HubRef("org/repo", "v1.0", "")),
        ("hf:org/repo@refs/pr/1:Q8_0", HubRef("org/repo", "refs/pr/1", "Q8_0")),
        ("hf:org/repo:*q4_k_m.gguf", HubRef("org/repo", "main", "*q4_k_m.gguf")),
        ("hf:org/repo:sub/Model-f16.gguf", HubRef("org/repo", "main", "sub/Model-f16.gguf")),
        ("hf:org/repo@main:Q4_0", HubRef("org/repo", "main", "Q4_0")),
    ],
)
def test_a_name_is_read_as_its_parts(name: str, ref: HubRef) -> None:
    assert parse_hub_name(name) == ref
    assert parse_hub_name(ref.name) == ref


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hf:repo", "repo_id"),
        ("hf:a/b/c", "repo_id"),
        ("hf:../x", "repo_id"),
        ("hf:a--b/c", "repo_id"),
        ("hf:org/.hidden", "repo_id"),
        ("hf:", "repo_id"),
        ("hf:org/repo@", "revision"),
        ("hf:org/repo@../../etc", "revision"),
        ("hf:org/repo@/abs", "revision"),
        ("hf:org/repo:../x.gguf", "file_pattern"),
        ("hf:org/repo:a\nb", "file_pattern"),
        ("hf:org/repo:" + "x" * 300, "file_pattern"),
    ],
)
def test_a_wrong_part_is_named(name: str, field: str) -> None:
    with pytest.raises(HubNameError) as caught:
        parse_hub_name(name)

    assert caught.value.field == field


@given(st.text())
def test_any_text_is_a_name_or_refused_and_one_form_means_itself(text: str) -> None:
    try:
        ref = parse_hub_name(text)
    except HubNameError:
        return
    assert parse_hub_name(ref.name) == ref


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("", "m-Q4_K_M.gguf"),
        ("Q8_0", "m-Q8_0.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        ("F16", "m-F16.gguf"),  # not BF16, which comes first
        ("Q6_K", SHARDS[0]),
        ("*BF16*", "m-BF16.gguf"),
        ("m-F16.gguf", "m-F16.gguf"),
        ("m-Q6_K.gguf", SHARDS[0]),
        ("Q6_K/*", SHARDS[0]),
    ],
)
def test_a_tag_or_glob_means_one_model(pattern: str, file: str) -> None:
    assert choose_model([*QUANTS, *SHARDS], pattern) == file


def test_without_a_tag_it_is_q4_k_m_then_q8_0_then_the_first() -> None:
    assert choose_model(QUANTS, "") == "m-Q4_K_M.gguf"
    assert choose_model([file for file in QUANTS if "Q4" not in file], "") == "m-Q8_0.gguf"
    assert choose_model(["b-F16.gguf", "a-F16.gguf"], "") == "a-F16.gguf"


@pytest.mark.parametrize(
    ("files", "pattern", "told"),
    [
        (QUANTS, "Q2_K", "no file matches 'Q2_K'; it has .*m-Q4_K_M.gguf"),
        (QUANTS, "*.gguf", "means 4 models"),
        (["README.md"], "", "no GGUF model"),
        (["mmproj-F16.gguf", "imatrix.gguf", "mtp-Q4_K_M.gguf"], "", "no GGUF model"),
    ],
)
def test_what_means_no_model_or_several_is_told_with_what_there_is(
    files: list[str], pattern: str, told: str
) -> None:
    with pytest.raises(NoSuchFileError, match=told):
        choose_model(files, pattern)


def test_a_set_of_shards_is_whole_or_refused() -> None:
    assert shards_of(SHARDS, SHARDS[0]) == SHARDS
    assert shards_of(QUANTS, QUANTS[0]) == [QUANTS[0]]
    with pytest.raises(NoSuchFileError, match="2 of the 3 shards"):
        shards_of(SHARDS[:2], SHARDS[0])


def test_the_projector_is_the_nearest_and_then_the_one_of_closest_precision() -> None:
    files = ["mmproj-F16.gguf", "sub/mmproj-F16.gguf", "sub/mmproj-Q8_0.gguf", "other/mmproj-Q4_0.gguf"]

    assert choose_projector(files, "sub/m-Q4_K_M.gguf") == "sub/mmproj-Q8_0.gguf"
    assert choose_projector(files, "m-Q4_K_M.gguf") == "mmproj-F16.gguf"
    assert choose_projector(["m.gguf"], "m.gguf") is None


def test_the_quantization_is_what_the_file_name_ends_with() -> None:
    assert quant_tag("a/Llama-3.1-8B.Q5_K_S.gguf") == "Q5_K_S"
    assert quant_tag(SHARDS[1]) == "Q6_K"
    assert not quant_tag("stories260K.gguf")


def test_parts_of_a_source_are_checked_like_a_name() -> None:
    assert hub_ref("org/repo", "", "") == HubRef("org/repo")
    with pytest.raises(HubNameError):
        hub_ref("/etc", "", "")
