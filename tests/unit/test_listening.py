"""What is said of an address that cannot be listened on."""

from __future__ import annotations

import errno
import socket

import pytest

from paddock.listening import GRPC, HTTP, bind_error, cannot_listen, host_port


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EADDRINUSE, "Address already in use"),
            "another program has the port. Stop it, or choose another with --grpc-port.",
        ),
        (
            OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"),
            "this machine has no such address. Choose another address with --grpc-host.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied (while attempting to bind)"),
            "Permission denied. Choose another port with --grpc-port.",
        ),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known. Choose another address with --grpc-host.",
        ),
        (UnicodeError("label empty"), "label empty. Choose another address with --grpc-host."),
        (
            OSError(errno.ENOBUFS, "No buffer space available"),
            "No buffer space available. Choose another address with --grpc-host and --grpc-port.",
        ),
    ],
    ids=["taken", "not ours", "privileged", "unknown name", "malformed name", "anything else"],
)
def test_each_fault_is_said_with_the_flag_that_helps(error: Exception, said: str) -> None:
    assert cannot_listen(GRPC, "h", 1, error) == f"Cannot listen for gRPC on h:1: {said}"


def test_an_address_is_tried_as_a_server_would() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = bind_error("127.0.0.1", port)
    assert isinstance(taken, OSError)
    assert taken.errno == errno.EADDRINUSE
    assert bind_error("127.0.0.1", port) is None
    assert isinstance(bind_error("a..b", 0), UnicodeError)
    elsewhere = bind_error("203.0.113.1", 0)
    assert isinstance(elsewhere, OSError)
    assert elsewhere.errno == errno.EADDRNOTAVAIL


def test_an_address_of_ipv6_has_brackets() -> None:
    assert host_port("::1", 1) == "[::1]:1"
    assert cannot_listen(HTTP, "::1", 1, OSError(errno.EADDRINUSE, "")).startswith(
        "Cannot listen for HTTP on [::1]:1: another program has the port."
    )
