"""A download in this process, against a hub on loopback that misbehaves: each fault ends in its reason, and
no byte that has arrived is fetched again."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from paddock.errors import PaddockError, Reason
from paddock_server.catalog import parse_hub_name
from paddock_server.downloads import transfer
from paddock_server.downloads.fetcher import Fetch, Patience
from paddock_server.downloads.hub import Hub
from paddock_server.downloads.messages import Done, Failed, Message, Resolved, Retrying
from paddock_server.downloads.process import FetcherLauncher
from tests.fakes.hub import FakeHub, Fault, Repo, digest_of, running_hub

CONTENT = bytes(range(256)) * 512
HALF = len(CONTENT) // 2
REPO = "org/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"


@pytest.fixture
def hub() -> Generator[FakeHub]:
    with running_hub() as hub:
        hub.repos[REPO] = Repo({FILE: CONTENT, "README.md": b"# tiny"})
        yield hub


class Fetched:
    """What a download did."""

    def __init__(self, hub: FakeHub, cache: Path, token: str | None = None) -> None:
        self.messages: list[Message] = []
        self.waits: list[float] = []
        self.hub = Hub(hub.endpoint, cache, token=token, read_timeout_seconds=0.5)
        self.folder = cache / "models--org--tiny-GGUF"

    def run(self, name: str = f"hf:{REPO}", *, resumed: bool = False) -> None:
        ref = parse_hub_name(name)
        Fetch(self.hub, ref, self.messages.append, sleep=self.waits.append, resumed=resumed).run()

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.messages if isinstance(message, kind)]

    @property
    def file(self) -> Path:
        return self.folder / "snapshots" / ("a" * 40) / FILE

    @property
    def partial(self) -> Path:
        return self.folder / "blobs" / f"{digest_of(CONTENT)}.incomplete"


@pytest.fixture
def fetched(hub: FakeHub, tmp_path: Path) -> Fetched:
    return Fetched(hub, tmp_path / "hub")


def test_a_file_lands_in_the_layout_of_the_hub_s_cache(hub: FakeHub, fetched: Fetched) -> None:
    fetched.run()

    assert fetched.file.read_bytes() == CONTENT
    assert str(fetched.file.readlink()) == f"../../blobs/{digest_of(CONTENT)}"
    assert (fetched.folder / "refs" / "main").read_text() == "a" * 40
    assert hub.served_bytes == len(CONTENT)
    assert [kind for kind in map(type, fetched.messages) if kind is not Retrying][-1] is Done


def test_what_is_there_already_is_not_fetched_again(hub: FakeHub, fetched: Fetched) -> None:
    fetched.run()
    fetched.run()

    assert fetched.messages[-1] == Done(cached=True)
    assert hub.served_bytes == len(CONTENT)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(stop_after=HALF),
        Fault(stop_after=HALF, stall=True),
        Fault(status=500),
        Fault(status=503),
        Fault(status=429, retry_after="3"),
        Fault("info", status=502),
        Fault("info", status=429, retry_after="3"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status} {fault.stop_after} {'stall' * fault.stall}".strip(),
)
def test_what_passes_by_itself_is_tried_again_and_no_byte_twice(
    hub: FakeHub, fetched: Fetched, fault: Fault
) -> None:
    asked = float(fault.retry_after or 0)
    hub.faults = [fault]

    fetched.run()

    assert fetched.file.read_bytes() == CONTENT
    assert hub.served_bytes == len(CONTENT)
    assert len(fetched.of(Retrying)) == 1
    assert sum(fetched.waits) >= asked


def test_a_later_fetcher_goes_on_where_one_was_ended(hub: FakeHub, fetched: Fetched) -> None:
    hub.faults = [Fault(stop_after=HALF), *(Fault(status=500) for _ in range(6))]
    with pytest.raises(PaddockError):
        fetched.run()
    assert fetched.partial.stat().st_size == HALF
    assert not fetched.file.exists()

    fetched.run()

    assert fetched.file.read_bytes() == CONTENT
    assert hub.ranges[-1] == f"bytes={HALF}-"
    assert hub.served_bytes == len(CONTENT)
    assert not fetched.partial.exists()


def test_a_hub_without_ranges_sends_the_whole_file_again(hub: FakeHub, fetched: Fetched) -> None:
    hub.faults = [Fault(stop_after=HALF), Fault(ignore_range=True)]

    fetched.run()

    assert fetched.file.read_bytes() == CONTENT


def test_a_wrong_hash_removes_the_file_and_says_which(hub: FakeHub, fetched: Fetched) -> None:
    hub.repos[REPO].wrong_hashes = {FILE}

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.MODEL_CORRUPT
    assert caught.value.metadata["file"] == FILE
    assert not fetched.file.exists()
    assert not list((fetched.folder / "blobs").iterdir())


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        (Fault("info", status=401), Reason.HUB_ACCESS_DENIED, "HF_TOKEN"),
        (Fault("info", status=403, error_code="GatedRepo"), Reason.HUB_ACCESS_DENIED, "licence"),
        (Fault(status=401), Reason.HUB_ACCESS_DENIED, "401"),
        (Fault(status=403, error_code="GatedRepo"), Reason.HUB_ACCESS_DENIED, "403"),
        (Fault("info", status=404, error_code="RepoNotFound"), Reason.HUB_FILE_NOT_FOUND, REPO),
        (Fault(status=404, error_code="EntryNotFound"), Reason.HUB_FILE_NOT_FOUND, FILE),
        (Fault("info", status=429, retry_after="3600"), Reason.HUB_UNREACHABLE, "429"),
    ],
)
def test_a_refusal_is_told_at_once_with_its_reason(
    hub: FakeHub, fetched: Fetched, fault: Fault, reason: Reason, told: str
) -> None:
    hub.faults = [fault]

    with pytest.raises(PaddockError, match=told) as caught:
        fetched.run()

    assert caught.value.reason == reason
    assert fetched.waits == []
    assert not fetched.file.exists()


def test_the_time_the_hub_wants_to_be_left_alone_goes_to_the_caller(hub: FakeHub, fetched: Fetched) -> None:
    hub.faults = [Fault("info", status=429, retry_after="3600")]

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.retry_after_seconds == 3600


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_stays_broken_is_unreachable_after_a_bound(
    hub: FakeHub, fetched: Fetched, status: int
) -> None:
    hub.faults = [Fault("info", status=status) for _ in range(100)]

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_UNREACHABLE
    assert caught.value.retry_after_seconds
    assert len(hub.requests) == Patience().attempts


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"hf:{REPO}:Q8_0", "Q8_0.*tiny-Q4_K_M.gguf"),
        (f"hf:{REPO}@v9", "revision 'v9'"),
        ("hf:org/other", "org/other"),
    ],
)
def test_what_is_not_there_is_named(fetched: Fetched, name: str, told: str) -> None:
    with pytest.raises(PaddockError, match=told) as caught:
        fetched.run(name)

    assert caught.value.reason == Reason.HUB_FILE_NOT_FOUND
    assert caught.value.resource == name.removeprefix("hf:")


def test_a_connection_that_is_refused_at_the_start_is_told_at_once_with_what_to_do(
    tmp_path: Path, hub: FakeHub
) -> None:
    fetched = Fetched(hub, tmp_path)
    fetched.hub = Hub("http://me:secret@127.0.0.1:1", tmp_path)

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_UNREACHABLE
    assert fetched.waits == []
    assert caught.value.message.startswith("The connection to http://127.0.0.1:1 failed: Connection refused.")
    assert all(what in caught.value.message for what in ("network", "HF_ENDPOINT", "--models-dir"))
    assert "secret" not in f"{caught.value.message} {caught.value.metadata} {fetched.hub!r}"


def test_a_name_that_nobody_knows_is_told_at_once(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    fetched = Fetched(hub, tmp_path)
    fetched.hub = Hub("http://hub.invalid", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    with pytest.raises(PaddockError, match=r"not known\. Check the server's network") as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_UNREACHABLE
    assert fetched.waits == []


def test_a_download_that_goes_on_waits_for_the_network_to_come_back(tmp_path: Path, hub: FakeHub) -> None:
    fetched = Fetched(hub, tmp_path)
    fetched.hub = Hub("http://127.0.0.1:1", tmp_path)

    with pytest.raises(PaddockError, match="Whatever arrived is kept") as caught:
        fetched.run(resumed=True)

    assert caught.value.reason == Reason.HUB_UNREACHABLE
    assert len(fetched.of(Retrying)) == Patience().attempts - 1


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    hub: FakeHub, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(folder: Path) -> int:
        del folder
        return HALF

    monkeypatch.setattr(transfer, "free_bytes", little)

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.DISK_FULL
    assert caught.value.metadata["needed_bytes"] == str(len(CONTENT))
    assert caught.value.metadata["free_bytes"] == str(HALF)
    assert "128 KiB are needed and 64.0 KiB are free" in caught.value.message
    assert hub.served_bytes == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_told_as_full(
    hub: FakeHub, fetched: Fetched, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(descriptor: int) -> None:
        del descriptor
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("paddock_server.downloads.transfer.os.fsync", full)

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.DISK_FULL
    assert not fetched.file.exists()


def test_offline_nothing_is_asked_and_the_variable_is_named(hub: FakeHub, tmp_path: Path) -> None:
    fetched = Fetched(hub, tmp_path)
    fetched.hub = Hub(hub.endpoint, tmp_path, offline=True)

    with pytest.raises(PaddockError, match="HF_HUB_OFFLINE") as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_FILE_NOT_FOUND
    assert hub.requests == []


def test_the_token_opens_what_is_private_and_is_shown_nowhere(hub: FakeHub, tmp_path: Path) -> None:
    hub.required_token = "hf_secret"
    fetched = Fetched(hub, tmp_path, token="hf_secret")

    fetched.run()

    assert fetched.file.read_bytes() == CONTENT
    assert "hf_secret" not in repr(fetched.hub)
    assert "hf_secret" not in repr(fetched.messages)


def test_all_shards_and_the_projector_come_and_the_first_shard_is_linked_last(
    hub: FakeHub, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"big-Q8_0-{number:05}-of-00003.gguf": b"%d" % number * 5000 for number in (1, 2, 3)}
    hub.repos[REPO] = Repo({**shards, "mmproj-F16.gguf": b"p" * 3000, "big-Q4_0.gguf": b"other"})
    linked: list[str] = []
    link = transfer.Place.link

    def noted(self: transfer.Place, file: transfer.RepoFile, commit: str) -> None:
        linked.append(file.path)
        link(self, file, commit)

    monkeypatch.setattr(transfer.Place, "link", noted)
    fetched.run(f"hf:{REPO}:q8_0")

    resolved = fetched.of(Resolved)[0]
    assert isinstance(resolved, Resolved)
    assert resolved.suffix == "Q8_0"
    assert sorted(linked) == sorted([*shards, "mmproj-F16.gguf"])
    assert linked[-1] == "big-Q8_0-00001-of-00003.gguf"
    assert hub.served_bytes == 3 * 5000 + 3000


def test_a_file_that_another_process_fetches_is_waited_for(hub: FakeHub, fetched: Fetched) -> None:
    place = transfer.Place(fetched.hub.cache_dir, REPO)
    file = transfer.RepoFile(FILE, len(CONTENT), digest_of(CONTENT))
    other = ExitStack()
    other.enter_context(place.locked(file, lambda: None))
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(True)
        other.close()  # the other process ends

    with place.locked(file, waiting):
        assert waited == [True]


def test_names_that_leave_the_cache_are_not_taken(hub: FakeHub, fetched: Fetched) -> None:
    hub.repos[REPO] = Repo({"../../escape-Q4_K_M.gguf": CONTENT})

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_FILE_NOT_FOUND
    assert hub.served_bytes == 0


def test_a_fetcher_killed_while_it_links_leaves_no_file_under_another_name(
    fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    file = fetched.hub.list_files(parse_hub_name(f"hf:{REPO}")).files[FILE]
    place = transfer.Place(fetched.hub.cache_dir, REPO)
    for name in ("replace", "symlink_to"):
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, name, killed)
            place.link(file, "a" * 40)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, name, killed)
            place.set_ref("main", "a" * 40)
    assert {path.name for path in fetched.folder.rglob("*") if not path.is_dir()} <= {FILE, "main"}


def test_a_branch_that_moves_is_noted_over_what_was_noted(fetched: Fetched) -> None:
    place = transfer.Place(fetched.hub.cache_dir, REPO)
    for commit in ("a" * 40, "b" * 40):
        place.set_ref("main", commit)
        assert (fetched.folder / "refs" / "main").read_text() == commit


@pytest.mark.parametrize("kind", ["info", "file"])
def test_the_token_does_not_go_where_the_hub_sends_us(hub: FakeHub, tmp_path: Path, kind: str) -> None:
    with running_hub() as other:
        other.repos = hub.repos
        hub.faults = [Fault(kind, location=other.endpoint)]
        hub.required_token = ""
        fetched = Fetched(hub, tmp_path, token="hf_secret")
        fetched.run()

    assert fetched.file.read_bytes() == CONTENT
    assert set(hub.authorizations) == {"Bearer hf_secret"}
    assert set(other.authorizations) == {""}


def test_a_password_in_the_address_of_the_hub_is_shown_nowhere(hub: FakeHub, fetched: Fetched) -> None:
    address = hub.endpoint.replace("http://", "http://me:pass_word@")
    for fault in (Fault("info", status=401), Fault("info", status=418), Fault(status=429, retry_after="999")):
        hub.faults = [fault]
        fetched.hub = Hub(address, fetched.hub.cache_dir)
        with pytest.raises(PaddockError) as caught:
            fetched.run()
        assert "pass_word" not in repr((caught.value, caught.value.metadata, fetched.messages, fetched.hub))


def test_more_bytes_than_were_announced_are_not_taken(hub: FakeHub, fetched: Fetched) -> None:
    hub.repos[REPO].sizes[FILE] = HALF

    with pytest.raises(PaddockError, match="longer than") as caught:
        fetched.run()

    assert caught.value.reason == Reason.MODEL_CORRUPT
    assert not list((fetched.folder / "blobs").iterdir())


def test_fewer_bytes_than_were_announced_end_after_a_bound(hub: FakeHub, fetched: Fetched) -> None:
    hub.repos[REPO].sizes[FILE] = len(CONTENT) + 1

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_UNREACHABLE
    assert hub.served_bytes == len(CONTENT)
    assert not fetched.file.is_symlink()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/escape-Q4_K_M.gguf",
        "a/../../../escape-Q4_K_M.gguf",
        "..",
        "line\nbreak-Q4_K_M.gguf",
        "null\0byte-Q4_K_M.gguf",
        "\u202eright-to-left-Q4_K_M.gguf",
        "x" * 250 + "-Q4_K_M.gguf",
    ],
)
def test_a_name_that_is_no_name_of_a_file_is_not_taken(hub: FakeHub, fetched: Fetched, path: str) -> None:
    hub.repos[REPO] = Repo({path: CONTENT})

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_FILE_NOT_FOUND
    assert hub.served_bytes == 0


@pytest.mark.parametrize("path", ["%2e%2e%2fa b?c#&-Q4_K_M.gguf", "ü/é-Q4_K_M.gguf", ".x/x-Q4_K_M.gguf"])
def test_a_name_with_odd_characters_is_taken_as_it_is(hub: FakeHub, fetched: Fetched, path: str) -> None:
    hub.repos[REPO] = Repo({path: CONTENT})

    fetched.run()

    link = fetched.folder / "snapshots" / ("a" * 40) / path
    assert link.read_bytes() == CONTENT


@pytest.mark.parametrize("digest", ["../../../escape", "", "A" * 64, "/" * 40, "0" * 63])
def test_a_hash_that_is_none_is_no_name_of_a_blob(hub: FakeHub, fetched: Fetched, digest: str) -> None:
    hub.repos[REPO].digests[FILE] = digest

    with pytest.raises(PaddockError) as caught:
        fetched.run()

    assert caught.value.reason == Reason.HUB_FILE_NOT_FOUND
    assert hub.served_bytes == 0


async def test_a_hub_that_lists_without_an_end_costs_a_bounded_amount_of_memory(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub.faults = [Fault("info", endless=True)]
    program = "from paddock_server.downloads import fetcher; fetcher.MEMORY_BYTES = 1 << 28; fetcher.main()"

    end = await FetcherLauncher((sys.executable, "-c", program)).run(parse_hub_name(REPO), lambda _: None)

    assert isinstance(end, Failed)
    assert (end.reason, "MemoryError" in end.message) == (Reason.HUB_UNREACHABLE, True)
