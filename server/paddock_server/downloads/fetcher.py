"""`python -m paddock_server.downloads.fetcher`: one download, in a process of its own.

The server starts it and reads its messages (`downloads/messages.py`) from standard output. It may be killed
at any moment, and ends when the server does. The token comes from the environment or from the file that
`hf auth login` writes, never from the command line.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from paddock.errors import PaddockError, Reason, make_error
from paddock_server.catalog.hub_names import (
    HubRef,
    NoSuchFileError,
    choose_model,
    choose_projector,
    hub_ref,
    quant_tag,
    shards_of,
)
from paddock_server.downloads.messages import Advanced, Done, Message, Resolved, Retrying, encode, failed
from paddock_server.worker.parent import die_with_parent

if TYPE_CHECKING:
    from paddock_server.downloads.hub import Hub, Listing, RepoFile, TransientError
    from paddock_server.downloads.transfer import Place

ResultT = TypeVar("ResultT")

MEMORY_BYTES: Final = 1024 * 1024 * 1024
"""Memory a fetcher may have. Files pass through in pieces; the bound is for a hub whose list of files has no
end."""

ADVANCE_SECONDS: Final = 0.25
"""Least time between two messages about progress."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a fetcher puts up with faults that pass by themselves."""

    attempts: int = 6
    """Attempts in a row that bring nothing new."""

    attempts_in_all: int = 200
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0
    longest_asked_wait_seconds: float = 120.0
    """A hub that wants to be left alone for longer is told to the callers instead."""


@dataclass(slots=True)
class Reporter:
    """Tells how far things are, not more often than anybody can look."""

    send: Callable[[Message], None]
    verifying: bool = False
    completed_bytes: int = 0
    total_bytes: int = 0
    _sent_at: float = field(default=0.0)

    def begin(self, *, verifying: bool, completed_bytes: int, total_bytes: int) -> None:
        """Begin a stage."""
        self.verifying = verifying
        self.completed_bytes, self.total_bytes = completed_bytes, total_bytes
        self.tell()

    def add(self, count: int) -> None:
        """Count bytes."""
        self.completed_bytes += count
        if time.monotonic() - self._sent_at >= ADVANCE_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Send how far it is. Also a sign of life."""
        self._sent_at = time.monotonic()
        self.send(Advanced(self.verifying, self.completed_bytes, self.total_bytes))


class Fetch:
    """One download, from a name to linked files."""

    def __init__(
        self,
        hub: Hub,
        ref: HubRef,
        send: Callable[[Message], None],
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        *,
        resumed: bool = False,
    ) -> None:
        """Make it; `run` downloads. `resumed`: the hub has been reached for this download before, so that
        not to reach it now is a fault that passes."""
        self._hub = hub
        self._ref = ref
        self._send = send
        self._reporter = Reporter(send)
        self._patience = patience or Patience()
        self._sleep = sleep
        self._resumed = resumed

    def run(self) -> None:
        """Download. The last message is `Done`.

        Raises:
            PaddockError: why it failed.
        """
        from paddock_server.downloads import transfer

        if self._hub.offline:
            raise offline(self._ref)
        listing = self._again(lambda: self._hub.list_files(self._ref), lambda: 0, first=not self._resumed)
        model, files = self._chosen(listing)
        place = transfer.Place(self._hub.cache_dir, self._ref.repo_id)
        total = sum(file.size_bytes for file in files)
        digests = [file.digest for file in files]
        self._send(Resolved(listing.commit, model, self._suffix(listing, model), total, digests))
        cached = all(place.is_linked(file, listing.commit) for file in files)
        with transfer.disk_errors(self._hub.cache_dir):
            if not cached:
                self._fetch(listing, files, place, total)
            if self._ref.revision != listing.commit:
                place.set_ref(self._ref.revision, listing.commit)
        self._send(Done(cached))

    def _chosen(self, listing: Listing) -> tuple[str, list[RepoFile]]:
        try:
            model = choose_model(listing.files, self._ref.pattern)
            paths = shards_of(listing.files, model)
        except NoSuchFileError as error:
            raise make_error(
                Reason.HUB_FILE_NOT_FOUND,
                f"In the repository {self._ref.repo_id!r} at revision {self._ref.revision!r}, {error}.",
                metadata={"repo_id": self._ref.repo_id, "revision": self._ref.revision},
                resource=self._ref.name,
            ) from error
        projector = choose_projector(listing.files, model)
        if projector is not None:
            paths.append(projector)
        return model, [listing.files[path] for path in paths]

    def _suffix(self, listing: Listing, model: str) -> str:
        """Return what the model's id ends with: its quantization, if that means this file."""
        tag = quant_tag(model)
        return tag if tag and choose_model(listing.files, tag) == model else model

    def _fetch(self, listing: Listing, files: Sequence[RepoFile], place: Place, total: int) -> None:
        from paddock_server.downloads import transfer

        present = sum(place.present_bytes(file) for file in files)
        if total - present > transfer.free_bytes(self._hub.cache_dir):
            raise transfer.disk_full(self._hub.cache_dir, total - present)
        reporter = self._reporter
        reporter.begin(verifying=False, completed_bytes=present, total_bytes=total)
        with ExitStack() as locks:
            # In one order everywhere, so that two downloads with a file in common cannot wait for each other.
            for file in sorted({file.digest: file for file in files}.values(), key=lambda file: file.digest):
                locks.enter_context(place.locked(file, reporter.tell))
            reporter.begin(
                verifying=False,
                completed_bytes=sum(place.present_bytes(file) for file in files),
                total_bytes=total,
            )
            missing = [file for file in files if not place.is_whole(file)]
            for file in missing:
                self._fetch_file(listing.commit, file, place)
            reporter.begin(
                verifying=True, completed_bytes=0, total_bytes=sum(file.size_bytes for file in missing)
            )
            for file in missing:
                if not place.is_whole(file):  # two names of one content
                    transfer.verify(file, place, reporter.add)
            reporter.tell()
            # Before the locks go: what no link leads to may be removed. The first shard last: from then on
            # it is a model.
            for file in reversed(files):
                if not place.is_linked(file, listing.commit):
                    place.link(file, listing.commit)

    def _fetch_file(self, commit: str, file: RepoFile, place: Place) -> None:
        from paddock_server.downloads import transfer

        self._again(
            lambda: transfer.fetch_rest(self._hub, self._ref, commit, file, place, self._reporter.add),
            lambda: place.present_bytes(file),
        )

    def _again(
        self, attempt: Callable[[], ResultT], progress: Callable[[], int], *, first: bool = False
    ) -> ResultT:
        """Try until it works, as long as faults pass by themselves. `progress` grows when an attempt that
        failed has brought something; such attempts do not count. The `first` request of all is not repeated
        when nobody can be connected to: that is a wrong address or a machine without a network."""
        from paddock_server.downloads import hub

        patience = self._patience
        fruitless = 0
        for _ in range(patience.attempts_in_all):
            before = progress()
            try:
                return attempt()
            except hub.TransientError as error:
                if first and isinstance(error, hub.UnreachableError):
                    raise self._out_of_reach(error) from error
                first = False
                fruitless = 0 if progress() > before else fruitless + 1
                asked = error.retry_after_seconds or 0.0
                if fruitless >= patience.attempts or asked > patience.longest_asked_wait_seconds:
                    raise self._unreachable(error) from error
                wait = min(
                    patience.first_wait_seconds * 2 ** max(0, fruitless - 1), patience.longest_wait_seconds
                )
                self._pause(error.message, max(wait, asked))
        message = f"The connection broke {patience.attempts_in_all} times."
        raise self._unreachable(hub.TransientError(message))

    def _pause(self, message: str, seconds: float) -> None:
        self._send(Retrying(message, seconds))
        left = seconds
        while left > 0:
            self._sleep(min(left, 1.0))
            left -= 1.0
            self._reporter.tell()

    def _unreachable(self, error: TransientError) -> PaddockError:
        metadata = self._metadata()
        if error.status:
            metadata["status"] = str(error.status)
        return make_error(
            Reason.HUB_UNREACHABLE,
            f"{error.message} Whatever arrived is kept.",
            metadata=metadata,
            retry_after_seconds=error.retry_after_seconds,
        )

    def _out_of_reach(self, error: TransientError) -> PaddockError:
        message = (
            f"{error.message} Check the server's network and HF_ENDPOINT, or put a file that you have into a "
            "directory of --models-dir."
        )
        return make_error(Reason.HUB_UNREACHABLE, message, metadata=self._metadata())

    def _metadata(self) -> dict[str, str]:
        return {"repo_id": self._ref.repo_id, "endpoint": self._hub.shown_endpoint}


