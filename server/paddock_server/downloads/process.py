"""One run of a fetcher: started, read, watched for life, killed when it is no longer wanted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from paddock_server.downloads.messages import (
    MAX_LINE_BYTES,
    Done,
    Failed,
    Message,
    MessageError,
    decode,
)

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from paddock_server.catalog import HubRef

log: FilteringBoundLogger = structlog.get_logger()

# -P: what lies in the current directory is not to be imported.
FETCHER_COMMAND: Final = (sys.executable, "-P", "-m", "paddock_server.downloads.fetcher")

PASSED_VARIABLES: Final = frozenset(
    {
        "ALL_PROXY", "HOME", "HTTPS_PROXY", "HTTP_PROXY", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN",
        "LANG", "NO_PROXY", "PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE", "TMPDIR", "TZ",
        "USER", "VIRTUAL_ENV", "XDG_CACHE_HOME", "all_proxy", "http_proxy", "https_proxy", "no_proxy",
    }
)  # fmt: skip
"""Variables a fetcher gets by name: where the hub is, how to get there, and who we are there."""

PASSED_PREFIXES: Final = ("HF_", "LC_", "PYTHON")

KILL_SECONDS: Final = 10.0
"""How long the kernel may take to end a killed process."""

_LAST_LINES: Final = 10
_MAX_ERROR_LINE: Final = 1000


class FetcherStalledError(Exception):
    """The fetcher gave no sign of life for too long, and has been killed."""


class FetcherCrashedError(Exception):
    """The fetcher ended without a word; the message has its last lines."""


@dataclass(frozen=True, slots=True)
class FetcherLauncher:
    """Starts fetchers."""

    command: Sequence[str] = FETCHER_COMMAND
    stall_seconds: float = 90.0
    """A fetcher that says nothing for so long is killed. It speaks every second while anything moves, and a
    request of its own times out after 20 s."""

    async def run(
        self, ref: HubRef, receive: Callable[[Message], None], *, resumed: bool = False
    ) -> Done | Failed:
        """Run a fetcher to its end and hand on what it says. Cancelling kills it. `resumed`: the hub has been
        reached for this download before.

        Raises:
            FetcherStalledError, FetcherCrashedError, OSError: it did not get to an end.
        """
        process = await asyncio.create_subprocess_exec(
            *self.command,
            f"--repo={ref.repo_id}",
            f"--revision={ref.revision}",
            f"--pattern={ref.pattern}",
            f"--parent-pid={os.getpid()}",
            *(("--resumed",) if resumed else ()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env=fetcher_environment(os.environ),
            start_new_session=True,  # a Ctrl-C in the server's terminal is the server's to handle
        )
        log.info("fetcher_started", model=ref.name, pid=process.pid)
        tail: deque[str] = deque(maxlen=_LAST_LINES)
        errors = asyncio.create_task(_read_errors(process, tail))
        try:
            return await self._read(process, receive)
        except _EndedError:
            await asyncio.wait({errors}, timeout=1.0)
            code = await _exit_code(process)
            text = f"The process that downloads ended with code {code}: {' / '.join(tail) or 'no output'}"
            raise FetcherCrashedError(text) from None
        finally:
            await _end(process)
            errors.cancel()

    async def _read(
        self, process: asyncio.subprocess.Process, receive: Callable[[Message], None]
    ) -> Done | Failed:
        output = process.stdout
        if output is None:
            raise _EndedError
        while True:
            try:
                async with asyncio.timeout(self.stall_seconds):
                    line = await output.readline()
            except TimeoutError:
                text = f"The download gave no sign of life for {self.stall_seconds:g} s."
                raise FetcherStalledError(text) from None
            except ValueError as error:  # a line over the limit
                raise FetcherCrashedError(str(error)) from error
            if not line:
                raise _EndedError
            try:
                message = decode(line)
            except MessageError as error:
                raise FetcherCrashedError(str(error)) from error
            if isinstance(message, Done | Failed):
                return message
            receive(message)


class _EndedError(Exception):
    """Standard output has ended."""


def fetcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a fetcher gets to see of an environment."""
    return {
        name: value
        for name, value in environment.items()
        if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES)
    }


async def _read_errors(process: asyncio.subprocess.Process, tail: deque[str]) -> None:
    errors = process.stderr
    while errors is not None:
        try:
            line = await errors.readline()
        except ValueError:  # longer than the limit; what it says is of no use
            continue
        if not line:
            return
        tail.append(line.decode("utf-8", "replace").rstrip()[:_MAX_ERROR_LINE])


async def _exit_code(process: asyncio.subprocess.Process) -> int | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            return await process.wait()
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process, which loses nothing, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_SECONDS):
            await process.wait()
    if process.returncode is None:
        log.error("fetcher_not_reaped", pid=process.pid)
