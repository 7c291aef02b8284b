"""Running the generations of one request."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from paddock.errors import PaddockError
from paddock_gateway.errors import ClientGoneError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from paddock.api import ModelManagerApi
    from paddock.v1 import model_manager_pb2 as pb

    Failure = PaddockError | ClientGoneError
    Take = Callable[[int, pb.GenerateResponse], Awaitable[None]]


async def run_generations(
    api: ModelManagerApi, requests: Sequence[pb.GenerateRequest], take: Take, *, at_once: int
) -> None:
    """Run one generation per prompt and hand on every event, with the index of its prompt, one at a time.

    The first error ends the others and is raised. Cancelling stops every generation.

    Args:
        api: Where to generate.
        requests: One per prompt.
        take: Takes the events.
        at_once: Most generations to run at a time, so that one long list leaves room in the queue for others.
    """
    if len(requests) == 1:
        await _run(api, 0, requests[0], take)
        return
    places = asyncio.Semaphore(at_once)
    turn = asyncio.Lock()

    async def take_in_turn(index: int, response: pb.GenerateResponse) -> None:
        async with turn:
            await take(index, response)

    async def run_in_place(index: int, request: pb.GenerateRequest) -> None:
        async with places:
            await _run(api, index, request, take_in_turn)

    try:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                group.create_task(run_in_place(index, request))
    except* (PaddockError, ClientGoneError) as errors:
        failure = _first(errors)
    else:
        return
    raise failure


def _first(group: BaseExceptionGroup[Failure]) -> Failure:
    """Return the error that came first; the others are what it did to its neighbours."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _run(api: ModelManagerApi, index: int, request: pb.GenerateRequest, take: Take) -> None:
    async with aclosing(api.generate(request)) as responses:
        async for response in responses:
            await take(index, response)