def offline(ref: HubRef) -> PaddockError:
    """Return the error about a model that would have to be downloaded in offline mode."""
    return make_error(
        Reason.HUB_FILE_NOT_FOUND,
        f"{ref.name!r} is not in the hub's cache of the server, which HF_HUB_OFFLINE keeps from downloading.",
        metadata={"repo_id": ref.repo_id, "revision": ref.revision, "offline": "true"},
        resource=ref.name,
    )


def main() -> NoReturn:
    """Download what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m paddock_server.downloads.fetcher", description=__doc__)
    parser.add_argument("--repo", required=True, help="ORG/REPO")
    parser.add_argument("--revision", required=True, help="branch, tag or commit")
    parser.add_argument("--pattern", required=True, help="quantization, file name or glob; may be empty")
    parser.add_argument("--parent-pid", type=int, required=True, help="process id of the server")
    parser.add_argument("--resumed", action="store_true", help="the hub has been reached for it before")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    _limit_memory()
    # Plain HTTP resumes at any byte and works with every endpoint; xet needs the hub's own.
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from paddock_server.downloads.hub import Hub

    ref = hub_ref(arguments.repo, arguments.revision, arguments.pattern)
    try:
        Fetch(Hub.from_environment(), ref, _send, resumed=arguments.resumed).run()
    except PaddockError as error:
        _send(failed(error))
    except OSError as error:
        message = f"The hub's cache cannot be written: {error.strerror} ({error.filename})."
        _send(failed(make_error(Reason.INTERNAL, message, metadata={"path": str(error.filename)})))
    sys.exit(0)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _send(message: Message) -> None:
    sys.stdout.buffer.write(encode(message))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
