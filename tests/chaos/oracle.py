"""What must be so after a round, by what the driver did and was told: yes, no, or nobody can know."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Oracle:
    """What the operator's calls have come to. None: a call that ended with an error may have had its
    effect."""

    loads: dict[str, bool | None] = field(default_factory=dict[str, "bool | None"])
    """Whether a model's load is to be remembered."""

    pins: dict[str, bool | None] = field(default_factory=dict[str, "bool | None"])
    """Whether a model is to be pinned."""

    hub_model: bool | None = False
    """Whether the hub's model is on the disk."""

    partial: bool = False
    """Whether a part of it may be."""

    workers_died: bool = False
    """Whether any worker was killed or stopped: later rounds may still be told of it."""

    changed: set[str] = field(default_factory=set[str])
    """Models whose remembered load or pin may have changed in this round."""

    def doubt(self) -> None:
        """Nothing of this round can be known: it could not be written, and the server was killed."""
        for model in self.changed:
            self.loads[model] = self.pins[model] = None
        self.hub_model, self.partial = None, True

    def learn(self, state_file: Path) -> None:
        """Take over what is so, after it has been checked."""
        loads, pins = read_state(state_file)
        self.loads = dict.fromkeys(loads, True)
        self.pins = {model: True for model, pinned in pins.items() if pinned}
        self.changed.clear()

    def wrong(self, state_file: Path) -> list[str]:
        """Return what the state file has otherwise."""
        loads, pins = read_state(state_file)
        models = {*loads, *pins, *self.loads, *self.pins}
        found = [
            f"{model}: remembered {model in loads}, should be {wanted}"
            for model in sorted(models)
            if (wanted := self.loads.get(model, False)) not in {None, model in loads}
        ]
        return found + [
            f"{model}: pinned {pins.get(model, False)}, should be {wanted}"
            for model in sorted(models)
            if (wanted := self.pins.get(model, False)) not in {None, pins.get(model, False)}
        ]


def read_state(path: Path) -> tuple[list[str], dict[str, bool]]:
    """Return the remembered loads, the latest last, and the pins."""
    if not path.exists():
        return [], {}
    document: dict[str, Any] = json.loads(path.read_text())
    return [load["model"] for load in document["loads"]], document["pins"]
