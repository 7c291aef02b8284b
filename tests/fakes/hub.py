"""A hub of Hugging Face on loopback: real HTTP, as huggingface_hub uses it, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

STALL_SECONDS = 30.0
"""How long a stalled answer hangs, unless the hub is closed before."""

_BLOCK_BYTES = 4096


@dataclass
class Fault:
    """What is wrong with one answer. Faults are taken in order, each by the next request of its kind."""

    kind: str = "file"
    """`info` for what a repository holds, `file` for the content of a file."""

    status: int = 0
    """Answer with this status instead."""

    error_code: str = ""
    """`X-Error-Code` of that answer."""

    retry_after: str = ""
    """`Retry-After` of that answer."""

    stop_after: int = -1
    """Bytes of the body after which the answer breaks off."""

    stall: bool = False
    """Say nothing more instead of closing the connection."""

    ignore_range: bool = False
    """Send the whole file, whatever range was asked for."""

    location: str = ""
    """Send the client to this host instead, under the same path."""

    endless: bool = False
    """Send a body that never ends."""


@dataclass
class Repo:
    """A repository: its files at one commit, which every revision in `revisions` means."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ("main",)
    wrong_hashes: set[str] = field(default_factory=set[str])
    """Files whose announced hash is not that of their content."""

    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Sizes that are announced instead of the true ones, by file."""

    digests: dict[str, str] = field(default_factory=dict[str, str])
    """Hashes that are announced instead of the true ones, by file."""


class FakeHub:
    """The hub. Tests set `repos` and `faults` and read the counts."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.required_token = ""
        self.served_bytes = 0
        """Bytes of files sent, over all answers."""

        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""

        self.ranges: list[str] = []
        """`Range` of every request for a file; empty without one."""

        self.authorizations: list[str] = []
        """`Authorization` of every request; empty without one."""

        self.block_gate: Callable[[int], None] | None = None
        """Called before every block of a file with the bytes served so far; a slow link waits in it."""

        self.endpoint = ""
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def take(self, kind: str) -> Fault | None:
        """Return the fault the next request of a kind has."""
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind:
                    self.faults.remove(fault)
                    return fault
        return None


def digest_of(content: bytes) -> str:
    """Return the hash under which a file is kept."""
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        hub.authorizations.append(self.headers.get("Authorization", ""))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        if info is not None:
            self._info(info[1], info[2] or "main")
        elif file is not None:
            self._file(file[1], file[2], file[3])
        else:
            self._error(404, "")

    def _refused(self, fault: Fault | None) -> bool:
        if fault is not None and fault.location:
            self.send_response(302)
            self.send_header("Location", fault.location + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        if fault is not None and fault.endless:
            self._endless()
            return True
        if fault is not None and fault.status:
            self._error(fault.status, fault.error_code, fault.retry_after)
            return True
        token = self.hub.required_token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            self._error(401, "")
            return True
        return False

    def _info(self, name: str, revision: str) -> None:
        fault = self.hub.take("info")
        if fault is not None and fault.stall:
            self.hub.closed.wait(STALL_SECONDS)
        if self._refused(fault):
            return
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound")
            return
        if revision not in {*repo.revisions, repo.commit}:
            self._error(404, "RevisionNotFound")
            return
        siblings = [
            {
                "rfilename": path,
                "size": repo.sizes.get(path, len(content)),
                "blobId": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
                "lfs": {
                    "size": repo.sizes.get(path, len(content)),
                    "sha256": repo.digests.get(
                        path, digest_of(content if path not in repo.wrong_hashes else content + b"!")
                    ),
                    "pointerSize": 134,
                },
            }
            for path, content in repo.files.items()
        ]
        body = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, commit: str, path: str) -> None:
        hub = self.hub
        hub.ranges.append(self.headers.get("Range", ""))
        fault = hub.take("file")
        if self._refused(fault):
            return
        repo = hub.repos.get(name)
        if repo is None or repo.commit != commit or path not in repo.files:
            self._error(404, "EntryNotFound")
            return
        content = repo.files[path]
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is not None and (fault is None or not fault.ignore_range):
            start = int(match[1])
        if start >= len(content) > 0:
            self._error(416, "")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{digest_of(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        self._body(content[start:], fault)

    def _body(self, body: bytes, fault: Fault | None) -> None:
        hub = self.hub
        end = fault.stop_after if fault is not None and fault.stop_after >= 0 else len(body)
        for at in range(0, end, _BLOCK_BYTES):
            if hub.block_gate is not None:
                hub.block_gate(hub.served_bytes)
            block = body[at : min(at + _BLOCK_BYTES, end)]
            self.wfile.write(block)
            hub.served_bytes += len(block)
        if end < len(body):
            self.close_connection = True
            if fault is not None and fault.stall:
                hub.closed.wait(STALL_SECONDS)

    def _endless(self) -> None:
        """Begin a list, and never end it."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"siblings": [')
        while not self.hub.closed.is_set():
            self.wfile.write(b" " * 1024 * 1024)

    def _error(self, status: int, code: str, retry_after: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        del format, args


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed while they are answered."""
        del request, client_address


@contextmanager
def running_hub() -> Generator[FakeHub]:
    """Run a hub on a free port of loopback."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
