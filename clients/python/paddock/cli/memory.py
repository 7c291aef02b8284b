"""`paddock estimate`: what a model would take in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from paddock.cli import output
from paddock.cli.output import note, write_json
from paddock.cli.session import DEFAULT_SERVER, MOST, JsonOption, ModelArgument, ServerOption, call
from paddock.sizes import size_text
from paddock.types import MemoryVerdict, RuntimeOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paddock.client import Client
    from paddock.types import MemoryEstimate, Model

CacheTypeOption = Annotated[str | None, typer.Option(help="For example f16 or q8_0.")]

ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        "-c",
        min=0,
        max=MOST,
        help=(
            "Tokens the KV cache holds, shared by all sequences; 0: as trained, or the most that fits. "
            "Left out: what is configured, the server's no more than sequences can use."
        ),
    ),
]

RAM: Final = "RAM"
"""The main memory among the devices."""

_VERDICTS: Final[Mapping[MemoryVerdict, str]] = {
    MemoryVerdict.FITS: "It fits now.",
    MemoryVerdict.FITS_AFTER_EVICTION: "It fits once other models have been unloaded.",
    MemoryVerdict.NEVER_FITS: "It does not fit, whatever is unloaded.",
    MemoryVerdict.UNKNOWN: "The server says whether it fits in a way this client does not know.",
}


def estimate(
    model: ModelArgument,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    ctx_size: ContextOption = None,
    parallel: Annotated[int | None, typer.Option(min=1, max=MOST, help="Sequences decoded at once.")] = None,
    n_gpu_layers: Annotated[
        int | None, typer.Option(min=-1, max=MOST, help="Layers on the accelerator; -1: all.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, max=MOST, help="Most tokens decoded in one step."),
    ] = None,
    cache_type_k: CacheTypeOption = None,
    cache_type_v: CacheTypeOption = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=16, help="Worker processes that serve it.")
    ] = None,
) -> None:
    """Say what a model would take in memory, without loading it, whether it fits, and who holds what."""
    options = RuntimeOptions(
        context_size_tokens=ctx_size,
        slot_count=parallel,
        gpu_layer_count=n_gpu_layers,
        batch_size_tokens=batch_size,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        replica_count=replicas,
    )

    async def work(client: Client) -> tuple[MemoryEstimate, Sequence[Model]]:
        return await client.estimate(model, options=options), () if as_json else await client.list()

    found, models = call(server, work)
    if as_json:
        write_json(found, indent=2)
        return
    others = [other for other in models if model not in {other.id, f"hf:{other.id}", *other.aliases}]
    rows = _rows(found, others)
    output.show_table(("DEVICE", "FOR", "MEMORY"), rows, wide=True)
    chosen = found.options
    count = chosen.replica_count or 1
    note(
        f"With {chosen.context_size_tokens or 'the trained number of'} tokens of context "
        f"for {chosen.slot_count} sequences{f' in each of {count} replicas' if count > 1 else ''}. "
        f"{_VERDICTS[found.verdict]}"
    )
    measured = ", ".join(device.device for device in found.devices if device.measured)
    if measured:
        note(f"{measured}: measured when the model was loaded so before; its parts are as estimated.")
    if found.roughness:
        note(found.roughness)


def _rows(found: MemoryEstimate, others: Sequence[Model]) -> list[tuple[str, str, str]]:
    """Return the parts of the estimate, device by device, and what other models hold of it."""
    rows: list[tuple[str, str, str]] = []
    for device in found.devices:
        name = device.device
        rows += [
            (name, part.kind.replace("_", " "), size_text(part.size_bytes))
            for part in found.parts
            if part.device == name
        ]
        total = f"{size_text(device.needed_bytes)} of {size_text(device.budget_bytes)}"
        rows.append((name, "all, measured" if device.measured else "all", total))
        holders = [(other.id, _held_bytes(other, name)) for other in others]
        rows += [(name, f"held by {id_}", size_text(held)) for id_, held in holders if held]
        free = max(device.budget_bytes - device.held_bytes, 0)
        rows.append((name, "free now", size_text(free)))
    return rows


def _held_bytes(model: Model, device: str) -> int:
    """Return what a model holds of a device: what it is charged with, else what its process has resident."""
    if model.memory is not None and model.memory.bytes:
        return model.memory.bytes.get(device, 0)
    return model.worker.resident_bytes if model.worker is not None and device == RAM else 0
