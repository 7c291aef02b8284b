"""`EstimateMemory` and the devices of `GetServerInfo`: what the memory package says, as messages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from paddock.errors import InvalidFieldError
from paddock.v1 import model_manager_pb2 as pb
from paddock_server.manager.options import FIELD
from paddock_server.manager.prediction import load_options, shape_of
from paddock_server.memory import (
    CACHE_TYPES,
    LoadOptions,
    Machine,
    PartKind,
    Shape,
    Verdict,
    chosen,
    estimate,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from paddock_server.catalog import CatalogEntry
    from paddock_server.manager import ModelManager
    from paddock_server.manager.options import Options
    from paddock_server.memory import MachineWatch

PART_KINDS: Final[Mapping[PartKind, pb.MemoryPartKind.ValueType]] = {
    PartKind.WEIGHTS: pb.MEMORY_PART_KIND_WEIGHTS,
    PartKind.REPACKED_WEIGHTS: pb.MEMORY_PART_KIND_REPACKED_WEIGHTS,
    PartKind.KV_CACHE: pb.MEMORY_PART_KIND_KV_CACHE,
    PartKind.RECURRENT_STATE: pb.MEMORY_PART_KIND_RECURRENT_STATE,
    PartKind.COMPUTE: pb.MEMORY_PART_KIND_COMPUTE,
    PartKind.OUTPUT: pb.MEMORY_PART_KIND_OUTPUT,
    PartKind.PROJECTOR: pb.MEMORY_PART_KIND_PROJECTOR,
    PartKind.ADAPTERS: pb.MEMORY_PART_KIND_ADAPTERS,
    PartKind.PROCESS: pb.MEMORY_PART_KIND_PROCESS,
}
VERDICTS: Final[Mapping[Verdict, pb.MemoryVerdict.ValueType]] = {
    Verdict.FITS: pb.MEMORY_VERDICT_FITS,
    Verdict.FITS_AFTER_EVICTION: pb.MEMORY_VERDICT_FITS_AFTER_EVICTION,
    Verdict.NEVER_FITS: pb.MEMORY_VERDICT_NEVER_FITS,
}


async def estimate_memory(
    request: pb.EstimateMemoryRequest, manager: ModelManager, watch: MachineWatch
) -> pb.EstimateMemoryResponse:
    """Answer a request that has been checked.

    Raises:
        PaddockError: there is no such model, its file cannot be loaded, or an option does not suit it.
    """
    load = pb.LoadRequest(
        model=request.model,
        source=request.source if request.HasField("source") else None,
        runtime_options=request.runtime_options,
    )
    entry, options = await manager.would_load(load)
    machine = await watch.look()
    budget, held = _budget(machine, manager), manager.memory_held(without=entry.id)
    keeps_slots = request.runtime_options.HasField("slot_count") or "slot_count" in entry.setup.options
    return await asyncio.to_thread(
        _response, entry, options, machine, budget, held, manager.memory_measured, keeps_slots=keeps_slots
    )


def _response(
    entry: CatalogEntry,
    options: Options,
    machine: Machine,
    budget: Mapping[str, int],
    held: Mapping[str, int],
    measured: Callable[[CatalogEntry, Options], Mapping[str, int]],
    *,
    keeps_slots: bool,
) -> pb.EstimateMemoryResponse:
    shape, placement = shape_of(entry), machine.placement
    asked = load_options(options)
    check_cache_types(shape, asked)
    taken = chosen(shape, asked, placement, budget, keeps_slots=keeps_slots)
    found = estimate(shape, taken, placement)
    with_choice = replace(options, context_size_tokens=taken.context_size_tokens, slot_count=taken.slot_count)
    known = measured(entry, with_choice)
    needed = {**found.totals, **known}
    return pb.EstimateMemoryResponse(
        parts=[
            pb.MemoryPart(device=part.device, kind=PART_KINDS[part.kind], size_bytes=part.size_bytes)
            for part in found.parts
        ],
        devices=[
            pb.DeviceMemory(
                device=device.name,
                needed_bytes=needed.get(device.name, 0),
                budget_bytes=budget[device.name],
                held_bytes=held.get(device.name, 0),
                measured=device.name in known,
            )
            for device in machine.devices
        ],
        verdict=VERDICTS[verdict(needed, budget, held)],
        runtime_options=with_choice.to_proto(),
        roughness=found.rough,
    )


def check_cache_types(shape: Shape, options: LoadOptions) -> None:
    """Refuse the types of a cache that llama.cpp refuses for a model, as its worker would.

    Raises:
        InvalidFieldError: a type does not suit the heads of the model.
    """
    if not shape.has_memory:  # It keeps nothing, so that nobody looks at the types.
        return
    for layer in shape.layers:
        value_width = layer.attended_width // layer.heads if layer.heads else 0
        for letter, name, width in (
            ("k", options.cache_type_k, layer.head_width),
            ("v", options.cache_type_v, value_width),
        ):
            block = CACHE_TYPES[name].block_elements
            if width % block:
                field = f"{FIELD}.cache_type_{letter}"
                cause = f"{letter.upper()} cache type {name} with block size {block}"
                raise InvalidFieldError.of(
                    field,
                    f"does not suit this model: {cause} does not divide n_embd_head_{letter}={width}; "
                    "f16 suits every model",
                )


def devices(machine: Machine, manager: ModelManager) -> Iterable[pb.Device]:
    """Return the devices as `GetServerInfo` lists them."""
    budget, held = _budget(machine, manager), manager.memory_held()
    for device in machine.devices:
        name = device.name if device.description == device.name else f"{device.name}: {device.description}"
        yield pb.Device(
            display_name=name,
            total_bytes=device.total_bytes,
            free_bytes=device.free_bytes,
            budget_bytes=budget[device.name],
            held_bytes=held.get(device.name, 0),
        )


def _budget(machine: Machine, manager: ModelManager) -> Mapping[str, int]:
    """Return what models may have of each device: all of one that has no limit."""
    return {
        device.name: manager.memory_budget.get(device.name, device.total_bytes) for device in machine.devices
    }
