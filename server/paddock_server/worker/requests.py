"""From requests to what the engine takes: checked, rendered, tokenized. Never in the engine's thread."""

from __future__ import annotations

import re
from array import array
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Final

from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.worker import logprobs
from paddock_server.worker.chat import ChatTemplate, SpecialTokens
from paddock_server.worker.constrained import constrain
from paddock_server.worker.embed import MOST_TEXTS, EmbedJob
from paddock_server.worker.errors import context_length_exceeded, far_too_long, reject, reject_unimplemented
from paddock_server.worker.generation import MOST_CHOICES, ChoiceSampler, PreparedGeneration
from paddock_server.worker.sampling import Sampling, check_sampling, make_sampler
from paddock_server.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddock_server.worker.loading import LoadedModel

MOST_STOP_SEQUENCES: Final = 16
MOST_STOP_CHARACTERS: Final = 256
MOST_LOGPROBS: Final = 20

MOST_CHARACTERS_PER_TOKEN: Final = 256
"""More than the tokens of any text have on average: a longer text is refused without tokenizing it."""

LONGEST_RUN: Final = 100_000
"""Characters without a break that a text may have. Some pre-tokenizers of llama.cpp recurse for each of them,
and the stack of the threads that tokenize (`process.TOKENIZER_STACK_BYTES`) is made for this many."""

_RUN: Final = re.compile(r"\S+|\s+")


class Preparer:
    """Checks and prepares requests for one model. Any thread."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._vocab = loaded.model.vocab
        source = loaded.model.chat_template()
        self._template = (
            ChatTemplate(
                source,
                SpecialTokens(bos=self._text_of(self._vocab.bos), eos=self._text_of(self._vocab.eos)),
                tool_source=loaded.model.chat_template("tool_use"),
            )
            if source
            else None
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._template is not None

    def generation(
        self, number: int, request: model_manager_pb2.GenerateRequest, *, received_at: float | None = None
    ) -> PreparedGeneration:
        """Prepare a generation. `received_at` is by `time.perf_counter`; now by default.

        Raises:
            WorkerError: The request cannot be served.
        """
        if self._loaded.context is None:
            reject("model", "only embeds; it cannot generate")
        choices = request.choice_count or 1
        if not 1 <= choices <= MOST_CHOICES:
            reject("choice_count", f"is {choices}; must be in [1, {MOST_CHOICES}]")
        sampling = check_sampling(request.sampling, self._vocab.size)
        stops = _stop_sequences(request.stop)
        max_tokens = _max_tokens(request.stop)
        logprob_count = _logprob_count(request)
        prompt = self._prompt(request)
        return PreparedGeneration(
            number=number,
            prompt=prompt,
            samplers=self._samplers(request, sampling, prompt, choices),
            seed=sampling.seed,
            stop_sequences=stops,
            max_tokens=max_tokens,
            ignores_end=request.stop.ignore_eos,
            constrained=request.HasField("constraint"),
            logprob_count=logprob_count,
            reports_progress=request.report_prompt_progress,
            received_at=perf_counter() if received_at is None else received_at,
        )

    def _samplers(
        self,
        request: model_manager_pb2.GenerateRequest,
        sampling: Sampling,
        prompt: array[int],
        choices: int,
    ) -> list[ChoiceSampler]:
        """Return one sampler per choice."""
        banned = [*self._suppressed, *(self._ends if request.stop.ignore_eos else ())]
        constraint = constrain(request.constraint, self._vocab)
        samplers = [
            make_sampler(
                sampling,
                self._vocab,
                choice=choice,
                banned=banned,
                prompt=prompt,
                sequence_limit=self._loaded.sequence_limit,
            )
            for choice in range(choices)
        ]
        if constraint is None:
            return [*samplers]
        constrained = [constraint.wrap(sampler) for sampler in samplers]
        constraint.close()
        return [*constrained]

    def embedding(self, call: int, request: model_manager_pb2.EmbedRequest) -> EmbedJob:
        """Prepare the texts to embed.

        Raises:
            WorkerError: The request cannot be served.
        """
        if not 1 <= len(request.texts) <= MOST_TEXTS:
            reject("texts", f"has {len(request.texts)} texts; must have 1 to {MOST_TEXTS}")
        texts: list[array[int]] = []
        for index, text in enumerate(request.texts):
            tokens = self._tokens(text, f"texts[{index}]", self._loaded.embed_limit)
            if not tokens:
                reject(f"texts[{index}]", "has no tokens; a text that is not empty is required")
            if len(tokens) > self._loaded.embed_limit:
                field = f"texts[{index}]"
                raise context_length_exceeded(field, len(tokens), self._loaded.embed_limit)
            texts.append(tokens)
        return EmbedJob(call, texts, request.normalize)

    def tokenize(self, request: model_manager_pb2.TokenizeRequest) -> model_manager_pb2.TokenizeResponse:
        """Convert text to tokens."""
        check_runs(request.text, "text")
        tokens = self._vocab.tokenize(
            request.text, add_special=request.add_special_tokens, parse_special=request.parse_special_tokens
        )
        response = model_manager_pb2.TokenizeResponse(token_ids=tokens)
        if request.include_pieces:
            response.pieces.extend(self._vocab.piece(token, special=True) for token in tokens)
        return response

    def detokenize(
        self, request: model_manager_pb2.DetokenizeRequest
    ) -> model_manager_pb2.DetokenizeResponse:
        """Convert tokens to text.

        Raises:
            WorkerError: INVALID_FIELD for an id outside the vocabulary.
        """
        self._check_tokens(request.token_ids, "token_ids")
        data = self._vocab.detokenize(request.token_ids, include_special=request.include_special_tokens)
        return model_manager_pb2.DetokenizeResponse(text=data.decode("utf-8", "replace"))

    def answer(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        """Answer a call that needs no computing.

        Raises:
            WorkerError: The request cannot be served.
        """
        if call.HasField("tokenize"):
            return worker_pb2.Reply(call=call.call, tokenize=self.tokenize(call.tokenize))
        if not call.HasField("detokenize"):
            reject_unimplemented("request", "this worker does not know the question")
        return worker_pb2.Reply(call=call.call, detokenize=self.detokenize(call.detokenize))

    @cached_property
    def _suppressed(self) -> tuple[int, ...]:
        """Tokens the model file bans."""
        return tuple(self._vocab.suppressed())

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        return tuple(token for token in range(self._vocab.size) if self._vocab.ends_generation(token))

    def _prompt(self, request: model_manager_pb2.GenerateRequest) -> array[int]:
        """Return the prompt's tokens: at least one, and room for one more in a sequence."""
        limit = self._loaded.sequence_limit
        kind = request.WhichOneof("input")
        if kind == "chat":
            tokens = self._tokens(self._rendered(request.chat), "chat", limit)
        elif kind == "prompt":
            tokens = self._tokens(request.prompt, "prompt", limit)
        elif kind == "tokens":
            self._check_tokens(request.tokens.token_ids, "tokens.token_ids")
            tokens = array("i", request.tokens.token_ids)
        else:
            reject("input", "is missing; one of chat, prompt, tokens is required")
        if not tokens:
            reject(kind, "has no tokens; at least one is required")
        if len(tokens) >= limit:
            raise context_length_exceeded(kind, len(tokens), limit)
        return tokens

    def _rendered(self, chat: generation_pb2.ChatInput) -> str:
        if self._template is None:
            reject("chat", "the model has no chat template; use prompt or tokens")
        if chat.tools and chat.tool_choice.mode != generation_pb2.TOOL_CHOICE_MODE_NONE:
            reject_unimplemented(
                "chat.tools", "tool calls are not parsed yet; set tool_choice to none to only show the tools"
            )
        text = self._template.render(chat)
        bos = self._text_of(self._vocab.bos)
        if self._vocab.adds_bos and bos:
            text = text.removeprefix(bos)
        return text

    def _tokens(self, text: str, field: str, limit: int) -> array[int]:
        size = len(text)
        if size > limit * MOST_CHARACTERS_PER_TOKEN:
            raise far_too_long(field, size, limit)
        check_runs(text, field)
        return self._vocab.tokenize(text, add_special=True, parse_special=True)

    def _text_of(self, token: int) -> str:
        return self._vocab.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _check_tokens(self, tokens: Sequence[int], field: str) -> None:
        size = self._vocab.size
        for index, token in enumerate(tokens):
            if not 0 <= token < size:
                reject(
                    f"{field}[{index}]",
                    f"is {token}, which is not a token of the vocabulary; ids go from 0 to {size - 1}",
                )


