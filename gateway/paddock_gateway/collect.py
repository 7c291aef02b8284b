"""Events of generations to one JSON document: the answer that does not stream. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from paddock_gateway.answer import Answer, Output
from paddock_gateway.logprobs import CompletionLogprobWriter, chat_logprobs
from paddock_gateway.parameters import Dialect
from paddock_gateway.schema import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    CompleteFunction,
    CompleteToolCall,
    Completion,
    CompletionChoice,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paddock.v1 import generation_pb2 as gen
    from paddock.v1 import model_manager_pb2 as pb
    from paddock_gateway.translate import Plan

_encode: Final = msgspec.json.Encoder().encode


class Collector(Answer):
    """Gathers the output of one request's generations."""

    def __init__(self, plan: Plan, created: int) -> None:
        super().__init__(plan, created)
        self._outputs = [Output() for _ in range(plan.choice_count * len(plan.requests))]

    def add(self, prompt_index: int, response: pb.GenerateResponse) -> None:
        """Take one event of the generation of a prompt."""
        match response.WhichOneof("event"):
            case "started":
                self.on_started(response.started)
            case "deltas":
                for delta in response.deltas.deltas:
                    self._outputs[prompt_index * self._plan.choice_count + delta.choice_index].add(delta)
                    self.generated_tokens += delta.token_count
                    self.finished_choices += bool(delta.finish_reason)
            case "generated":
                self.on_generated(response.generated)
            case _:
                pass  # progress of the prompt is for streams; other kinds are newer than this gateway

    def body(self) -> bytes:
        """Return the document. Only when `complete`."""
        if self._plan.dialect is Dialect.CHAT:
            return _encode(self._chat())
        return _encode(self._completion())

    def _chat(self) -> ChatCompletion:
        timings = self.timings()
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.load_id,
            usage=self.usage(),
            timings=msgspec.UNSET if timings is None else timings,
            choices=[
                ChatChoice(
                    index,
                    _message(output),
                    output.finish_reason,
                    chat_logprobs(output.logprobs) if output.logprobs else None,
                )
                for index, output in enumerate(self._outputs)
            ],
        )

    def _completion(self) -> Completion:
        timings = self.timings()
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.load_id,
            usage=self.usage(),
            timings=msgspec.UNSET if timings is None else timings,
            choices=[
                CompletionChoice(
                    output.text,
                    index,
                    CompletionLogprobWriter().write(output.logprobs) if output.logprobs else None,
                    output.finish_reason,
                )
                for index, output in enumerate(self._outputs)
            ],
        )


def _message(output: Output) -> AssistantMessage:
    calls = _tool_calls(output.tool_calls)
    return AssistantMessage(
        content=None if calls and not output.text else output.text,
        reasoning_content=output.reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _tool_calls(fragments: Iterable[gen.ToolCallDelta]) -> list[CompleteToolCall]:
    calls: dict[int, CompleteToolCall] = {}
    for fragment in fragments:
        call = calls.setdefault(fragment.call_index, CompleteToolCall("", CompleteFunction("", "")))
        call.id += fragment.id
        call.function.name += fragment.name
        call.function.arguments += fragment.arguments_json
    return [calls[index] for index in sorted(calls)]
