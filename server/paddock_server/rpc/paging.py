"""Pages of `List`. Pure."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from paddock.errors import InvalidFieldError
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc.validate import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddock.v1 import model_pb2


def page(request: pb.ListRequest, models: Sequence[model_pb2.Model], revision: int) -> pb.ListResponse:
    """Cut the page a request asks for out of all models, ordered by id.

    A page token holds the last id sent, so models that come and go between pages move no other model.
    """
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    after = _decode(request.page_token) if request.page_token else ""
    states = frozenset(request.states)
    rest = [model for model in models if model.id > after and (not states or model.state in states)]
    response = pb.ListResponse(models=rest[:size], revision=revision)
    if len(rest) > size:
        response.next_page_token = _encode(rest[size - 1].id)
    return response


def _encode(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not base64, not UTF-8, not even ASCII
        msg = "page_token"
        raise InvalidFieldError.of(msg, "must be the next_page_token of an earlier response") from error
