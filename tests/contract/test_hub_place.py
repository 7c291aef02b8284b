"""The hub's cache is where huggingface_hub has it, as its own constants say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paddock_server.config import default_hub_cache

if TYPE_CHECKING:
    import pytest

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")

_PRINTED = """
import importlib, json, os, sys
from huggingface_hub import constants
given = json.loads(sys.argv[1])
for environment in given:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    print(importlib.reload(constants).HF_HUB_CACHE)
"""


def test_the_server_looks_for_the_cache_where_huggingface_hub_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [
        {},
        {"HF_HUB_CACHE": "~/a", "HF_HOME": "/b"},
        {"HUGGINGFACE_HUB_CACHE": "/a/$HOME", "HF_HOME": "/b"},
        {"HF_HOME": "~/$USER"},
        {"XDG_CACHE_HOME": "/c"},
    ]
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USER", "me")
    command = [sys.executable, "-c", _PRINTED, json.dumps(environments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    for environment, expected in zip(environments, printed.stdout.splitlines(), strict=True):
        with monkeypatch.context() as patch:
            for name in VARIABLES:
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert default_hub_cache() == Path(expected)
