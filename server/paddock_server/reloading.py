"""Reloads that nobody calls for over the wire: on SIGHUP, and when a configuration file changes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Final

import structlog

from paddock.errors import PaddockError
from paddock.v1 import model_manager_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from paddock.api import ModelManagerApi

log = structlog.get_logger()

POLL_SECONDS: Final = 2.0
"""How often the files are looked at. One that has changed is read once it stays as it is for so long: an
editor may still be writing it."""


@contextlib.asynccontextmanager
async def reloading(service: ModelManagerApi, files: Sequence[Path]) -> AsyncGenerator[None]:
    """Reload when one of the files changes, for as long as the block runs."""
    task = asyncio.create_task(follow_files(service, files, POLL_SECONDS), name="config-files")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def follow_files(service: ModelManagerApi, files: Sequence[Path], poll_seconds: float) -> None:
    """Reload whenever a file has become another, until cancelled."""
    known = latest = await asyncio.to_thread(_stamps, files)
    while files:
        await asyncio.sleep(poll_seconds)
        before, latest = latest, await asyncio.to_thread(_stamps, files)
        if latest != known and latest == before:
            known = latest
            await reload(service, "file_changed")


async def follow_hangups(service: ModelManagerApi) -> None:
    """Reload on every SIGHUP, until cancelled. To be run in the main thread."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, told.set)
    try:
        while True:
            await told.wait()
            told.clear()
            await reload(service, "SIGHUP")
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def reload(service: ModelManagerApi, why: str) -> None:
    """Reload, and say in the log what came of it: there is nobody to raise an error to."""
    try:
        response = await service.reload(pb.ReloadRequest())
    except PaddockError as error:
        log.warning("config_not_reloaded", why=why, reason=error.reason, error=error.message)
        return
    log.info(
        "config_reloaded",
        why=why,
        added=list(response.added),
        changed=list(response.changed),
        removed=list(response.removed),
        unchanged=response.unchanged_count,
    )
    for problem in response.problems:
        log.warning(
            "config_problem", file=problem.file, line=problem.line, key=problem.key, problem=problem.message
        )


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, int, int] | None, ...]:
    return tuple(_stamp(path) for path in files)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # An editor may be replacing it; that it is gone for good, a reload will say.
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
