"""What surrounds the requests: routes, sizes, hosts, origins, request ids, the log line."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.testing import LogCapture

from paddock.errors import Reason, make_error
from paddock.v1 import model_pb2
from paddock_gateway import endpoints
from paddock_gateway.app import GatewayOptions
from tests.gateway.clients import CHAT, CHAT_PATH, COMPLETION_PATH, in_process, post, sdk
from tests.gateway.fake_api import FakeApi, failing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator


@pytest.fixture
def log() -> Iterator[LogCapture]:
    """Every log entry of the test, with the bound context in it."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, capture], cache_logger_on_first_use=False
    )
    yield capture
    structlog.configure(**before)


def lines(log: LogCapture) -> list[Any]:
    """Return the canonical lines."""
    return [entry for entry in log.entries if entry["event"] == "http_request"]


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_health_is_ok_while_the_server_answers(path: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await client.get(path)

    assert response.status_code == 200
    assert response.json() == {"status": "ok"}


async def test_health_is_an_error_while_the_server_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()
    api.health_error = make_error(Reason.SERVER_UNREACHABLE, "connection refused")
    async with in_process(api) as client:
        refused = await client.get("/health")
        api.health_error = TimeoutError()
        monkeypatch.setattr(endpoints, "HEALTH_SECONDS", 0.01)
        silent = await client.get("/health")

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_unreachable")
    assert (silent.status_code, silent.json()["error"]["code"]) == (503, "server_unreachable")


async def test_models_are_listed_over_all_pages_with_their_state() -> None:
    api = FakeApi()
    api.models["bad"] = model_pb2.Model(id="bad", state=model_pb2.MODEL_STATE_FAILED)
    api.models["tiny"].info.trained_context_tokens = 2048
    api.models["tiny"].load_time.FromSeconds(1234)

    async with in_process(api) as client:
        listing = (await client.get("/v1/models")).json()

    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["bad", "org/repo:Q4", "tiny"]
    bad, unloaded, tiny = listing["data"]
    assert bad["status"] == {"value": "unloaded", "failed": True}
    assert unloaded["status"] == {"value": "unloaded"}
    assert "meta" not in unloaded
    assert tiny["status"] == {"value": "loaded"}
    assert tiny["created"] == 1234
    assert tiny["meta"]["n_ctx_train"] == 2048
    assert (tiny["object"], tiny["owned_by"]) == ("model", "paddock")


async def test_models_tell_their_other_names_and_their_tags_and_openais_sdk_reads_them() -> None:
    api = FakeApi()
    api.models["tiny"].aliases.extend(["gpt-4o-mini", "small"])
    api.models["tiny"].tags.append("chat")

    async with sdk(api) as client:
        listed = {model.id: model async for model in client.models.list()}
        tiny = await client.models.retrieve("tiny")

    assert (tiny.id, tiny.object, tiny.owned_by) == ("tiny", "model", "paddock")
    assert listed["tiny"].to_dict() == tiny.to_dict()
    extra = tiny.model_extra or {}
    assert (extra["aliases"], extra["tags"]) == (["gpt-4o-mini", "small"], ["chat"])
    extra = listed["org/repo:Q4"].model_extra or {}
    assert (extra["aliases"], extra["tags"]) == ([], [])


async def test_a_model_id_may_contain_slashes() -> None:
    async with in_process(FakeApi()) as client:
        plain = await client.get("/v1/models/org/repo:Q4")
        encoded = await client.get("/v1/models/org%2Frepo%3AQ4")

    assert plain.json()["id"] == encoded.json()["id"] == "org/repo:Q4"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/chat/completions", "/v1/chat/completions/"])
async def test_an_unknown_path_is_404_in_openais_shape(path: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await client.post(path, json={})

    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": f"There is nothing at POST {path}.",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT_PATH, "POST"),
        ("PUT", COMPLETION_PATH, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", CHAT_PATH, "POST"),
    ],
)
async def test_a_wrong_method_is_405_and_says_which_is_right(method: str, path: str, allowed: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await client.request(method, path)

    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert allowed in response.json()["error"]["message"]


async def test_malformed_json_is_400_and_names_the_position() -> None:
    async with in_process(FakeApi()) as client:
        response = await client.post(CHAT_PATH, content=b'{"model": "tiny",}')

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert "byte 17" in response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_the_content_type_does_not_matter(content_type: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await client.post(
            CHAT_PATH, content=json.dumps(CHAT).encode(), headers={"content-type": content_type}
        )

    assert response.status_code == 200


async def test_a_body_over_the_limit_is_413_whether_its_size_is_told_or_not() -> None:
    async def in_pieces() -> AsyncGenerator[bytes]:
        for _ in range(10):
            yield b" " * 100

    async with in_process(FakeApi(), GatewayOptions(max_body_bytes=999)) as client:
        told = await client.post(CHAT_PATH, content=b" " * 1000)
        untold = await client.post(CHAT_PATH, content=in_pieces())
        just = await client.post(CHAT_PATH, content=json.dumps(CHAT).encode().ljust(999))

    for response in (told, untold):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "999 B" in response.json()["error"]["message"]
        assert response.headers["connection"] == "close"
    assert just.status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "[::1]", "box.local"]
)
async def test_a_host_that_is_allowed_is_answered(host: str) -> None:
    allowed = frozenset({"localhost", "127.0.0.1", "[::1]", "box.local"})

    async with in_process(FakeApi(), GatewayOptions(allowed_hosts=allowed)) as client:
        response = await client.get("/health", headers={"host": host})

    assert response.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "localhost:x"]
)
async def test_any_other_host_is_refused_before_anything_is_done(host: str) -> None:
    api = FakeApi()

    async with in_process(api, GatewayOptions(allowed_hosts=frozenset({"localhost"}))) as client:
        response = await client.post(CHAT_PATH, json=CHAT, headers={"host": host})

    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert api.requests == []


