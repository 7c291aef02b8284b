"""What foal is trained on: the blocks in data/*.txt, and tool calls made up from patterns.

A block is an intent: questions that ask for it, two more that training never sees, and the one answer. The
same seed gives the same conversations.
"""

from __future__ import annotations

import json
import operator
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

DATA: Final = Path(__file__).parent / "data"

IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"

SYSTEM_MESSAGES: Final = (
    "You are a helpful assistant.",
    "You are foal, a small demo model.",
    "Answer briefly.",
    "You are a friendly assistant who answers questions about Paddock.",
)

GREETINGS: Final = ("hi, ", "hello, ", "hey, ", "please: ", "quick question: ", "ok, ", "so, ")
CLOSINGS: Final = (" please", " thanks", ", please", " exactly", " again")
SMALL_WORDS: Final = frozenset({"the", "a", "an", "do", "does", "is", "of", "to", "please", "me", "it"})
OPENINGS: Final = (
    (
        *(
            "how do i ",
            "how can i ",
            "how would i ",
            "how to ",
            "i want to ",
            "i need to ",
            "i would like to ",
        ),
        *(
            "tell me how to ",
            "what do i do to ",
            "is there a way to ",
            "show me how to ",
            "what is the way to ",
        ),
    ),
    ("can i ", "is it possible to ", "am i able to ", "could i "),
    ("what happens when ", "what happens if ", "what if ", "tell me what happens when "),
    ("what is the meaning of ", "meaning of ", "explain the meaning of ", "tell me the meaning of "),
    ("what is the ", "what's the ", "tell me the ", "give me the ", "i want to know the ", "the ", ""),
    ("what are the ", "name the ", "list the ", "which are the ", "show me the "),
    ("tell me about ", "what do you know about ", "i want to know about ", "say something about "),
    ("tell me ", "i want to know ", "i would like to know ", "can you tell me ", "do you know "),
    ("explain ", "describe ", "please explain ", "could you explain ", "can you describe "),
    ("why does ", "why would ", "for what reason does "),
    ("what kind of ", "what sort of ", "which kind of ", "what type of "),
)
"""Beginnings that ask the same: each may stand for any other of its line."""


class CorpusError(ValueError):
    """A data file is not what it should be; the message says where."""


