"""Launchers of fake workers for tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paddock_server.supervisor import LocalLauncher, SupervisorTimeouts
from tests.fakes.behaviour import ENV_NAME, Behaviour, sidecar_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROOT: Final = Path(__file__).resolve().parents[2]
_IMPORT_ROOTS: Final = (_ROOT, _ROOT / "clients" / "python", _ROOT / "server")

QUICK: Final = SupervisorTimeouts(
    handshake=10.0,
    hang=8.0,
    load_stall=10.0,
    load_base=30.0,
    abort=5.0,
    terminate=0.3,
    kill=5.0,
)
"""Time-outs for tests: short where a test waits for them on purpose, long where they are only a way out."""


def fake_launcher(
    behaviour: Behaviour | None = None,
    *,
    timeouts: SupervisorTimeouts = QUICK,
    command: Sequence[str] = (sys.executable, "-P", "-m", "tests.fakes.fake_worker"),
) -> LocalLauncher:
    """Return a launcher whose workers are fake and behave as told. Models may have a sidecar that says
    otherwise."""
    text = (behaviour or Behaviour()).to_json()
    import_path = os.pathsep.join(str(root) for root in _IMPORT_ROOTS)
    return LocalLauncher(command, timeouts, extra_env={ENV_NAME: text, "PYTHONPATH": import_path})


def write_sidecar(model_path: Path, **behaviour: Any) -> None:
    """Have fake workers that load this file behave so; fields as in `Behaviour`."""
    sidecar_of(model_path).write_text(Behaviour(**behaviour).to_json())