async def test_web_pages_may_read_nothing_unless_their_origin_is_configured() -> None:
    origin = {"origin": "https://app.example"}
    preflight = {**origin, "access-control-request-method": "POST"}

    async with in_process(FakeApi()) as client:
        closed = await client.get("/health", headers=origin)
    async with in_process(FakeApi(), GatewayOptions(cors_origins=("https://app.example",))) as client:
        opened = await client.get("/health", headers=origin)
        error = await client.get("/nothing", headers=origin)
        asked = await client.options(CHAT_PATH, headers=preflight)
        foreign = await client.get("/health", headers={"origin": "https://evil.example"})

    assert "access-control-allow-origin" not in closed.headers
    assert opened.headers["access-control-allow-origin"] == "https://app.example"
    assert error.headers["access-control-allow-origin"] == "https://app.example"
    assert asked.status_code == 200
    assert "access-control-allow-origin" not in foreign.headers


async def test_a_request_id_is_taken_over_returned_and_handed_to_the_server(log: LogCapture) -> None:
    api = FakeApi()

    async with in_process(api) as client:
        response = await client.post(CHAT_PATH, json=CHAT, headers={"x-request-id": "abc-1.2:3"})

    assert response.headers["x-request-id"] == "abc-1.2:3"
    assert api.request_ids == ["abc-1.2:3"]
    assert [entry["request_id"] for entry in lines(log)] == ["abc-1.2:3"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\u00e9", "<script>"])
async def test_a_request_id_unfit_for_logs_is_replaced(given: str) -> None:
    async with in_process(FakeApi()) as client:
        response = await client.get("/health", headers=[(b"x-request-id", given.encode())])
        other = await client.get("/health")

    assert response.headers["x-request-id"] not in ("", given)
    assert response.headers["x-request-id"] != other.headers["x-request-id"]


async def test_errors_carry_the_request_id_too() -> None:
    async with in_process(FakeApi()) as client:
        response = await client.get("/nothing", headers={"x-request-id": "abc"})

    assert response.headers["x-request-id"] == "abc"


@pytest.mark.parametrize("streaming", [False, True])
async def test_one_canonical_line_per_request(log: LogCapture, *, streaming: bool) -> None:
    async with in_process(FakeApi()) as client:
        await post(client, CHAT_PATH, CHAT, stream=streaming)

    (line,) = lines(log)
    assert line["method"] == "POST"
    assert line["route"] == CHAT_PATH
    assert line["model"] == "tiny"
    assert line["status"] == 200
    assert line["stream"] is streaming
    assert line["prompt_tokens"] == 7
    assert line["completion_tokens"] == 2
    assert line["ttft_ms"] >= 0
    assert line["duration_ms"] >= line["ttft_ms"]
    assert "reason" not in line


async def test_the_canonical_line_says_why_a_request_failed(log: LogCapture) -> None:
    async with in_process(FakeApi(failing(make_error(Reason.QUEUE_FULL, "full")))) as client:
        await post(client, CHAT_PATH, CHAT)
        await client.get("/nothing")
        await client.get("/v1/models/other")

    assert [(line["status"], line["reason"], line["route"]) for line in lines(log)] == [
        (429, "QUEUE_FULL", CHAT_PATH),
        (404, "UNKNOWN_URL", "unmatched"),
        (404, "MODEL_NOT_FOUND", "/v1/models/{model}"),
    ]


async def test_a_bug_leaves_its_traceback_in_the_log_under_the_request_id(log: LogCapture) -> None:
    async with in_process(FakeApi(failing(RuntimeError("secret")))) as client:
        await client.post(CHAT_PATH, json=CHAT, headers={"x-request-id": "find-me"})

    (failure,) = [entry for entry in log.entries if entry["event"] == "request_failed"]
    assert failure["exc_info"]
    assert failure["request_id"] == "find-me"
    assert [line["reason"] for line in lines(log)] == ["INTERNAL"]


async def test_a_body_that_never_arrives_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "BODY_SILENCE_SECONDS", 0.01)

    async def stalling() -> AsyncGenerator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with in_process(FakeApi()) as client:
        response = await client.post(CHAT_PATH, content=stalling())

    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"
