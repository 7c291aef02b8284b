"""What chaos is made in: directories that outlive servers, a hub, and one `paddock up` after the other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from models.foal import corpus
from paddock import Client
from paddock_server.config import DEMO_DIR
from tests.fakes.hub import FakeHub, Repo, digest_of, running_hub
from tests.models import make_embedder, make_noise
from tests.servers import paddock_up

if TYPE_CHECKING:
    from tests.servers import ServerProcess

LOCAL_MODELS: Final = ("embed", "foal", "noise")
"""Files of the model directory."""

REPO: Final = "org/foal-GGUF"
HUB_MODEL: Final = f"{REPO}:Q8_0"
MODELS_MAX: Final = 3
TWINS: Final = "twins"
"""A model with one replica or two, by the configuration."""

DISK_BYTES: Final = 24 * 1024 * 1024
"""Size of the disk of the hub's cache and of the state directory, where one may be mounted."""

ANSWERS: Final[list[dict[str, str]]] = json.loads((Path(corpus.__file__).parent / "answers.json").read_text())

FLAGS: Final = (
    *("--models-max", str(MODELS_MAX), "--ctx-size", "1024", "--threads", "1"),
    *("--drain-seconds", "5", "--log-level", "debug"),
)
END_SECONDS: Final = 10
"""How long processes of a server that was killed may live on: the rule says two, a busy machine more."""


def replicas_of(model: str, variant: int) -> int:
    """Return how many workers a variant of the configuration wants for a model."""
    return 1 + variant % 2 if model == TWINS else 1