def _stop_sequences(stop: generation_pb2.StopParams) -> tuple[str, ...]:
    if len(stop.stop_sequences) > MOST_STOP_SEQUENCES:
        reject(
            "stop.stop_sequences",
            f"has {len(stop.stop_sequences)}; at most {MOST_STOP_SEQUENCES} are allowed",
        )
    for index, sequence in enumerate(stop.stop_sequences):
        if not 1 <= len(sequence) <= MOST_STOP_CHARACTERS:
            reject(
                f"stop.stop_sequences[{index}]",
                f"has {len(sequence)} characters; must have 1 to {MOST_STOP_CHARACTERS}",
            )
    return tuple(stop.stop_sequences)


def _max_tokens(stop: generation_pb2.StopParams) -> int | None:
    if not stop.HasField("max_tokens"):
        return None
    if stop.max_tokens < 1:
        reject("stop.max_tokens", f"is {stop.max_tokens}; must be 1 or more")
    return stop.max_tokens


def _logprob_count(request: model_manager_pb2.GenerateRequest) -> int | None:
    if not request.HasField("logprobs"):
        return None
    count = request.logprobs.top_count
    if not 0 <= count <= MOST_LOGPROBS:
        reject("logprobs.top_count", f"is {count}; must be in [0, {MOST_LOGPROBS}]")
    logprobs.prepare()
    return count


def check_runs(text: str, field: str) -> None:
    """Refuse a text with a very long run without a space, or of spaces: pre-tokenizers recurse along it.

    Raises:
        WorkerError: INVALID_FIELD, naming the field.
    """
    if len(text) <= LONGEST_RUN:
        return
    longest = max(match.end() - match.start() for match in _RUN.finditer(text))
    if longest > LONGEST_RUN:
        reject(field, f"has {longest} characters without a break; at most {LONGEST_RUN} are allowed")
