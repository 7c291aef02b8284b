"""What foal, the demo model, learns from: whole data files, and conversations as the server renders them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf import json_format

from models.foal import corpus
from paddock.v1 import generation_pb2
from paddock_server.worker.chat import ChatTemplate, SpecialTokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOAL = Path(corpus.__file__).parent


def rendered(messages: list[corpus.Message], tools: Sequence[Mapping[str, object]] | None = None) -> str:
    chat = generation_pb2.ChatInput()
    turns = [
        {"role": f"ROLE_{message.role.upper()}", "content": [{"text": message.content}]}
        for message in messages
    ]
    json_format.ParseDict({"messages": turns, "tools": [*(tools or [])]}, chat)
    template = ChatTemplate((FOAL / "template.jinja").read_text().strip(), SpecialTokens(bos="", eos=""))
    return template.render(chat)


def test_every_block_has_two_questions_that_training_never_sees() -> None:
    blocks = corpus.read_blocks()
    assert len(blocks) > 300
    assert [block.name for block in blocks.values() if len(block.held_out) != 2] == []
    trained = {question.casefold() for block in blocks.values() for question in block.questions}
    assert [q for block in blocks.values() for q in block.held_out if q.casefold() in trained] == []


def test_no_question_asks_for_two_answers() -> None:
    answers: dict[tuple[str, str], str] = {}
    twice = [
        f"{block.name}: {question}"
        for block in corpus.read_blocks().values()
        for question in (*block.questions, *block.held_out)
        if answers.setdefault((block.after, question.casefold()), block.answer) != block.answer
    ]
    assert twice == []


def test_training_sees_conversations_as_the_template_renders_them() -> None:
    rng = random.Random(1)
    blocks = corpus.read_blocks()
    for block in list(blocks.values())[::7]:
        messages = corpus.training_conversation(blocks, block, rng)
        expected = "".join(message.render() for message in messages) + "<|im_start|>assistant\n"
        assert rendered(messages) == expected


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_tools_look_in_training_as_the_template_renders_them(system: str) -> None:
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    weather = {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parametersJsonSchema": schema,
    }
    said = [corpus.Message("system", system)] if system else []
    question = corpus.Message("user", "What is the weather in Oslo?")
    expected = corpus.tools_message([corpus.WEATHER], system).render() + question.render()
    assert rendered([*said, question], [weather]) == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "text",
    [
        "= a\nQ: 1\nQ: 2\nA: x",
        "Q: 1\nQ: 2\nQ: 3\nA: x",
        "= a\nQ: 1\nQ: 2\nQ: 3",
        "= a\nB: 1",
        "= a\nA: x\nA: y",
    ],
)
def test_a_block_that_is_not_whole_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(text)
    with pytest.raises(corpus.CorpusError, match=r"data\.txt"):
        corpus.read_blocks(tmp_path)
