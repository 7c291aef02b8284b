"""Whatever JSON comes in, it is understood or refused with a name: never a crash."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddock.errors import InvalidFieldError
from paddock_gateway.parameters import MESSAGE_FIELDS, PARAMETERS, Dialect
from paddock_gateway.refusal import RequestRefusedError
from paddock_gateway.translate import plan_of
from tests.gateway.clients import CHAT, COMPLETION

BODIES = {Dialect.CHAT: CHAT, Dialect.COMPLETION: COMPLETION}
WORDS = (
    "type",
    "text",
    "function",
    "name",
    "json_object",
    "json_schema",
    "schema",
    "image_url",
    "url",
    "user",
    "auto",
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 2**64]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=8,
)
messages = st.lists(st.dictionaries(st.sampled_from(sorted(MESSAGE_FIELDS)), values, max_size=4), max_size=3)


def complaint(dialect: Dialect, body: bytes) -> str:
    """Return the name of what is complained about, "nothing" for a body that can be sent on."""
    try:
        plan = plan_of(dialect, body)
    except InvalidFieldError as error:
        return error.violations[0].field
    except RequestRefusedError as error:
        return error.code
    for request in plan.requests:
        request.SerializeToString()
    return "nothing"


@pytest.mark.parametrize("dialect", list(Dialect))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_of_any_parameter_is_understood_or_refused_by_name(
    dialect: Dialect, data: st.DataObject
) -> None:
    more = data.draw(st.dictionaries(st.sampled_from(sorted(PARAMETERS[dialect])), values, max_size=4))
    if "messages" in more:
        more["messages"] = data.draw(messages)

    assert complaint(dialect, json.dumps({**BODIES[dialect], **more}).encode())


@pytest.mark.parametrize("dialect", list(Dialect))
@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=64))
@example(body=b'{"model": "\\ud800"}')
@example(body=b'{"model": 1e999}')
@example(body=b'{"model": "a", "model": "b"}')
@example(body=b"\xef\xbb\xbf{}")
def test_any_bytes_are_understood_or_refused(dialect: Dialect, body: bytes) -> None:
    assert complaint(dialect, body)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "logit_bias"])
def test_a_number_too_large_for_the_wire_arrives_as_infinity_for_the_server_to_refuse(name: str) -> None:
    value: Any = {"1": 1e300} if name == "logit_bias" else 1e300

    (request,) = plan_of(Dialect.CHAT, json.dumps({**CHAT, name: value}).encode()).requests

    sent = request.sampling.logit_bias[1] if name == "logit_bias" else getattr(request.sampling, name)
    assert math.isinf(sent)
