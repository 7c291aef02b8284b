"""Output that must have a shape: GBNF grammars, and JSON by way of one."""

from __future__ import annotations

import importlib
import json
import re
from time import thread_time
from typing import TYPE_CHECKING, Any, Final

from paddock_server.worker.bounded import TimeLimitExceededError, run_bounded
from paddock_server.worker.errors import Reason, WorkerError, reject
from paddock_server.worker.grammars import check_beginnings
from paddock_server.worker.samplers import Candidates, Grammar, Sampler

if TYPE_CHECKING:
    from paddock.v1 import generation_pb2
    from paddock_server.worker import llama

MOST_GRAMMAR_BYTES: Final = 256 * 1024
DEEPEST_NESTING: Final = 200
"""Deepest nesting of brackets in what a request says: the readers of schemas and grammars recurse."""

DEEPEST_GENERATED_NESTING: Final = 10_000
"""Deepest nesting in the grammar of a schema, where `maxLength: 255` is 255 optional groups in each other.
llama.cpp's parser takes so many on a stack of 8 MiB; the thread that prepares requests has 256 MiB."""

CONVERSION_SECONDS: Final = 2.0

MOST_SECONDS_PER_TOKEN: Final = 20.0
"""Computing time of one token. Looking up a large vocabulary in a grammar of thousands of alternates takes
seconds. One whose states double with every character soon takes more, and holds up every other request:
it ends once a call into llama.cpp has returned after so long. The time is looked at nowhere else: the server
ends a worker that does not come back from one call, and with it every request there."""

_JSON_OBJECT_SCHEMA: Final = '{"type": "object"}'

_CONVERSION_FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)
"""What the converter of JSON Schema raises on a schema it cannot read."""


class Constraint:
    """A grammar that every choice of a request follows from its start."""

    def __init__(self, grammar: Grammar, candidates: Candidates) -> None:
        self._grammar = grammar
        self._candidates = candidates

    def wrap(self, sampler: Sampler) -> ConstrainedSampler:
        """Return a sampler that picks like `sampler`, and only what the grammar allows."""
        return ConstrainedSampler(sampler, self._grammar.clone(), self._candidates)

    def close(self) -> None:
        """Free the grammar; those of the wrapped samplers are their own."""
        self._grammar.close()


class ConstrainedSampler:
    """Picks as the chain would; only when the grammar forbids that, picks again among what it allows.

    Looking up one token in a grammar is fast, the whole vocabulary slow, and most picks are allowed. The
    drawback is llama.cpp's as well: a forbidden pick costs a draw of the random numbers.
    """

    def __init__(self, sampler: Sampler, grammar: Grammar, candidates: Candidates) -> None:
        self._sampler = sampler
        self._grammar = grammar
        self._candidates = candidates

    def sample(self, context: llama.Context, row: int) -> int:
        """Return the token that follows a batch row.

        Raises:
            WorkerError: INVALID_GRAMMAR when no token can come next, or when finding one took too long.
        """
        started_at = thread_time()  # waiting for a busy processor is nobody's fault
        candidates = self._candidates
        candidates.fill(context, row)
        token = self._sampler.pick(candidates)
        if not self._grammar.allows(token):
            candidates.fill(context, row)
            self._grammar.restrict(candidates)
            if candidates.possible:
                token = self._sampler.pick(candidates)
            if not self._grammar.allows(token):
                raise WorkerError(
                    Reason.INVALID_GRAMMAR,
                    "No token of the model can follow what was generated so far under this constraint.",
                    field="constraint",
                )
        self._sampler.accept(token)
        self._grammar.accept(token)
        seconds = thread_time() - started_at
        if seconds > MOST_SECONDS_PER_TOKEN:
            text = (
                f"One token took {seconds:.1f} s under this constraint; at most {MOST_SECONDS_PER_TOKEN:g} s "
                "are allowed. Its rules leave too many ways open at once; make them tell those apart earlier."
            )
            raise WorkerError(Reason.INVALID_GRAMMAR, text, field="constraint")
        return token

    def close(self) -> None:
        """Free the chain and the grammar."""
        self._sampler.close()
        self._grammar.close()


def constrain(constraint: generation_pb2.OutputConstraint, vocab: llama.Vocab) -> Constraint | None:
    """Return the constraint of a request; None when it has none.

    Raises:
        WorkerError: INVALID_GRAMMAR for a grammar or schema that cannot be used, INVALID_FIELD for one too
            large, or with too much to try at once.
    """
    kind = constraint.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not constraint.json_object):
        return None
    field = f"constraint.{kind}"
    if kind == "grammar":
        text = constraint.grammar
        check_text(text, field)
        fault = "is not a GBNF grammar with a rule named root; see the model's log"
    else:
        schema = constraint.json_schema if kind == "json_schema" else _JSON_OBJECT_SCHEMA
        text = schema_to_grammar(schema, field)
        check_text(text, field, deepest_nesting=DEEPEST_GENERATED_NESTING)
        fault = (
            "became a grammar that llama.cpp does not take; see the model's log. A maximum of a length or a "
            "count (maxLength, maxItems, {0,n} in a pattern) may be at most about 1000 above its minimum"
        )
    check_beginnings(text, field)
    grammar = Grammar.parse(vocab, text) if text.strip() else None
    if grammar is None:
        raise _invalid_grammar(field, fault)
    return Constraint(grammar, Candidates(vocab.size))


def schema_to_grammar(schema: str, field: str) -> str:
    """Return the GBNF grammar of a JSON Schema, by the converter that comes with llama-cpp-python.

    Raises:
        WorkerError: INVALID_GRAMMAR when it is no schema or has parts the converter does not know.
    """
    check_text(schema, field)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _invalid_grammar(field, f"is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _invalid_grammar(field, "is not a JSON object")
    converter: Any = importlib.import_module("llama_cpp.llama_grammar")
    try:
        return str(run_bounded(lambda: converter.json_schema_to_gbnf(schema), seconds=CONVERSION_SECONDS))
    except TimeLimitExceededError as error:
        raise _invalid_grammar(field, "is too complex to become a grammar") from error
    except _CONVERSION_FAULTS as error:
        text = f"cannot become a grammar: {type(error).__name__}: {error}"
        raise _invalid_grammar(field, text) from error


def check_text(text: str, field: str, *, deepest_nesting: int = DEEPEST_NESTING) -> None:
    """Refuse a schema or grammar that is too long or too deep, or has characters that are none.

    Raises:
        WorkerError: INVALID_FIELD, naming the field.
    """
    if len(text) > MOST_GRAMMAR_BYTES:
        reject(field, f"has {len(text)} characters; at most {MOST_GRAMMAR_BYTES} are allowed")
    if "\0" in text:
        reject(field, "has a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        reject(field, "has half of a surrogate pair, which is no character")
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > deepest_nesting:
        reject(field, f"is nested {deepest} deep; at most {deepest_nesting} are allowed")


def _invalid_grammar(field: str, description: str) -> WorkerError:
    return WorkerError(
        Reason.INVALID_GRAMMAR, f"{field}: {description}", field=field, metadata={"field": field}
    )
