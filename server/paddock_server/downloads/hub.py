"""Talking to the hub, through huggingface_hub. Runs in a fetcher, never in the server.

Every request is one attempt: what passes by itself is raised as `TransientError`, and the caller decides.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status

from paddock.errors import PaddockError, Reason, make_error
from paddock_server.addresses import without_credentials
from paddock_server.catalog.hub_names import is_commit, is_digest

if TYPE_CHECKING:
    from paddock_server.catalog import HubRef

_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429})
_MAX_FILES: Final = 100_000
_MAX_NAME_BYTES: Final = 255
"""What disks take for one part of a path."""
_ERROR_NUMBER: Final = re.compile(r"^\[Errno -?\d+\] ")


class TransientError(Exception):
    """A fault that may pass by itself.

    Attributes:
        message: what happened, as a sentence.
        retry_after_seconds: when the hub wants to be asked again; None when it did not say.
        status: HTTP status of the answer; 0 without one.
    """

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, status: int = 0) -> None:
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.status = status
        super().__init__(message)


class UnreachableError(TransientError):
    """Nobody could be connected to: there is no such name, no way there, or nobody who listens."""


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of a repository. `digest` is its hash and its name in the cache: sha256, or git's sha1."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at a commit that can be fetched."""

    commit: str
    files: dict[str, RepoFile]


@dataclass(frozen=True, slots=True)
class Hub:
    """How to reach the hub and where its cache is. The token is in here and nowhere else."""

    endpoint: str
    cache_dir: Path
    token: str | None = None
    offline: bool = False
    read_timeout_seconds: float = 20.0

    def __repr__(self) -> str:
        return f"Hub({self.shown_endpoint!r})"

    @property
    def shown_endpoint(self) -> str:
        """The endpoint for messages: people put passwords into addresses."""
        return without_credentials(self.endpoint)

    @classmethod
    def from_environment(cls) -> Hub:
        """Read HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and the file of the token."""
        return cls(
            endpoint=constants.ENDPOINT,
            cache_dir=Path(constants.HF_HUB_CACHE),
            token=get_token(),
            offline=constants.HF_HUB_OFFLINE,
        )

    def list_files(self, ref: HubRef) -> Listing:
        """Resolve a revision to a commit and list what is there.

        Raises:
            TransientError: it may work in a moment.
            PaddockError: HUB_FILE_NOT_FOUND, HUB_ACCESS_DENIED, HUB_UNREACHABLE.
        """
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        with self._errors(ref, ""):
            info = api.model_info(
                ref.repo_id,
                revision=ref.revision,
                files_metadata=True,
                timeout=self.read_timeout_seconds,
            )
        commit = info.sha or ""
        if not is_commit(commit):
            raise self._unusable(ref, f"its answer names no commit ({commit[:60]!r})")
        files: dict[str, RepoFile] = {}
        for sibling in (info.siblings or [])[:_MAX_FILES]:
            digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs else sibling.size
            path = sibling.rfilename
            # They become paths and promises: what does not look like one is not taken.
            if size is not None and size >= 0 and is_digest(digest or "") and _is_inside(path):
                files[path] = RepoFile(path, size, digest or "")
        return Listing(commit, files)

    @contextmanager
    def open(self, ref: HubRef, commit: str, path: str, offset: int) -> Generator[httpx2.Response]:
        """Ask for a file from an offset on. The caller reads the raw bytes of the answer.

        Raises:
            TransientError: it may work in a moment; also while the body is read, inside the block.
            PaddockError: HUB_FILE_NOT_FOUND, HUB_ACCESS_DENIED, HUB_UNREACHABLE.
        """
        url = hf_hub_url(ref.repo_id, path, revision=commit, endpoint=self.endpoint)
        # Compressed on the way, the bytes of a range would not be those of the file.
        headers = {"Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"  # the client drops it on the way to other hosts
        if offset:
            headers["Range"] = f"bytes={offset}-"
        session = get_session()
        with (
            self._errors(ref, path),
            session.stream("GET", url, headers=headers, timeout=self.read_timeout_seconds) as response,
        ):
            hf_raise_for_status(response)
            yield response

    @contextmanager
    def _errors(self, ref: HubRef, path: str) -> Generator[None]:
        """Turn what huggingface_hub and its HTTP client raise into our own errors."""
        try:
            yield
        except HfHubHTTPError as error:
            raise self._of_status(ref, path, error) from None  # its text may hold a signed address
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise UnreachableError(self._failed(error)) from error
        except httpx2.RequestError as error:
            raise TransientError(self._failed(error)) from error
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError, MemoryError) as error:
            raise self._unusable(ref, f"its answer cannot be read ({type(error).__name__})") from error

    def _failed(self, error: httpx2.RequestError) -> str:
        what = _ERROR_NUMBER.sub("", str(error)) or type(error).__name__
        return f"The connection to {self.shown_endpoint} failed: {what}."

    def _of_status(self, ref: HubRef, path: str, error: HfHubHTTPError) -> Exception:
        status = error.response.status_code
        if status in _TRANSIENT_STATUSES or status >= 500:
            after = _seconds(error.response.headers.get("Retry-After"))
            message = f"{self.shown_endpoint} answered with HTTP status {status}."
            return TransientError(message, retry_after_seconds=after, status=status)
        if isinstance(error, GatedRepoError) or status in {401, 403}:
            unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            why = "does not exist, or is private and" if unknown else "is private or gated, so that it"
            message = (
                f"The repository {ref.repo_id!r} {why} needs the token of an account that may read it "
                f"(HTTP status {status}). Accept its licence, if it has one, on "
                f"{self.shown_endpoint}/{ref.repo_id}, and give the server the token in HF_TOKEN or with "
                "`hf auth login`."
            )
            return _error(Reason.HUB_ACCESS_DENIED, message, ref, status=str(status))
        if isinstance(error, RevisionNotFoundError):
            message = f"The repository {ref.repo_id!r} has no revision {ref.revision!r}."
            return _error(Reason.HUB_FILE_NOT_FOUND, message, ref)
        if isinstance(error, RemoteEntryNotFoundError) or (path and status == 404):
            message = f"The repository {ref.repo_id!r} has no file {path!r}."
            return _error(Reason.HUB_FILE_NOT_FOUND, message, ref, file=path)
        if status == 404:
            message = f"There is no repository {ref.repo_id!r} on {self.shown_endpoint}."
            return _error(Reason.HUB_FILE_NOT_FOUND, message, ref)
        return self._unusable(ref, f"it answered with HTTP status {status}", status=str(status))

    def _unusable(self, ref: HubRef, what: str, **metadata: str) -> PaddockError:
        message = f"{self.shown_endpoint} does not work as a hub: {what}. Check HF_ENDPOINT."
        return _error(Reason.HUB_UNREACHABLE, message, ref, **metadata)


def _error(reason: Reason, message: str, ref: HubRef, **metadata: str) -> PaddockError:
    return make_error(
        reason,
        message,
        metadata={"repo_id": ref.repo_id, "revision": ref.revision, **metadata},
        resource=ref.name if reason is Reason.HUB_FILE_NOT_FOUND else "",
    )


def _is_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    if not pure.parts or not path.isprintable() or pure.is_absolute() or ".." in pure.parts:
        return False
    return all(len(part.encode()) <= _MAX_NAME_BYTES for part in pure.parts)


def _seconds(header: str | None) -> float | None:
    # The other form, a date, is not what the hub sends.
    return float(header) if header and header.isascii() and header.isdigit() else None
