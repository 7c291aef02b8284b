from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddock_server.worker.framing import MAX_FRAME_BYTES, FrameDecoder, FrameError, encode_frame
from paddock_server.worker.v1 import worker_pb2


@given(st.lists(st.integers(min_value=0, max_value=2**63)), st.integers(min_value=1, max_value=64))
def test_frames_survive_any_cutting_of_the_stream(numbers: list[int], piece: int) -> None:
    messages = [worker_pb2.ServerFrame(cancel=worker_pb2.Cancel(generation=number)) for number in numbers]
    stream = b"".join(encode_frame(message) for message in messages)
    decoder = FrameDecoder()
    bodies: list[bytes] = []
    for start in range(0, len(stream), piece):
        bodies += decoder.feed(memoryview(stream)[start : start + piece])
    assert [worker_pb2.ServerFrame.FromString(body) for body in bodies] == messages
    assert decoder.feed(encode_frame(worker_pb2.ServerFrame())) == [b""], "nothing is held back"


def test_an_unfinished_frame_is_held_until_its_last_byte() -> None:
    frame = encode_frame(worker_pb2.WorkerFrame(hello=worker_pb2.Hello(instance_id="abc", pid=7)))
    decoder = FrameDecoder()
    assert decoder.feed(frame[:-1]) == []
    assert decoder.feed(frame[-1:]) == [frame[4:]]


def test_an_empty_message_is_a_frame_too() -> None:
    assert FrameDecoder().feed(encode_frame(worker_pb2.WorkerFrame())) == [b""]


def test_a_frame_of_the_largest_size_is_announced_without_error_and_one_byte_more_is_refused() -> None:
    assert FrameDecoder().feed(struct.pack(">I", MAX_FRAME_BYTES)) == []
    with pytest.raises(FrameError, match="over the limit"):
        FrameDecoder().feed(struct.pack(">I", MAX_FRAME_BYTES + 1))


def test_a_message_too_long_for_a_frame_is_refused_when_it_is_encoded() -> None:
    hello = worker_pb2.Hello(instance_id="x" * (MAX_FRAME_BYTES + 1))
    with pytest.raises(FrameError, match="over the limit"):
        encode_frame(worker_pb2.WorkerFrame(hello=hello))
