"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from paddock_server.config import DEMO_DIR
from paddock_server.worker.environment import set_library_environment

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from tests.servers import ServerProcess

set_library_environment()  # before anything imports llama_cpp: many tests run it in this process
# A shell that starts something in the background has it ignore Ctrl-C, and all that it starts in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HOME"] = os.devnull  # the models of whoever runs the tests are none of theirs
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with every model of tests.models that loads, and the demo model. Tests read it and
    never change it.
    """
    # Not everybody who runs tests wants numpy and gguf imported.
    from tests.models import make_all

    folder = tmp_path_factory.mktemp("models")
    make_all(folder)
    shutil.copy(DEMO_DIR / "foal.gguf", folder)
    return folder


@pytest.fixture(scope="session")
def real_server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[ServerProcess]:
    """One `paddock up` on real llama.cpp, for tests that leave it as they found it."""
    from tests.servers import paddock_up

    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    with paddock_up(models_dir, log, "--parallel", "8") as running:
        yield running