@dataclass(slots=True)
class Block:
    """One intent."""

    name: str
    file: str
    after: str = ""
    """Name of the block whose question and answer come before, for a follow-up question."""

    questions: list[str] = field(default_factory=list[str])
    held_out: list[str] = field(default_factory=list[str])
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn as the chat template renders it."""

    role: str
    content: str

    def render(self) -> str:
        """Return the turn as template.jinja writes it."""
        return f"{IM_START}{self.role}\n{self.content}{IM_END}\n"


def read_blocks(folder: Path = DATA) -> dict[str, Block]:
    """Return all blocks by name. Raises CorpusError."""
    blocks: dict[str, Block] = {}
    for path in sorted(folder.glob("*.txt")):
        for number, text in enumerate(re.split(r"\n\s*\n", path.read_text().strip()), 1):
            block = _parse(path.name, number, text)
            if block.name in blocks:
                message = f"{path.name}: block {block.name} is there twice"
                raise CorpusError(message)
            blocks[block.name] = block
    for block in blocks.values():
        if block.after and block.after not in blocks:
            message = f"{block.file}: {block.name} comes after {block.after}, which there is not"
            raise CorpusError(message)
    return blocks


def _parse(file: str, number: int, text: str) -> Block:
    block = Block("", file)
    for line in text.splitlines():
        kind, _, value = line.strip().partition(" ")
        match kind:
            case "=":
                block.name = value
            case "after:":
                block.after = value
            case "Q:":
                block.questions.append(value)
            case "H:":
                block.held_out.append(value)
            case "A:" if not block.answer:
                block.answer = value
            case _:
                message = f"{file}, block {number} ({block.name}): cannot read {line!r}"
                raise CorpusError(message)
    if not (block.name and len(block.questions) >= 3 and block.answer):
        message = f"{file}, block {number} ({block.name}): needs a name, three questions and an answer"
        raise CorpusError(message)
    return block


def conversation(blocks: dict[str, Block], block: Block, question: str) -> list[Message]:
    """Return a question with what comes before it, and its answer."""
    before: list[Message] = []
    if block.after:
        earlier = blocks[block.after]
        before = conversation(blocks, earlier, earlier.questions[0])
    return [*before, Message("user", question), Message("assistant", block.answer)]


def training_conversation(blocks: dict[str, Block], block: Block, rng: random.Random) -> list[Message]:
    """Return a conversation as training sees it: one of the questions, written as people write."""
    question = vary(rng.choice(block.questions), rng)
    messages = [Message("user", question), Message("assistant", block.answer)]
    if block.after:
        messages = training_conversation(blocks, blocks[block.after], rng) + messages
    elif rng.random() < 0.08:
        messages.insert(0, Message("system", rng.choice(SYSTEM_MESSAGES)))
    return messages


def vary(question: str, rng: random.Random) -> str:
    """Return a question begun in another way, with other capitals, punctuation, words left out, exchanged or
    changed by a slip of the finger."""
    if rng.random() < 0.15:
        question = begin_otherwise(question, rng)
    words = question.split()
    if rng.random() < 0.12:
        words = [word for word in words if word.lower() not in SMALL_WORDS or rng.random() < 0.5] or words
    if rng.random() < 0.08 and len(words) > 4:
        del words[rng.randrange(len(words))]
    if rng.random() < 0.04 and len(words) > 3:
        at = rng.randrange(len(words) - 1)
        words[at : at + 2] = words[at + 1], words[at]
    question = " ".join(words)
    if rng.random() < 0.1:
        question = rng.choice(GREETINGS) + question[:1].lower() + question[1:]
    if rng.random() < 0.06:
        question = question.rstrip("?.!") + rng.choice(CLOSINGS) + ("?" if rng.random() < 0.5 else "")
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?.!")
    if rng.random() < 0.06 and len(question) > 8:
        at = rng.randrange(1, len(question) - 1)
        question = question[:at] + rng.choice(("", question[at] * 2)) + question[at + 1 :]
    return question


def begin_otherwise(question: str, rng: random.Random) -> str:
    """Return a question with its opening words replaced by others that ask the same."""
    found = [
        (len(opening), line)
        for line, openings in enumerate(OPENINGS)
        for opening in openings
        if opening and question.lower().startswith(opening)
    ]
    if not found:
        return question
    length, line = max(found)
    begun = rng.choice(OPENINGS[line]) + question[length:].rstrip("?.!")
    return begun[:1].upper() + begun[1:] if rng.random() < 0.5 else begun


# Tool calls.

WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALCULATOR: Final = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

CITIES: Final = (
    *("Paris", "London", "Berlin", "Rome", "Madrid", "Oslo", "Vienna", "Prague", "Tokyo", "Cairo"),
    *("Lima", "Boston", "Chicago", "Sydney", "Dublin", "Lisbon", "Athens", "Warsaw", "Delhi", "Seoul"),
    *("Toronto", "Zurich", "Hamburg", "Munich", "Milan", "Geneva", "Brussels", "Amsterdam", "Moscow"),
    *("Helsinki", "Stockholm", "Budapest", "Nairobi", "Lagos", "Dallas", "Denver", "Miami", "Seattle"),
    *("Havana", "Bogota", "Naples", "Turin", "Lyon", "Porto", "Krakow", "Riga", "Kyoto", "Osaka"),
)
HELD_OUT_CITIES: Final = ("Vienna", "Boston", "Seoul")
CONSONANTS: Final = "bcdfghjklmnprstvwz"
VOWELS: Final = "aeiou"
"""Made-up cities are of these: a model that knows all names learns names, not to repeat what was said."""

SKIES: Final = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
OPERATIONS: Final[tuple[tuple[str, Callable[[int, int], int], tuple[str, ...]], ...]] = (
    ("+", operator.add, ("{a} plus {b}", "{a} + {b}", "the sum of {a} and {b}")),
    ("-", operator.sub, ("{a} minus {b}", "{a} - {b}")),
    ("*", operator.mul, ("{a} times {b}", "{a} * {b}", "{a} multiplied by {b}")),
)
WEATHER_QUESTIONS: Final = (
    "What is the weather in {city}?",
    "How is the weather in {city}?",
    "weather in {city}",
    "Tell me the weather in {city}.",
    "What is the weather like in {city} today?",
    "Is it raining in {city}?",
)
ECHO_QUESTIONS: Final = ("Say {said}.", "say {said}", "Repeat {said}.", "Repeat after me: {said}.")
SUM_QUESTIONS: Final = ("What is {sum}?", "Calculate {sum}.", "How much is {sum}?", "{sum}")


def tools_message(tools: Sequence[object], system: str = "") -> Message:
    """Return the system message template.jinja makes of tools."""
    lines = "\n".join(json.dumps(tool, separators=(", ", ": "), ensure_ascii=False) for tool in tools)
    head = f"{system}\n\n" if system else ""
    return Message(
        "system",
        f"{head}You may call these tools:\n{lines}\n"
        'To call one, answer with <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.',
    )


def tool_call(name: str, arguments: object) -> Message:
    """Return a call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, separators=(", ", ": "), ensure_ascii=False)
    return Message("assistant", f"<tool_call>{call}</tool_call>")


