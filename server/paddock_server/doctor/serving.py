"""What is said of the addresses a server would have, and of one that runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from paddock.listening import Front, ListenFault
from paddock.sizes import size_text
from paddock_server.doctor.findings import NAMED_MODELS, Finding, counted, ok, problem, warning


class Answer(StrEnum):
    """Who is at a port."""

    NOBODY = "nobody"
    PADDOCK = "paddock"
    OTHER = "other"
    """Something answers, and not as Paddock does."""


@dataclass(frozen=True, slots=True)
class Port:
    """An address of ours, and who is there."""

    front: Front
    address: str
    answer: Answer
    version: str = ""
    """Of a Paddock that says it."""
    fault: ListenFault | None = None
    """Why it cannot be listened on, although nobody answers there."""


def judge_port(port: Port) -> Finding:
    """Judge an address a server would listen on."""
    name = f"{port.front.name} {port.address}"
    if port.fault is not None:
        return problem("ports", f"{name} cannot be listened on: {port.fault.reason}", port.fault.advice)
    match port.answer:
        case Answer.NOBODY:
            return ok("ports", f"{name} is free")
        case Answer.PADDOCK:
            return ok("ports", f"{name}: {f'Paddock {port.version}'.strip()} answers")
        case Answer.OTHER:
            message = f"{name} is taken by something that does not answer as Paddock does"
            advice = f"Stop it, or choose another with {port.front.port_flag}."
            return problem("ports", message, advice)


def judge_same_port(grpc_port: int, http_port: int) -> list[Finding]:
    """Judge the two ports beside each other; 0 takes a free one."""
    if grpc_port != http_port or not grpc_port:
        return []
    message = f"gRPC and HTTP are both to listen on port {grpc_port}"
    return [problem("ports", message, "Choose another with --port or --grpc-port.")]


def judge_exposure(hosts: Mapping[str, str]) -> list[Finding]:
    """Judge the addresses, by purpose, that other machines reach: nobody is asked for a key yet."""
    return [
        warning(
            "ports",
            f"{purpose} listens on {host}: whoever reaches it can use the server",
            "Listen on 127.0.0.1, or put something that checks its users before it.",
        )
        for purpose, host in hosts.items()
    ]


AREA = "server"


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No server of ours is at an address."""

    address: str
    why: str


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answered."""

    address: str
    version: str
    uptime_seconds: float
    serving: bool | None
    """What its health service says; None when that does not answer."""
    loaded: int | None
    """Models; None when it does not list them."""
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why models have failed, by id."""
    restarts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Workers that were replaced, by model; those above 0."""
    memory: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Bytes that models hold and may have, by device."""


def judge_unanswered(server: Unanswered, *, asked_for: bool) -> list[Finding]:
    """Judge that no server answers: as it should be before the first start, unless somebody named it."""
    if not asked_for:
        return [ok(AREA, f"none answers at {server.address}")]
    advice = "Start it with `paddock up`, or name another with --server."
    return [problem(AREA, f"no Paddock answers at {server.address}: {server.why}", advice)]


def judge_running(running: Running, own_version: str) -> list[Finding]:
    """Judge a running server."""
    minutes = int(running.uptime_seconds // 60)
    loaded = "" if running.loaded is None else f", {counted(running.loaded, 'model')} loaded"
    found = [ok(AREA, f"{running.address}: Paddock {running.version}, up {minutes} min{loaded}")]
    found += [
        ok(AREA, f"models hold {size_text(held)} of the {size_text(budget)} they may have of {device}")
        for device, (held, budget) in running.memory.items()
    ]
    if running.serving is None:
        advice = "Ask again; if it stays so, look into its log, and restart it."
        found.append(warning(AREA, "its health service does not answer", advice))
    elif not running.serving:
        found.append(warning(AREA, "it is not serving: it is stopping", "Start it again with `paddock up`."))
    if running.loaded is None:
        advice = "Ask again; if it stays so, look into its log, and restart it."
        found.append(warning(AREA, "it does not list its models", advice))
    if running.version != own_version:
        message = f"it is version {running.version}, this program {own_version}"
        found.append(warning(AREA, message, "Upgrade the older one; a server has to be restarted after it."))
    return [*found, *_failed(running.failed), *_restarted(running.restarts)]


def _failed(failed: Mapping[str, str]) -> list[Finding]:
    found = [
        warning(AREA, f"model {model!r} failed: {why}", f"`paddock show {model}` shows more.")
        for model, why in sorted(failed.items())[:NAMED_MODELS]
    ]
    return [*found, *_rest(failed, "models have failed")]


def _restarted(restarts: Mapping[str, int]) -> list[Finding]:
    found = [
        warning(
            AREA,
            f"the worker of {model!r} was restarted {counted(count, 'time')}",
            f"`paddock logs {model}` shows why.",
        )
        for model, count in sorted(restarts.items())[:NAMED_MODELS]
    ]
    return [*found, *_rest(restarts, "workers were restarted")]


def _rest(models: Mapping[str, object], what: str) -> list[Finding]:
    rest = len(models) - NAMED_MODELS
    return [warning(AREA, f"{rest} more {what}", "`paddock ls --wide` shows them all.")] if rest > 0 else []
