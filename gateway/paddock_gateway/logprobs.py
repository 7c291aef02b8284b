"""Log probabilities in OpenAI's two shapes. Pure."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from paddock_gateway.schema import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paddock.v1 import generation_pb2 as gen


def chat_logprobs(entries: Iterable[gen.TokenLogprob]) -> ChatLogprobs:
    """Return the shape of chat completions."""
    return ChatLogprobs([_token(entry) for entry in entries])


class CompletionLogprobWriter:
    """Makes the legacy lists of one choice, which count characters from the start of its text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def write(self, entries: Iterable[gen.TokenLogprob]) -> CompletionLogprobs:
        """Return the lists for the next tokens of the choice."""
        lists = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=None, text_offset=[])
        for entry in entries:
            lists.tokens.append(_legacy_text(entry.token))
            lists.token_logprobs.append(entry.logprob)
            lists.text_offset.append(self._offset)
            if entry.top:
                if lists.top_logprobs is None:
                    lists.top_logprobs = []
                lists.top_logprobs.append({_legacy_text(top.token): top.logprob for top in entry.top})
            self._offset += len(self._decoder.decode(entry.token))
        return lists


def _token(entry: gen.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token=_text(entry.token),
        bytes=list(entry.token),
        logprob=entry.logprob,
        top_logprobs=[TopLogprob(_text(top.token), list(top.token), top.logprob) for top in entry.top],
    )


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


def _legacy_text(token: bytes) -> str:
    r"""Return a token's text, or `bytes:\xe2\x82` when it splits a character: no two look alike."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