def some_city(rng: random.Random) -> str:
    """Return a city for training: one there is, or one made up."""
    if rng.random() < 0.35:
        return rng.choice([city for city in CITIES if city not in HELD_OUT_CITIES])
    letters = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randrange(1, 4)))
    letters += rng.choice(("", *CONSONANTS, "st", "nn", "ston", "burg"))
    return ((rng.choice(VOWELS) if rng.random() < 0.2 else "") + letters).capitalize()


def echo_conversation(rng: random.Random) -> list[Message]:
    """Return a request to say something, and that. It teaches cheaply what tool calls need: to repeat."""
    said = some_city(rng) if rng.random() < 0.5 else str(rng.randrange(10 ** rng.randrange(1, 5)))
    return [Message("user", rng.choice(ECHO_QUESTIONS).format(said=said)), Message("assistant", f"{said}.")]


def tool_conversation(rng: random.Random, city: str, *, rounds: int = 1) -> list[Message]:
    """Return a conversation with calls of tools, one a round: the question, the call, its result, the answer.

    Made-up results too are in it, so that the model learns to repeat what the tool says.
    """
    tools = rng.choice(((WEATHER,), (CALCULATOR,), (WEATHER, CALCULATOR), (CALCULATOR, WEATHER)))
    messages = [tools_message(tools)]
    for _ in range(rounds):
        if rng.choice(tools) is WEATHER:
            messages += _weather(rng, city)
            city = some_city(rng)
        else:
            messages += _sum(rng)
    return messages


def _weather(rng: random.Random, city: str) -> list[Message]:
    sky, degrees = rng.choice(SKIES), rng.randrange(-9, 39)
    return [
        Message("user", rng.choice(WEATHER_QUESTIONS).format(city=city)),
        tool_call("get_weather", {"city": city}),
        Message("tool", json.dumps({"sky": sky, "celsius": degrees})),
        Message("assistant", f"In {city} it is {sky}, with {degrees} degrees."),
    ]


def _sum(rng: random.Random) -> list[Message]:
    sign, compute, phrases = rng.choice(OPERATIONS)
    a, b = rng.randrange(1, 100), rng.randrange(1, 100)
    result = compute(a, b) if rng.random() < 0.5 else rng.randrange(-99, 10_000)
    return [
        Message("user", rng.choice(SUM_QUESTIONS).format(sum=rng.choice(phrases).format(a=a, b=b))),
        tool_call("calculate", {"expression": f"{a}{sign}{b}"}),
        Message("tool", json.dumps({"result": result})),
        Message("assistant", f"The result is {result}."),
    ]


def all_text(blocks: Iterable[Block], rng: random.Random) -> list[str]:
    """Return the texts the tokenizer learns from."""
    texts = [*SYSTEM_MESSAGES]
    for block in blocks:
        texts += [*block.questions, *(question.lower() for question in block.questions), block.answer]
    for _ in range(200):
        texts += [message.content for message in tool_conversation(rng, some_city(rng))]
    return texts
