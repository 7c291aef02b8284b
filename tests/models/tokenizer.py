"""A byte-level BPE vocabulary as GGUF stores it: learned from a text, or put together piece by piece."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from gguf import TokenType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gguf import GGUFWriter

Merge = tuple[bytes, bytes]

BOS: Final = "<|bos|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
PAD: Final = "<|pad|>"
SPECIALS: Final = (BOS, IM_START, IM_END, PAD)

# llama.cpp's pre-tokenizer of this name splits like WORDS below and, unlike "gpt-2", does not strip the
# space before a full stop when it detokenizes.
PRE_TOKENIZER: Final = "smollm"
WORDS: Final = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s")


def _byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each byte in a byte-level vocabulary, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return tuple(chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256))


BYTE_CHARACTERS: Final = _byte_characters()


def spell(piece: bytes) -> str:
    """Write a piece the way the vocabulary of a byte-level model spells it (a space becomes `Ġ`)."""
    return "".join(BYTE_CHARACTERS[byte] for byte in piece)


def learn_merges(text: str) -> list[Merge]:
    """Learn merges from the text until every word in it is one token, most frequent pair first."""
    words = [(list(_bytes_of(word)), count) for word, count in Counter(WORDS.findall(text)).items()]
    merges: list[Merge] = []
    while True:
        pairs: Counter[Merge] = Counter()
        for parts, count in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts, _ in words:
            _merge(parts, best)


def _bytes_of(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


def _merge(parts: list[bytes], pair: Merge) -> None:
    index = 0
    while index + 1 < len(parts):
        if (parts[index], parts[index + 1]) == pair:
            parts[index : index + 2] = [pair[0] + pair[1]]
        index += 1


@dataclass(frozen=True)
class Vocabulary:
    """Pieces of text by token id, then the special tokens; `merges` say how text becomes pieces."""

    pieces: tuple[bytes, ...]
    merges: tuple[Merge, ...]
    specials: tuple[str, ...] = SPECIALS

    def __post_init__(self) -> None:
        spelled = [*map(spell, self.pieces), *self.specials]
        twice = sorted(token for token, count in Counter(spelled).items() if count > 1)
        if twice:
            message = f"tokens must be unique (llama.cpp aborts on a duplicate): {twice}"
            raise ValueError(message)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: token for token, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces) + len(self.specials)

    def id_of(self, piece: bytes | str) -> int:
        """The token of exactly this piece. Raises KeyError when there is none."""
        return self._ids[piece.encode() if isinstance(piece, str) else piece]

    def special(self, name: str) -> int:
        """The token of a special such as `<|im_end|>`. Raises ValueError when there is none."""
        return len(self.pieces) + self.specials.index(name)

    def write(self, writer: GGUFWriter, chat_template: str | None) -> None:
        """Add the whole tokenizer, its special ids and the chat template to a GGUF file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE_TOKENIZER)
        writer.add_token_list([*map(spell, self.pieces), *self.specials])
        types = [TokenType.NORMAL] * len(self.pieces) + [TokenType.CONTROL] * len(self.specials)
        writer.add_token_types(types)
        writer.add_token_merges([f"{spell(left)} {spell(right)}" for left, right in self.merges])
        writer.add_bos_token_id(self.special(BOS))
        writer.add_eos_token_id(self.special(IM_END))
        writer.add_eot_token_id(self.special(IM_END))
        writer.add_pad_token_id(self.special(PAD))
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        if chat_template is not None:
            writer.add_chat_template(chat_template)


def vocabulary(
    merges: Sequence[Merge], extra_pieces: Iterable[bytes] = (), specials: Sequence[str] = SPECIALS
) -> Vocabulary:
    """All 256 bytes, what the merges make, and the extra pieces, which no text is ever tokenized into."""
    bytes_ = [bytes([byte]) for byte in range(256)]
    # Two merges may make the same piece by different ways, and a piece of one byte is there already.
    pieces = dict.fromkeys([*bytes_, *(left + right for left, right in merges), *extra_pieces])
    return Vocabulary(tuple(pieces), tuple(merges), tuple(specials))
