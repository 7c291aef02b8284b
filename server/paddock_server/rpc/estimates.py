"""`EstimateMemory` and the devices of `GetServerInfo`: what the memory package says, as messages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from paddock.v1 import model_manager_pb2 as pb
from paddock_server.memory import (
    RAM,
    LoadOptions,
    Machine,
    PartKind,
    Shape,
    Verdict,
    chosen,
    estimate,
    model_shape,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
        PaddockError: there is no such model, or its file cannot be loaded.
    """
    load = pb.LoadRequest(
        model=request.model,
        source=request.source if request.HasField("source") else None,
        runtime_options=request.runtime_options,
    )
    entry, options = await manager.would_load(load)
    machine = await watch.look()
    models, _ = manager.snapshots()
    # What loaded models have is known of the machine's own memory alone.
    held = {RAM: sum(model.worker.resident_bytes for model in models if model.id != entry.id)}
    own = sum(model.worker.resident_bytes for model in models if model.id == entry.id)
    budget = {device.name: device.free_bytes + held.get(device.name, 0) for device in machine.devices}
    budget[RAM] = min(budget[RAM] + own, machine.devices[0].total_bytes)
    keeps_slots = request.runtime_options.HasField("slot_count")
    return await asyncio.to_thread(_response, entry, options, machine, budget, held, keeps_slots=keeps_slots)


def _response(
    entry: CatalogEntry,
    options: Options,
    machine: Machine,
    budget: Mapping[str, int],
    held: Mapping[str, int],
    *,
    keeps_slots: bool,
) -> pb.EstimateMemoryResponse:
    shape = _shape(entry)
    asked = LoadOptions(
        context_size_tokens=options.context_size_tokens,
        slot_count=options.slot_count,
        batch_size_tokens=options.batch_size_tokens,
        gpu_layer_count=options.gpu_layer_count,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
    )
    placement = machine.placement
    taken = chosen(shape, asked, placement, budget, keeps_slots=keeps_slots)
    found = estimate(shape, taken, placement)
    needed = found.totals
    with_choice = replace(options, context_size_tokens=taken.context_size_tokens, slot_count=taken.slot_count)
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
            )
            for device in machine.devices
        ],
        verdict=VERDICTS[verdict(needed, budget, held)],
        runtime_options=with_choice.to_proto(),
        roughness=found.rough,
    )


def _shape(entry: CatalogEntry) -> Shape:
    """Return the shape of a model that has no problem; looks up the size of the projector beside it."""
    if entry.facts is None:
        message = f"{entry.id!r} has no facts, and no problem either"
        raise ValueError(message)
    projector = 0
    if entry.mmproj_path is not None and entry.mmproj_path.exists():
        projector = entry.mmproj_path.stat().st_size
    return model_shape(entry.facts, projector_bytes=projector)


def devices(machine: Machine) -> Iterable[pb.Device]:
    """Return the devices as `GetServerInfo` lists them."""
    for device in machine.devices:
        name = device.name if device.description == device.name else f"{device.name}: {device.description}"
        yield pb.Device(display_name=name, total_bytes=device.total_bytes, free_bytes=device.free_bytes)
