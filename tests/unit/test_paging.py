"""Pages of List."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paddock.errors import InvalidFieldError
from paddock.v1 import model_manager_pb2 as pb
from paddock.v1 import model_pb2
from paddock_server.manager import Listing
from paddock_server.rpc.paging import page

if TYPE_CHECKING:
    from collections.abc import Sequence

MODELS = [
    model_pb2.Model(
        id=f"m{index}", state=model_pb2.MODEL_STATE_LOADED if index % 2 else model_pb2.MODEL_STATE_UNLOADED
    )
    for index in range(5)
]


def listing(models: Sequence[model_pb2.Model], revision: int) -> Listing:
    by_id = {model.id: model for model in models}

    def state_of(model: str) -> model_pb2.ModelState.ValueType:
        return by_id[model].state

    return Listing(list(by_id), state_of, by_id.__getitem__, revision)


def test_pages_join_to_all_models_once_each() -> None:
    seen: list[str] = []
    token = ""
    while True:
        response = page(pb.ListRequest(page_size=2, page_token=token), listing(MODELS, 7))
        seen += [model.id for model in response.models]
        assert response.revision == 7
        token = response.next_page_token
        if not token:
            break

    assert seen == ["m0", "m1", "m2", "m3", "m4"]


def test_a_model_that_goes_between_pages_moves_no_other() -> None:
    first = page(pb.ListRequest(page_size=2), listing(MODELS, 1))
    rest = page(pb.ListRequest(page_size=5, page_token=first.next_page_token), listing(MODELS[2:], 2))

    assert [model.id for model in rest.models] == ["m2", "m3", "m4"]


def test_states_filter() -> None:
    response = page(pb.ListRequest(states=[model_pb2.MODEL_STATE_LOADED]), listing(MODELS, 1))

    assert [model.id for model in response.models] == ["m1", "m3"]


def test_a_page_is_never_larger_than_a_thousand_and_fifty_by_default() -> None:
    models = [model_pb2.Model(id=f"{index:05}") for index in range(1500)]

    assert len(page(pb.ListRequest(page_size=5000), listing(models, 1)).models) == 1000
    assert len(page(pb.ListRequest(), listing(models, 1)).models) == 50


@pytest.mark.parametrize("token", ["%%", "_w==", "é"])
def test_a_made_up_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidFieldError, match="page_token"):
        page(pb.ListRequest(page_token=token), listing(MODELS, 1))
