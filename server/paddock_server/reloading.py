"""What nobody calls for over the wire: reloads on SIGHUP and when a configuration file changes, scans when a
model directory does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from paddock.errors import PaddockError
from paddock.v1 import model_manager_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from paddock.api import ModelManagerApi

log = structlog.get_logger()

POLL_SECONDS: Final = 2.0
"""How often files and folders are looked at. What has changed is read once it stays as it is for so long: an
editor may still be writing it, or somebody be copying a model."""

LOOK_RARELY: Final = 200
"""A look that takes long, at thousands of folders or over a network, is followed by a pause so many times as
long: at rest it is never more than half a percent of a processor."""

Stamps: TypeAlias = Mapping[str, object]
"""How files and folders look, by path."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is followed."""

    files: Sequence[Path]
    """The configuration files."""

    folders: Callable[[], Stamps]
    """Looks at the model directories. Blocking; called in threads."""

    rescan: Callable[[], Awaitable[None]]
    """Reads them again."""


@contextlib.asynccontextmanager
async def reloading(service: ModelManagerApi, sources: Sources) -> AsyncGenerator[None]:
    """Follow the configuration files and the model directories for as long as the block runs."""
    tasks = [
        asyncio.create_task(follow_files(service, sources.files, POLL_SECONDS), name="config-files"),
        asyncio.create_task(follow_folders(sources, POLL_SECONDS), name="model-directories"),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def follow_files(service: ModelManagerApi, files: Sequence[Path], poll_seconds: float) -> None:
    """Reload whenever a file has become another, until cancelled."""
    if files:
        await _follow(lambda: _stamps(files), lambda: reload(service, "file_changed"), poll_seconds)


async def follow_folders(sources: Sources, poll_seconds: float) -> None:
    """Scan whenever a model directory has changed, until cancelled.

    A scan may have other folders and broken files looked at than before; that counts as a change, so that one
    more scan finds what came while the first one ran.
    """
    await _follow(sources.folders, lambda: _scan(sources.rescan), poll_seconds)


async def _follow(
    look: Callable[[], Stamps], act: Callable[[], Awaitable[None]], poll_seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    known = latest = await asyncio.to_thread(look)
    taken = loop.time() - begun
    while True:
        await asyncio.sleep(max(poll_seconds, LOOK_RARELY * taken))
        begun = loop.time()
        before, latest = latest, await asyncio.to_thread(look)
        taken = loop.time() - begun
        if latest != known and latest == before:
            known = latest
            await act()


async def _scan(rescan: Callable[[], Awaitable[None]]) -> None:
    try:
        await rescan()
    except PaddockError as error:  # The server stops.
        log.info("model_directories_not_scanned", reason=error.reason, error=error.message)


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


def _stamps(files: Sequence[Path]) -> Stamps:
    return {str(path): _stamp(path) for path in files}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # An editor may be replacing it; that it is gone for good, a reload will say.
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
