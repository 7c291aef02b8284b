"""Requests that are refused, and what else a model answers: constraints, embeddings, tokens."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from paddock.v1 import generation_pb2, model_manager_pb2
from paddock_server.worker.embed import EmbedJob, next_batch
from paddock_server.worker.engine import CancelCallCommand
from paddock_server.worker.errors import WorkerError
from paddock_server.worker.requests import Preparer
from paddock_server.worker.v1 import worker_pb2
from tests.integration.engines import Lab, chat, lab, load, refusal, request

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from paddock_server.worker.loading import LoadedModel


@pytest.fixture(scope="module")
def noise(models_dir: Path) -> Generator[Lab]:
    with lab(models_dir / "noise.gguf") as bench:
        yield bench


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"choiceCount": 9}, "choice_count"),
        ({"choiceCount": -1}, "choice_count"),
        ({"stop": {"maxTokens": 0}}, "stop.max_tokens"),
        ({"stop": {"stopSequences": ["x"] * 17}}, "stop.stop_sequences"),
        ({"stop": {"stopSequences": ["x", ""]}}, "stop.stop_sequences[1]"),
        ({"stop": {"stopSequences": ["x" * 257]}}, "stop.stop_sequences[0]"),
        ({"logprobs": {"topCount": 21}}, "logprobs.top_count"),
        ({"logprobs": {"topCount": -1}}, "logprobs.top_count"),
        ({"sampling": {"topP": 2}}, "sampling.top_p"),
        ({"sampling": {"logitBias": {"709": 1}}}, "sampling.logit_bias[709]"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_bad_field_is_refused_by_its_name(noise: Lab, fields: dict[str, Any], field: str) -> None:
    error = refusal(noise.preparer, request(**fields))
    assert (error.reason, error.field) == ("INVALID_FIELD", field)


def test_token_ids_outside_the_vocabulary_are_refused_by_their_place(noise: Lab) -> None:
    for token in (-1, 709):
        error = refusal(noise.preparer, request([1, token]))
        assert (error.reason, error.field) == ("INVALID_FIELD", "tokens.token_ids[1]")


def test_a_request_without_input_or_without_tokens_is_refused(noise: Lab) -> None:
    assert refusal(noise.preparer, model_manager_pb2.GenerateRequest()).field == "input"
    assert refusal(noise.preparer, request([])).field in {"input", "tokens"}


def test_tools_are_not_implemented_unless_none_may_be_called(noise: Lab) -> None:
    message = chat(("user", "Hi"), stop={"maxTokens": 1})
    message.chat.tools.add(name="look")
    error = refusal(noise.preparer, message)
    assert (error.reason, error.field) == ("NOT_IMPLEMENTED", "chat.tools")
    message.chat.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_NONE
    (output,) = noise.generate(message)
    assert output.finished.usage.completion_tokens == 1


def test_a_conversation_becomes_the_prompt_of_the_template_with_one_bos(models_dir: Path) -> None:
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for name in ("noise", "noise-b"):  # the second template writes the BOS itself
        with lab(models_dir / f"{name}.gguf") as bench:
            from_chat = bench.preparer.generation(1, chat(("user", "Hi")))
            from_text = bench.preparer.generation(2, request(written))
            assert from_chat.prompt == from_text.prompt
            vocab = bench.loaded.model.vocab
            assert from_chat.prompt[0] == vocab.bos
            assert from_chat.prompt.count(vocab.bos) == 1
            from_chat.close()
            from_text.close()


def test_templates_that_raise_or_do_not_parse_refuse_the_request_and_no_other(models_dir: Path) -> None:
    with lab(models_dir / "template-raises.gguf") as bench:
        error = refusal(bench.preparer, chat(("system", "Be kind."), ("user", "Hi")))
        assert error.reason == "TEMPLATE_ERROR"
        assert "this template takes no system message" in error.message
        (output,) = bench.generate(chat(("user", "Hi"), stop={"maxTokens": 2}))
        assert output.finished.usage.completion_tokens == 2
    with lab(models_dir / "template-broken.gguf") as bench:
        assert refusal(bench.preparer, chat(("user", "Hi"))).reason == "TEMPLATE_ERROR"
        assert bench.generate(request(stop={"maxTokens": 2}))[0].finished


def test_a_model_without_template_takes_prompts_but_no_conversations(models_dir: Path) -> None:
    with lab(models_dir / "no-template.gguf") as bench:
        assert not bench.preparer.has_chat_template
        error = refusal(bench.preparer, chat(("user", "Hi")))
        assert (error.reason, error.field) == ("INVALID_FIELD", "chat")
        assert bench.generate(request(stop={"maxTokens": 2}))[0].finished


def test_logit_bias_bans_and_forces_tokens(noise: Lab) -> None:
    (free,) = noise.generate(request("Fish", stop={"maxTokens": 5}, logprobs={"topCount": 0}))
    first = free.tokens()[0]
    (banned,) = noise.generate(
        request(
            "Fish",
            sampling={"temperature": 0, "logitBias": {str(first): -100}},
            stop={"maxTokens": 5},
            logprobs={"topCount": 0},
        )
    )
    assert first not in banned.tokens()
    (forced,) = noise.generate(
        request("Fish", sampling={"logitBias": {"300": 100}}, stop={"maxTokens": 5}, logprobs={"topCount": 0})
    )
    assert forced.tokens() == [300] * 5


def test_penalties_count_the_prompt_too(noise: Lab) -> None:
    (free,) = noise.generate(request([300, 301], stop={"maxTokens": 1}, logprobs={"topCount": 0}))
    likely = free.tokens()[0]
    prompt = [likely] * 40 + [300, 301]
    penalty = {"temperature": 0, "frequencyPenalty": 2, "presencePenalty": 2, "penaltyLastTokens": -1}
    (penalized,) = noise.generate(
        request(prompt, sampling=penalty, stop={"maxTokens": 8}, logprobs={"topCount": 0})
    )
    assert likely not in penalized.tokens()


# Constraints.


@pytest.mark.parametrize("temperature", [0, 3])
def test_output_follows_a_grammar(noise: Lab, temperature: float) -> None:
    sampling = {"temperature": temperature, "seed": 3}
    (output,) = noise.generate(
        request(
            sampling=sampling,
            constraint={"grammar": 'root ::= "yes" | "no, " [0-9] [0-9] "!"'},
            stop={"maxTokens": 20},
        )
    )
    assert output.end()[0] == 1
    text = output.text()
    assert text == "yes" or (len(text) == 7 and text[:4] == "no, " and text[4:6].isdigit())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 255},
        {"type": "array", "items": {"type": "number"}, "maxItems": 255},
        {"type": "string", "pattern": "^[a-z]{0,255}$"},
        {"type": "string", "minLength": 10, "maxLength": 1010},
    ],
    ids=["length", "items", "pattern", "long"],
)
def test_a_maximum_in_a_schema_is_no_nesting_of_the_callers(noise: Lab, schema: dict[str, Any]) -> None:
    (output,) = noise.generate(
        request(constraint={"jsonSchema": json.dumps(schema)}, stop={"maxTokens": 3, "ignoreEos": True})
    )

    assert output.failure is None


def test_a_maximum_that_llama_cpp_does_not_take_is_named_as_the_likely_cause(noise: Lab) -> None:
    error = refusal(
        noise.preparer, request(constraint={"jsonSchema": '{"type": "string", "maxLength": 1001}'})
    )

    assert (error.reason, error.field) == ("INVALID_GRAMMAR", "constraint.json_schema")
    assert "maxLength" in error.message


def test_output_follows_a_json_schema(noise: Lab) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["pier", "boat"]}, "lit": {"type": "boolean"}},
        "required": ["name", "lit"],
        "additionalProperties": False,
    }
    outputs = noise.generate(
        *[
            request(
                sampling={"seed": seed, "temperature": 2},
                constraint={"jsonSchema": json.dumps(schema)},
                stop={"maxTokens": 80},
                choiceCount=2,
            )
            for seed in range(3)
        ]
    )
    for output in outputs:
        for choice in range(2):
            value = json.loads(output.text(choice))
            assert value["name"] in {"pier", "boat"}
            assert isinstance(value["lit"], bool)


def test_json_object_gives_an_object_and_false_gives_anything(noise: Lab) -> None:
    (output,) = noise.generate(
        request(sampling={"seed": 1}, constraint={"jsonObject": True}, stop={"maxTokens": 200})
    )
    assert output.text().lstrip().startswith("{")
    free, unset = noise.generate(
        request(constraint={"jsonObject": False}, stop={"maxTokens": 5}), request(stop={"maxTokens": 5})
    )
    assert free.text() == unset.text()


@pytest.mark.parametrize(
    "constraint",
    [
        {"grammar": "root := 'a'"},
        {"grammar": 'start ::= "a"'},
        {"grammar": "root ::= root"},
        {"grammar": "root ::= missing"},
        {"grammar": ""},
        {"jsonSchema": "{"},
        {"jsonSchema": "[]"},
        {"jsonSchema": '{"type": "nonsense"}'},
        {"jsonSchema": '{"$ref": "https://example.com/schema.json"}'},
        {"jsonSchema": '{"$ref": "#/nowhere"}'},
        {"jsonSchema": '{"type": "string", "pattern": "no anchors"}'},
    ],
    ids=json.dumps,
)
def test_a_bad_grammar_or_schema_is_refused_and_the_process_lives(
    noise: Lab, constraint: dict[str, str]
) -> None:
    error = refusal(noise.preparer, request(constraint=constraint))
    assert error.reason == "INVALID_GRAMMAR"
    assert error.field.startswith("constraint.")


@pytest.mark.parametrize(
    "grammar", ["(" * 300 + ")" * 300, "x" * 300_000, 'root ::= "a\0"'], ids=["deep", "long", "nul"]
)
def test_a_grammar_too_large_for_the_parser_is_refused_unread(noise: Lab, grammar: str) -> None:
    assert refusal(noise.preparer, request(constraint={"grammar": grammar})).reason == "INVALID_FIELD"


def test_a_grammar_that_no_token_can_follow_fails_its_request_and_no_other(noise: Lab) -> None:
    stuck, free = noise.generate(
        request(constraint={"grammar": 'root ::= "a" "\\U0010FFFF" "b"'}, stop={"ignoreEos": True}),
        request(stop={"maxTokens": 30}),
    )
    assert free.finished.usage.completion_tokens == 30
    assert stuck.failure is None or stuck.failure.reason == "INVALID_GRAMMAR"


def test_the_end_banned_and_demanded_at_once_fails_the_request(noise: Lab) -> None:
    (output,) = noise.generate(request(constraint={"grammar": 'root ::= "a"'}, stop={"ignoreEos": True}))
    assert output.failure is not None
    assert output.failure.reason == "INVALID_GRAMMAR"
    assert output.text() == "a"


# Embeddings.


def embed(bench: Lab, *texts: str, normalize: bool = False) -> list[list[float]]:
    message = model_manager_pb2.EmbedRequest(texts=texts, normalize=normalize)
    bench.engine.post(bench.preparer.embedding(7, message))
    bench.engine.step()
    bench.run()
    response = bench.replies.pop(7).embed
    assert response.usage.prompt_tokens > 0
    return [list(embedding.values) for embedding in response.embeddings]


@pytest.mark.parametrize("name", ["embed", "embed-cls", "noise"])
def test_a_text_has_the_same_vector_alone_and_among_others(models_dir: Path, name: str) -> None:
    texts = ["The lamp is lit.", "A", "Nobody knows how a rope is made. " * 9, "Fish"] * 16
    with lab(models_dir / f"{name}.gguf") as bench:
        vectors = embed(bench, *texts)
        assert len(vectors) == 64
        assert all(len(vector) == bench.loaded.model.embedding_dimension_count for vector in vectors)
        for index in range(4):
            assert vectors[index] == pytest.approx(embed(bench, texts[index])[0], abs=1e-2)
        assert vectors[0] != pytest.approx(vectors[3], abs=1e-1)


def test_normalized_vectors_have_length_1(models_dir: Path) -> None:
    with lab(models_dir / "embed.gguf") as bench:
        (plain,), (unit,) = embed(bench, "The lamp"), embed(bench, "The lamp", normalize=True)
        length = math.hypot(*plain)
        assert unit == pytest.approx([value / length for value in plain], abs=1e-6)


def test_embeddings_are_computed_between_the_steps_of_generations(noise: Lab) -> None:
    number = noise.submit(request(stop={"maxTokens": 40, "ignoreEos": True}))
    texts = ["The morning. " * 200] * 8
    noise.engine.post(noise.preparer.embedding(9, model_manager_pb2.EmbedRequest(texts=texts)))
    seen: list[int] = []
    while 9 not in noise.replies:
        noise.engine.step()
        seen.append(len(noise.outputs[number].deltas))
    noise.run()
    assert seen[-1] > seen[0] > 0
    assert len(noise.replies.pop(9).embed.embeddings) == 8
    assert noise.outputs[number].finished.usage.completion_tokens == 40


def long_job(bench: Lab, call: int) -> EmbedJob:
    """Return a job of many batches."""
    texts = ["The morning. " * 40] * 64
    return bench.preparer.embedding(call, model_manager_pb2.EmbedRequest(texts=texts))


def test_a_cancelled_embedding_is_dropped_between_two_batches(models_dir: Path) -> None:
    with lab(models_dir / "embed.gguf") as bench:
        job = long_job(bench, 1)
        bench.engine.post(job)
        bench.engine.step()
        computed = len(job.vectors)
        bench.engine.post(CancelCallCommand(1))
        assert len(embed(bench, "Fish")) == 1
        assert len(job.vectors) == computed < len(job.texts)
        assert 1 not in bench.replies


def test_an_embedding_cancelled_in_the_queue_is_not_computed(models_dir: Path) -> None:
    with lab(models_dir / "embed.gguf") as bench:
        jobs = [long_job(bench, call) for call in (1, 2, 3)]
        for job in jobs:
            bench.engine.post(job)
        bench.engine.step()
        bench.engine.post(CancelCallCommand(2))
        bench.engine.post(CancelCallCommand(999))
        bench.run()
        assert not jobs[1].vectors
        assert list(bench.replies) == [1, 3]


def test_a_call_and_a_generation_of_one_number_are_cancelled_apart(noise: Lab) -> None:
    number = noise.submit(request(stop={"maxTokens": 5, "ignoreEos": True}))
    message = model_manager_pb2.EmbedRequest(texts=["Fish"])
    noise.engine.post(noise.preparer.embedding(number, message))
    noise.engine.post(CancelCallCommand(number))
    noise.run()
    assert noise.outputs[number].finished.usage.completion_tokens == 5
    assert number not in noise.replies


def test_a_full_queue_of_embeddings_refuses_the_surplus_only(models_dir: Path) -> None:
    with lab(models_dir / "embed.gguf", queue_limit=1) as bench:
        for call in range(1, 6):
            bench.engine.post(long_job(bench, call))
        bench.engine.step()
        assert list(bench.replies) == [3, 4, 5]
        assert {reply.failed.reason for reply in bench.replies.values()} == {"QUEUE_FULL"}
        bench.run()
        assert [len(bench.replies[call].embed.embeddings) for call in (1, 2)] == [64, 64]
        assert len(embed(bench, "Fish")) == 1


@pytest.mark.parametrize(
    ("texts", "reason", "field"),
    [
        ([], "INVALID_FIELD", "texts"),
        (["a"] * 65, "INVALID_FIELD", "texts"),
        (["fine", "word " * 600], "CONTEXT_LENGTH_EXCEEDED", "texts[1]"),
    ],
    ids=["none", "many", "long"],
)
def test_texts_that_cannot_be_embedded_are_refused_by_their_place(
    models_dir: Path, texts: list[str], reason: str, field: str
) -> None:
    with load(models_dir / "embed.gguf") as loaded, pytest.raises(WorkerError) as caught:
        Preparer(loaded).embedding(1, model_manager_pb2.EmbedRequest(texts=texts))
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_model_that_only_embeds_says_so(models_dir: Path) -> None:
    with load(models_dir / "embed.gguf") as loaded:
        assert not loaded.to_ready(has_chat_template=False).can_generate
        assert refusal(Preparer(loaded), request()).field == "model"


def test_texts_fill_batches_in_order() -> None:
    assert next_batch([10, 20, 30, 40], 60) == 3
    assert next_batch([10, 20, 30, 40], 59) == 2
    assert next_batch([100], 60) == 1
    assert next_batch([1] * 100, 1000) == 64


# Tokens.


@pytest.fixture(scope="module")
def loaded(models_dir: Path) -> Generator[LoadedModel]:
    with load(models_dir / "noise.gguf") as model:
        yield model


@pytest.mark.parametrize("text", ["The lamp is lit.", "naïve 終 😀\n\tx", " two  spaces ", "<|im_end|>", ""])
def test_text_becomes_tokens_and_tokens_become_the_text_again(loaded: LoadedModel, text: str) -> None:
    preparer = Preparer(loaded)
    tokens = preparer.tokenize(
        model_manager_pb2.TokenizeRequest(text=text, parse_special_tokens=True, include_pieces=True)
    )
    assert b"".join(tokens.pieces).decode() == text
    back = preparer.detokenize(
        model_manager_pb2.DetokenizeRequest(token_ids=tokens.token_ids, include_special_tokens=True)
    )
    assert back.text == text


def test_special_tokens_are_read_and_added_only_when_asked_for(loaded: LoadedModel) -> None:
    preparer = Preparer(loaded)

    def tokens(*, parse: bool, add: bool) -> list[int]:
        message = model_manager_pb2.TokenizeRequest(
            text="<|im_end|>", parse_special_tokens=parse, add_special_tokens=add
        )
        return list(preparer.tokenize(message).token_ids)

    assert len(tokens(parse=False, add=False)) > 3
    assert tokens(parse=True, add=False) == [707]
    assert tokens(parse=True, add=True) == [705, 707]
    message = model_manager_pb2.DetokenizeRequest(token_ids=[705, 300, 707])
    assert "<|" not in preparer.detokenize(message).text


def test_bytes_that_form_no_character_become_replacement_characters(loaded: LoadedModel) -> None:
    message = model_manager_pb2.DetokenizeRequest(token_ids=[0xF0, 0x9F, ord("a")])
    assert Preparer(loaded).detokenize(message).text == "�a"


def test_a_token_id_outside_the_vocabulary_is_refused_by_its_place(loaded: LoadedModel) -> None:
    with pytest.raises(WorkerError) as caught:
        Preparer(loaded).detokenize(model_manager_pb2.DetokenizeRequest(token_ids=[1, 2, 709]))
    assert caught.value.field == "token_ids[2]"


def test_a_call_the_worker_does_not_know_is_not_implemented(loaded: LoadedModel) -> None:
    with pytest.raises(WorkerError) as caught:
        Preparer(loaded).answer(worker_pb2.Call(call=1))
    assert caught.value.reason == "NOT_IMPLEMENTED"