class World:
    """Everything that is there whether or not a server runs."""

    def __init__(self, root: Path, disk: Path, hub: FakeHub, *, is_small_disk: bool) -> None:
        self.hub = hub
        self.models = root / "models"
        self.config = root / "paddock.toml"
        self.cache = disk / "hub"
        self.state = disk / "state"
        self.is_small_disk = is_small_disk
        """Whether the cache and the state lie on a disk that can be filled."""

        self.server_pids: list[int] = []
        self.texts: dict[tuple[str, str], str] = {}
        """What models have answered at first, by model and question."""

        self.vectors: dict[str, tuple[float, ...]] = {}
        """What the embedding model has answered at first."""

        self._disk = disk
        self._logs = root / "logs"
        self._running = ExitStack()
        self._server: ServerProcess | None = None
        self._client: Client | None = None
        self._make_files()
        self.model_files = self._read_models()

    def _make_files(self) -> None:
        self.models.mkdir()
        self._logs.mkdir()
        make_noise(self.models / "noise.gguf")
        make_embedder(self.models / "embed.gguf")
        shutil.copy(DEMO_DIR / "foal.gguf", self.models)
        self.hub.repos[REPO] = Repo({"foal-Q8_0.gguf": (DEMO_DIR / "foal.gguf").read_bytes()})
        self.configure(0)

    def configure(self, variant: int, *, is_broken: bool = False) -> None:
        """Write a configuration. Each variant has another alias and context size, and another number of
        twins."""
        text = f'[models.helper]\npath = "noise.gguf"\nctx_size = {512 + 128 * (variant % 3)}\n'
        text += f'aliases = ["helper-{variant}"]\n'
        text += f'[models.{TWINS}]\npath = "foal.gguf"\nreplicas = {replicas_of(TWINS, variant)}\n'
        self.config.write_text(text + ("nonsense = [\n" if is_broken else ""))

    @property
    def server(self) -> ServerProcess:
        """The server that runs."""
        assert self._server is not None
        return self._server

    @property
    def client(self) -> Client:
        """A client of it."""
        assert self._client is not None
        return self._client

    @property
    def log(self) -> Path:
        """The log of the latest server."""
        return self._logs / f"{len(self.server_pids)}.jsonl"

    async def start(self) -> None:
        """Start a server on what the one before has left."""
        environment = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self._disk),
            "PADDOCK_STATE_DIR": str(self.state),
        }
        if self._client is not None:  # Not earlier: calls to the server before may have been under way.
            await self._client.close()
        log = self._logs / f"{len(self.server_pids) + 1}.jsonl"
        up = paddock_up(self.models, log, *FLAGS, "--config", str(self.config), environment=environment)
        self._server = await asyncio.to_thread(self._running.enter_context, up)
        self.server_pids.append(self._server.process.pid)
        self._client = Client.connect(self._server.grpc_address)

    async def kill(self) -> None:
        """Kill the server, and see that nothing of it lives on."""
        left = psutil.Process(self.server.process.pid).children(recursive=True)
        self.server.process.kill()
        await self._ended(left)

    async def stop(self) -> None:
        """Stop the server as an operator would."""
        left = psutil.Process(self.server.process.pid).children(recursive=True)
        code = await asyncio.to_thread(self.server.stop)
        assert code == 0, f"the server ended with {code}"
        await self._ended(left)

    async def _ended(self, left: list[psutil.Process]) -> None:
        await asyncio.to_thread(self.server.process.wait, END_SECONDS)
        _, alive = await asyncio.to_thread(psutil.wait_procs, left, END_SECONDS)
        # One that was stopped before its first line ran could not ask the kernel to end with its parent yet.
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    process.send_signal(signal.SIGCONT)
        _, alive = await asyncio.to_thread(psutil.wait_procs, alive, END_SECONDS)
        assert alive == [], f"these outlived their server: {alive}"
        await asyncio.to_thread(self._running.close)

    def children(self, module: str) -> list[psutil.Process]:
        """Return the processes any of our servers has started that run a module."""
        parents = {str(pid) for pid in self.server_pids}
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = " ".join(process.cmdline()).replace("=", " ").split()
                at = words.index("--parent-pid") + 1 if "--parent-pid" in words and module in words else 0
                if at and words[at] in parents:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Return all worker processes, of whichever server."""
        return self.children("paddock_server.worker")

    def fetchers(self) -> list[psutil.Process]:
        """Return all fetchers, of whichever server."""
        return self.children("paddock_server.downloads.fetcher")

    # Disks

    def fill_disk(self) -> None:
        """Leave no room where the server writes.

        Without a disk of our own, no process of the server may let a file grow: the same errors where it
        writes.
        """
        if not self.is_small_disk:
            limit = self.log.stat().st_size + 512 * 1024
            psutil.Process(self.server.process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, psutil.RLIM_INFINITY))
            return
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1024 * 1024)):
                pass
            while file.write(b"\0"):
                pass

    def empty_disk(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)
        if not self.is_small_disk and self.server.process.poll() is None:
            unlimited = (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY)
            psutil.Process(self.server.process.pid).rlimit(psutil.RLIMIT_FSIZE, unlimited)

    @property
    def _ballast(self) -> Path:
        return self._disk / "ballast"

    def _read_models(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.models.iterdir()}

    # What must hold of files

    def check_files(self, *, may_be_partial: bool) -> bool:
        """Return whether the model of the hub is there; raise when any file is not as it should be.

        `may_be_partial` says whether a download may have left what had arrived.
        """
        assert self._read_models() == self.model_files, "the model directory is not what it was"
        ours = {"loads-0.json", "downloads-0.json", "measured-0.json"}
        assert self._names(self.state) <= ours, self._names(self.state)
        for path in self.state.glob("*.json"):
            json.loads(path.read_text())
        folder = self.cache / f"models--{REPO.replace('/', '--')}"
        blobs = self._names(folder / "blobs")
        digest = digest_of(self.hub.repos[REPO].files["foal-Q8_0.gguf"])
        allowed = {digest, *([f"{digest}.incomplete"] if may_be_partial else [])}
        assert blobs <= allowed, f"left in blobs: {blobs - allowed}"
        if digest in blobs:
            assert digest_of((folder / "blobs" / digest).read_bytes()) == digest, "half a file has its name"
        link = folder / "snapshots" / ("a" * 40) / "foal-Q8_0.gguf"
        others = [path for path in folder.rglob("*") if path.name.startswith(".")]
        assert others == [], f"left in the hub's cache: {others}"
        assert link.is_symlink() <= (digest in blobs), "a link leads nowhere"
        assert may_be_partial or link.is_symlink() == (digest in blobs), "a file is left without a link"
        return link.is_symlink()

    @staticmethod
    def _names(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGCONT)
        self._running.close()


@contextmanager
def world(root: Path) -> Generator[World]:
    """Make a world in an empty folder. Its disk is one of its own where this process may mount one."""
    disk = root / "disk"
    disk.mkdir()
    with running_hub() as hub, ExitStack() as stack:
        mounted = _mount(disk)
        if mounted:
            stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        made = World(root, disk, hub, is_small_disk=mounted)
        stack.callback(made.close)
        yield made


def _mount(disk: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
