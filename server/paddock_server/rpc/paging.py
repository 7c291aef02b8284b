"""Pages of `List`. Pure."""

from __future__ import annotations

import base64
from bisect import bisect_right
from itertools import islice
from typing import TYPE_CHECKING

from paddock.errors import InvalidFieldError
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.rpc.validate import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE

if TYPE_CHECKING:
    from paddock_server.manager import Listing


def page(request: pb.ListRequest, listing: Listing) -> pb.ListResponse:
    """Cut the page a request asks for out of all models, ordered by id. Only models on it are made.

    A page token holds the last id sent, so models that come and go between pages move no other model.
    """
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    after = _decode(request.page_token) if request.page_token else ""
    states = frozenset(request.states)
    rest = (
        model
        for model in islice(listing.ids, bisect_right(listing.ids, after), None)
        if not states or listing.state_of(model) in states
    )
    ids = list(islice(rest, size + 1))
    response = pb.ListResponse(revision=listing.revision)
    response.models.extend(listing.model_of(model) for model in ids[:size])
    if len(ids) > size:
        response.next_page_token = _encode(ids[size - 1])
    return response


def _encode(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not base64, not UTF-8, not even ASCII
        msg = "page_token"
        raise InvalidFieldError.of(msg, "must be the next_page_token of an earlier response") from error
