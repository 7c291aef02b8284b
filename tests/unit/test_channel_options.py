"""What a client asks of a connection is what the server allows."""

from __future__ import annotations

import pytest

from paddock.transport import CHANNEL_OPTIONS
from paddock_server.rpc.server import _OPTIONS

CLIENT = dict(CHANNEL_OPTIONS)
SERVER = dict(_OPTIONS)


@pytest.mark.parametrize(
    ("larger", "smaller"),
    [
        (
            CLIENT["grpc.keepalive_time_ms"],
            SERVER["grpc.http2.min_recv_ping_interval_without_data_ms"],
        ),
        (CLIENT["grpc.max_receive_message_length"], SERVER["grpc.max_send_message_length"]),
        (SERVER["grpc.max_receive_message_length"], CLIENT["grpc.max_send_message_length"]),
        (SERVER["grpc.keepalive_permit_without_calls"], CLIENT["grpc.keepalive_permit_without_calls"]),
    ],
    ids=["ping interval", "response size", "request size", "pings without calls"],
)
def test_client_and_server_options_fit_each_other(larger: str | int, smaller: str | int) -> None:
    assert int(larger) >= int(smaller)
