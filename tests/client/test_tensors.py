"""Tensors off the wire: every chunk in its place, and nothing that does not add up."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchclamp as pc
from client.stand_in import inline, streamed
from patchclamp._tensors import IncomingTensor, TensorAssembler, encode
from patchclamp.v1 import tensor_pb2 as pb

VALUES = np.arange(60, dtype=np.float32).reshape(3, 20)


def test_inline() -> None:
    array = IncomingTensor(inline(VALUES)).array()
    np.testing.assert_array_equal(array, VALUES)
    assert array.flags.writeable and array.flags.c_contiguous


def test_a_request_tensor_comes_back() -> None:
    np.testing.assert_array_equal(IncomingTensor(encode(VALUES)).array(), VALUES)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4), piece=st.integers(1, 64), data=st.data())
def test_interleaved_tensors_arrive_whole(sizes: list[int], piece: int, data: st.DataObject) -> None:
    arrays = [np.random.default_rng(size).standard_normal(size, np.float32) for size in sizes]
    assembler = TensorAssembler()
    headers, queues = zip(*(streamed(array, number, piece) for number, array in enumerate(arrays)), strict=True)
    tensors = [assembler.open(header) for header in headers]
    while any(queues):
        queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
        assembler.add(queue.pop(0))
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.array(), array)


def test_narrow_floats_become_float32() -> None:
    exact = np.array([1.0, -2.5, 0.15625, np.inf, -np.inf], np.float32)
    upper_halves = (exact.view(np.uint32) >> 16).astype("<u2")
    brain = pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[5], inline=upper_halves.tobytes())
    half = pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=[5], inline=exact.astype("<f2").tobytes())
    for header in (brain, half):
        array = IncomingTensor(header).array()
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, exact)


def test_integers_stay() -> None:
    assert IncomingTensor(inline(np.array([[1, -2]], np.int32))).array().dtype == np.int32


def test_empty_and_scalar() -> None:
    assert IncomingTensor(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[0, 4], inline=b"")).array().shape == (0, 4)
    assert IncomingTensor(inline(np.array(3, np.float32))).array() == 3


def assembled(change: Callable[[list[pb.TensorChunk]], None]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The values, after their chunks were tampered with."""
    header, chunks = streamed(VALUES, 5, 100)
    change(chunks)
    assembler = TensorAssembler()
    tensor = assembler.open(header)
    for chunk in chunks:
        assembler.add(chunk)
    return tensor.array()


def swap(chunks: list[pb.TensorChunk]) -> None:
    chunks[0], chunks[1] = chunks[1], chunks[0]


def repeat(chunks: list[pb.TensorChunk]) -> None:
    chunks.insert(1, chunks[0])


def flip(chunks: list[pb.TensorChunk]) -> None:
    chunks[1].data = chunks[1].data[:-1] + bytes([chunks[1].data[-1] ^ 1])


def drop_last(chunks: list[pb.TensorChunk]) -> None:
    del chunks[-1]


def unsign(chunks: list[pb.TensorChunk]) -> None:
    chunks[-1].ClearField("crc32")


def overlong(chunks: list[pb.TensorChunk]) -> None:
    chunks[-1].data += b"x"


def one_too_many(chunks: list[pb.TensorChunk]) -> None:
    chunks.append(pb.TensorChunk(tensor_id=5, offset=240, data=b"x"))


def renumber(chunks: list[pb.TensorChunk]) -> None:
    chunks[1].tensor_id = 6


def empty(chunks: list[pb.TensorChunk]) -> None:
    chunks.insert(1, pb.TensorChunk(tensor_id=5, offset=100))


@pytest.mark.parametrize("change", [swap, repeat, flip, drop_last, unsign, overlong, one_too_many, renumber, empty])
def test_damage_is_seen(change: Callable[[list[pb.TensorChunk]], None]) -> None:
    with pytest.raises(pc.Internal, match="damaged") as caught:
        assembled(change)
    assert caught.value.reason == "DATA_LOSS"


@pytest.mark.parametrize(
    "header",
    [
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], inline=b"1234567"),
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[-1, -2], inline=b"12345678"),
        pb.Tensor(dtype=pb.DTYPE_UNSPECIFIED, shape=[1], inline=b"1234"),
        pb.Tensor(dtype=99, shape=[1], inline=b"1234"),  # type: ignore[arg-type]
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1], byte_order=2, inline=b"1234"),  # type: ignore[arg-type]
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2]),
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], streamed=pb.StreamedContent(total_bytes=9)),
    ],
)
def test_headers_that_lie_are_refused(header: pb.Tensor) -> None:
    with pytest.raises(pc.Internal, match="damaged"):
        IncomingTensor(header)


def test_numbers_are_unique() -> None:
    assembler = TensorAssembler()
    assembler.open(streamed(VALUES, 5, 100)[0])
    with pytest.raises(pc.Internal, match="two tensors of number 5"):
        assembler.open(streamed(VALUES, 5, 100)[0])
