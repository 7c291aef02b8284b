"""Work that may hang, in threads that nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def in_thread(work: Callable[[], ResultT]) -> ResultT:
    """Run work in a thread of its own, and raise what it raises.

    Whoever gives up awaiting it, and the exit of the process, leave the thread behind. Those of the event
    loop's executor, which looks up names too, are waited for at the exit, however long they take.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[ResultT] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not answer.done():  # given up
            answer.set_exception(error)

    def succeed(result: ResultT) -> None:
        if not answer.done():
            answer.set_result(result)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # from the loop, which is closed: nobody is left to hear it
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  # handed to whoever awaits the work
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(succeed, result)

    threading.Thread(target=run, name="probe", daemon=True).start()
    return await answer
