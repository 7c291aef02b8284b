"""Events of generations to server-sent events: the streaming answer. Pure.

A delta that is only text, which is nearly every one, becomes prepared bytes around its encoded text; anything
else goes through the structs of `paddock_gateway.schema`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from paddock_gateway.answer import Answer, merge
from paddock_gateway.logprobs import CompletionLogprobWriter, chat_logprobs
from paddock_gateway.parameters import Dialect
from paddock_gateway.schema import (
    ChatChunkChoice,
    ChatDelta,
    CompletionChoice,
    FunctionFragment,
    PromptProgress,
    ToolCallFragment,
)
from paddock_gateway.sse import DONE, event

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paddock.v1 import generation_pb2 as gen
    from paddock.v1 import model_manager_pb2 as pb
    from paddock_gateway.answer import Output
    from paddock_gateway.translate import Plan

MOST_CHUNKS: Final = 256
"""Deltas that come together are a chunk each, up to this many per choice: clients count chunks as tokens.
More have piled up for a slow reader, who gets one chunk for each choice."""

_encode: Final = msgspec.json.Encoder().encode


class ChoiceWriter(Protocol):
    """Writes the choice of a chunk, the one part in which the dialects differ. `index` is the answer's."""

    object_name: str

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the encoded text of a choice that is only text."""
        ...

    def opening(self, index: int) -> bytes:
        """Return the choice that comes before any output."""
        ...

    def output(self, index: int, output: Output) -> bytes:
        """Return the choice for any output; empty when there is nothing to say yet."""
        ...

    def finish(self, index: int, reason: str) -> bytes:
        """Return the choice that ends it."""
        ...


class ChatChoiceWriter:
    """Choices of `chat.completion.chunk`."""

    object_name = "chat.completion.chunk"

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """See `ChoiceWriter.around_text`."""
        return b'{"finish_reason":null,"index":%d,"delta":{"content":' % index, b"}}"

    def opening(self, index: int) -> bytes:
        """See `ChoiceWriter.opening`: the role."""
        return b'{"finish_reason":null,"index":%d,"delta":{"role":"assistant","content":null}}' % index

    def output(self, index: int, output: Output) -> bytes:
        """See `ChoiceWriter.output`."""
        if not (output.text or output.reasoning or output.tool_calls or output.logprobs):
            return b""
        delta = ChatDelta(
            content=output.text or None,
            reasoning_content=output.reasoning or None,
            tool_calls=[_fragment(call) for call in output.tool_calls] or None,
        )
        logprobs = chat_logprobs(output.logprobs) if output.logprobs else None
        return _encode(ChatChunkChoice(index, delta, finish_reason=None, logprobs=logprobs))

    def finish(self, index: int, reason: str) -> bytes:
        """See `ChoiceWriter.finish`: the delta is empty, as OpenAI's and llama-server's are."""
        return b'{"finish_reason":"%s","index":%d,"delta":{}}' % (reason.encode(), index)


class CompletionChoiceWriter:
    """Choices of `text_completion`."""

    object_name = "text_completion"

    def __init__(self) -> None:
        self._logprobs: dict[int, CompletionLogprobWriter] = {}

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """See `ChoiceWriter.around_text`."""
        return b'{"text":', b',"index":%d,"logprobs":null,"finish_reason":null}' % index

    def opening(self, index: int) -> bytes:
        """See `ChoiceWriter.opening`."""
        return _encode(CompletionChoice("", index))

    def output(self, index: int, output: Output) -> bytes:
        """See `ChoiceWriter.output`."""
        if not (output.text or output.logprobs):
            return b""
        choice = CompletionChoice(output.text, index)
        if output.logprobs:
            writer = self._logprobs.setdefault(index, CompletionLogprobWriter())
            choice.logprobs = writer.write(output.logprobs)
        return _encode(choice)

    def finish(self, index: int, reason: str) -> bytes:
        """See `ChoiceWriter.finish`."""
        return _encode(CompletionChoice("", index, finish_reason=reason))


class StreamEncoder(Answer):
    """Turns the events of one request's generations into server-sent events.

    The order, per choice: the role (chat), output, the finish reason. After the last choice the usage, when
    asked for, then `[DONE]`. The finish reason of a choice waits for the next event of its generation, so
    that the chunk can carry the timings when that event is the end; nothing else is ever held back.
    """

    def __init__(self, plan: Plan, created: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(plan, created)
        self._writer: ChoiceWriter = (
            ChatChoiceWriter() if plan.dialect is Dialect.CHAT else CompletionChoiceWriter()
        )
        self._clock = clock
        self._start_times: dict[int, float] = {}
        self._prompt_sizes: dict[int, int] = {}
        self._held: dict[int, bytes] = {}
        self._tail = b""
        self._around_text: list[tuple[bytes, bytes]] = []

    def encode(self, prompt_index: int, response: pb.GenerateResponse) -> bytes:
        """Return the events for one event of the generation of a prompt; empty when it says nothing yet."""
        match response.WhichOneof("event"):
            case "deltas":
                return self._deltas(prompt_index, response.deltas.deltas)
            case "started":
                return self._started(prompt_index, response.started)
            case "prompt_progress":
                return self._progress(prompt_index, response.prompt_progress)
            case "generated":
                return self._generated(prompt_index, response.generated)
            case _:
                return b""  # a kind newer than this gateway

    def _started(self, prompt_index: int, started: pb.Started) -> bytes:
        first = not self.started
        self.on_started(started)
        if first:
            self._prepare()
        self._start_times[prompt_index] = self._clock()
        self._prompt_sizes[prompt_index] = started.prompt_tokens
        if self._plan.dialect is not Dialect.CHAT:
            return b""
        return b"".join(
            self._chunk(self._writer.opening(self._index(prompt_index, choice)))
            for choice in range(self._plan.choice_count)
        )

    def _prepare(self) -> None:
        """Encode what every chunk of this answer has in common."""
        self._tail = b'"created":%d,"id":%s,"model":%s,"system_fingerprint":%s,"object":%s' % (
            self.created,
            _encode(self.id),
            _encode(self.model),
            _encode(self.load_id),
            _encode(self._writer.object_name),
        )
        for index in range(self._plan.choice_count * len(self._plan.requests)):
            before, after = self._writer.around_text(index)
            self._around_text.append((b'data: {"choices":[' + before, after + b"]," + self._tail + b"}\n\n"))

    def _deltas(self, prompt_index: int, deltas: Sequence[gen.Delta]) -> bytes:
        if len(deltas) > MOST_CHUNKS * self._plan.choice_count:
            return self._output(prompt_index, deltas)
        return b"".join([self._delta(prompt_index, delta) for delta in deltas])

    def _delta(self, prompt_index: int, delta: gen.Delta) -> bytes:
        text = delta.text
        if not text or delta.finish_reason or delta.reasoning_text or delta.tool_calls or delta.logprobs:
            return self._output(prompt_index, (delta,))
        self.generated_tokens += delta.token_count
        before, after = self._around_text[self._index(prompt_index, delta.choice_index)]
        return self._release(prompt_index) + before + _encode(text) + after

    def _output(self, prompt_index: int, deltas: Sequence[gen.Delta]) -> bytes:
        """Return one chunk for each choice."""
        events = self._release(prompt_index)
        for choice, output in merge(deltas).items():
            index = self._index(prompt_index, choice)
            choice_json = self._writer.output(index, output)
            if choice_json:
                events += self._chunk(choice_json)
            if output.finish_reason:
                self.finished_choices += 1
                events += self._release(prompt_index)
                self._held[prompt_index] = self._writer.finish(index, output.finish_reason)
        self.generated_tokens += sum(delta.token_count for delta in deltas)
        return events

    def _progress(self, prompt_index: int, progress: pb.PromptProgress) -> bytes:
        total = max(self._prompt_sizes[prompt_index], progress.total_tokens)
        cached = total - progress.total_tokens
        elapsed = self._clock() - self._start_times[prompt_index]
        report = PromptProgress(total, cached, cached + progress.evaluated_tokens, int(elapsed * 1000))
        choice = self._writer.opening(self._index(prompt_index, 0))
        return self._chunk(choice, b',"prompt_progress":' + _encode(report))

    def _generated(self, prompt_index: int, generated: pb.Generated) -> bytes:
        self.on_generated(generated)
        if not self.complete:
            return self._release(prompt_index)
        timings = self.timings()
        account = b"" if timings is None else b',"timings":' + _encode(timings)
        usage = b',"usage":' + _encode(self.usage())
        if self._plan.include_usage:
            return self._release(prompt_index) + self._chunk(b"", usage + account) + DONE
        if self._plan.dialect is Dialect.COMPLETION:
            account = usage + account
        return self._release(prompt_index, account) + DONE

    def _release(self, prompt_index: int, extra: bytes = b"") -> bytes:
        """Return the chunk with the finish reason that was held back; empty when there is none."""
        choice = self._held.pop(prompt_index, None)
        return b"" if choice is None else self._chunk(choice, extra)

    def _chunk(self, choice: bytes, extra: bytes = b"") -> bytes:
        return event(b'{"choices":[' + choice + b"]," + self._tail + extra + b"}")

    def _index(self, prompt_index: int, choice_index: int) -> int:
        return prompt_index * self._plan.choice_count + choice_index


def _fragment(call: gen.ToolCallDelta) -> ToolCallFragment:
    return ToolCallFragment(
        index=call.call_index,
        function=FunctionFragment(call.name or None, call.arguments_json or None),
        id=call.id or None,
        type="function" if call.id else None,
    )
