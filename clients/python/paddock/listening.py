"""Addresses that servers listen on, and what is said of one that cannot be listened on: the same by all."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Front:
    """A way in: what it is called, and the flags that say where it listens."""

    name: str
    host_flag: str
    port_flag: str


GRPC: Final = Front("gRPC", "--grpc-host", "--grpc-port")
HTTP: Final = Front("HTTP", "--host", "--port")


@dataclass(frozen=True, slots=True)
class ListenFault:
    """Why an address cannot be listened on (the end of a sentence), and what to do about it (a sentence)."""

    reason: str
    advice: str


def listen_fault(front: Front, error: Exception) -> ListenFault:
    """Return what an attempt to listen has ended with; the error is a UnicodeError for a malformed name."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, socket.gaierror):
        reason = error.strerror or str(error)
    else:
        # `socket.create_server` writes the address into the text once more.
        reason = os.strerror(number) if number else str(error)
    if number == errno.EADDRINUSE:
        return ListenFault(
            "another program has the port", f"Stop it, or choose another with {front.port_flag}."
        )
    if number in {errno.EACCES, errno.EPERM}:
        return ListenFault(reason, f"Choose another port with {front.port_flag}.")
    if number == errno.EADDRNOTAVAIL:
        reason = "this machine has no such address"
    elif not isinstance(error, socket.gaierror | UnicodeError):
        return ListenFault(reason, f"Choose another address with {front.host_flag} and {front.port_flag}.")
    return ListenFault(reason, f"Choose another address with {front.host_flag}.")


def cannot_listen(front: Front, host: str, port: int, error: Exception) -> str:
    """Return the sentences for whoever started a server that cannot listen where it was told to."""
    fault = listen_fault(front, error)
    return f"Cannot listen for {front.name} on {host_port(host, port)}: {fault.reason}. {fault.advice}"


def bind_error(host: str, port: int) -> OSError | UnicodeError | None:
    """Try an address as a server would. Return what it ends with; None when it can be listened on.

    A name is looked up, which may take long.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as listener:
            # As servers do: connections that are being wound up do not keep an address.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        return error
    return None


def host_port(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
