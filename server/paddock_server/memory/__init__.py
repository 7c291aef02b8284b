"""What models take in memory, and what there is: estimates from file headers, and the devices' budget.

`estimate`, `chosen` and all they use are pure. `MachineWatch` looks at the machine.
"""

from __future__ import annotations

from paddock_server.memory.choose import LEAST_CONTEXT_TOKENS, Verdict, chosen, verdict
from paddock_server.memory.estimate import (
    CACHE_TYPES,
    DEFAULT_CACHE_TYPE,
    RAM,
    Estimate,
    LoadOptions,
    Part,
    PartKind,
    Placement,
    estimate,
)
from paddock_server.memory.machine import DeviceMemory, Machine, MachineWatch, own_memory
from paddock_server.memory.shape import LayerShape, Shape, model_shape

__all__ = [
    "CACHE_TYPES",
    "DEFAULT_CACHE_TYPE",
    "LEAST_CONTEXT_TOKENS",
    "RAM",
    "DeviceMemory",
    "Estimate",
    "LayerShape",
    "LoadOptions",
    "Machine",
    "MachineWatch",
    "Part",
    "PartKind",
    "Placement",
    "Shape",
    "Verdict",
    "chosen",
    "estimate",
    "model_shape",
    "own_memory",
    "verdict",
]
