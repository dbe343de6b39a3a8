"""Vectors: what a caller may write, and what travels."""

from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from patchclamp import _vectors
from patchclamp._handles import Handle
from patchclamp._tensors import IncomingTensor
from patchclamp.v1 import vector_pb2

HANDLE = Handle("replicas/r0/handles/abc", "blocks.2.resid_post", (8, 4), "bfloat16", 64)


def message(given: Any, **options: bool) -> vector_pb2.VectorSource:
    return _vectors.to_message(_vectors.vector(given, "vector", **options), {" Austin": 9})


def array(given: Any, **options: bool) -> Any:
    return IncomingTensor(message(given, **options).tensor).array()


class TorchLike:
    """What the SDK uses of a torch tensor: on a device, with a gradient, in a type that numpy lacks."""

    def __init__(self, values: Any, *, floating: bool = True) -> None:
        self._values, self._floating, self._steps = np.asarray(values), floating, [""]

    def __getattr__(self, name: str) -> Any:
        if name in ("detach", "cpu", "float"):
            self._steps.append(name)
            return lambda: self
        raise AttributeError(name)

    def is_floating_point(self) -> bool:
        return self._floating

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        assert {"detach", "cpu"} <= set(self._steps), "numpy cannot take it from there"
        assert ("float" in self._steps) == self._floating
        return self._values


@pytest.mark.parametrize(
    "given", [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], np.float16)]
)
def test_numbers_travel_as_float32(given: Any) -> None:
    sent = array(given)
    assert sent.dtype == np.float32
    np.testing.assert_array_equal(sent, [1, 2, 3])


def test_float64_loses_digits() -> None:
    np.testing.assert_array_equal(array([0.1]), np.array([0.1], np.float32))


@pytest.mark.parametrize("floating", [True, False])
def test_torch_tensors_leave_device_and_gradient(floating: bool) -> None:
    np.testing.assert_array_equal(array(TorchLike([1.0, 2.0], floating=floating)), [1, 2])


def test_slices_of_a_matrix_and_results_of_reads_are_vectors() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(array(matrix[:, 1]), [1, 5, 9])
    np.testing.assert_array_equal(array(pc.Activation.of(matrix, "embed")[2]), [8, 9, 10, 11])


def test_one_row_is_one_vector_and_stacks_are_taken_where_they_span() -> None:
    assert array(np.ones((1, 4))).shape == (1, 4)
    assert array(np.ones((3, 4)), stack=True).shape == (3, 4)
    with pytest.raises(pc.InvalidArgument, match=r"^vector: 3 vectors \(an array of shape \(3, 4\)\); give one"):
        message(np.ones((3, 4)))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("refusal", vector_pb2.VectorSource(direction="refusal")),
        ("directions/refusal", vector_pb2.VectorSource(direction="directions/refusal")),
        (HANDLE, vector_pb2.VectorSource(handle=HANDLE.name)),
        (HANDLE.name, vector_pb2.VectorSource(handle=HANDLE.name)),
        (pc.unembed(7), vector_pb2.VectorSource(unembed_token=7)),
        (pc.unembed(" Austin"), vector_pb2.VectorSource(unembed_token=9)),
        (pc.decoder(3, 17), vector_pb2.VectorSource(decoder=vector_pb2.FeatureRow(layer=3, feature=17))),
        (
            pc.encoder(np.int64(0), 1, transcoder="skip"),
            vector_pb2.VectorSource(encoder=vector_pb2.FeatureRow(transcoder="skip", layer=0, feature=1)),
        ),
    ],
)
def test_vectors_that_the_server_has(given: Any, sent: vector_pb2.VectorSource) -> None:
    assert message(given) == sent
    assert message(given, stack=True) == sent


def test_vectors_are_values() -> None:
    direction = np.ones(4)
    kept = _vectors.vector(direction, "vector")
    direction[:] = 7
    assert kept == _vectors.vector([1, 1, 1, 1], "vector")
    assert hash(kept) == hash(_vectors.vector([1, 1, 1, 1], "vector"))
    assert kept != _vectors.vector([[1, 1, 1, 1]], "vector") and kept != _vectors.vector([1, 1, 1, 2], "vector")
    assert repr(kept) == "<float32 [4]>"
    assert pc.decoder(3, 17) == pc.decoder(3, 17) != pc.encoder(3, 17)
    assert repr([pc.decoder(3, 17), pc.encoder(0, 1, transcoder="a")]) == (
        "[pc.decoder(3, 17), pc.encoder(0, 1, transcoder='a')]"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((1, 2, 3)), r"an array of shape \(1, 2, 3\); what fits is \[d\] or \[n, d\]"),
        (3.0, r"an array of shape \(\)"),
        ([], r"an array of shape \(0,\)"),
        ([1.0, np.nan], "holds values that are not finite"),
        ([1e300], "holds values that are not finite in float32"),
        ("", "empty text is no direction's name"),
        ("\ud800", "character 0 is half a surrogate pair"),
    ],
)
def test_refuses_at_once(given: Any, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=f"^vector: {words}"):
        message(given)


@pytest.mark.parametrize("given", [None, object(), [[1], [1, 2]], ["1", "2"], [True, False], [1j], {"a": 1}, b"abc"])
def test_what_is_no_vector_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^vector is made of arrays of numbers"):
        message(given)


def test_more_than_a_request_takes_is_too_large() -> None:
    assert array(np.ones(1 << 18)).nbytes == 1 << 20
    with pytest.raises(pc.TooLarge, match=r"^vector: an array of shape \(512, 513\) is 1,050,624 bytes") as caught:
        message(np.ones((512, 513)), stack=True)
    assert (caught.value.limit, caught.value.demand) == (1 << 20, 1_050_624)


@pytest.mark.parametrize("feature", [True, "3", 1.0, None])
def test_features_are_indices(feature: Any) -> None:
    with pytest.raises(TypeError, match=r"^feature is the index of a feature"):
        pc.decoder(0, feature)


def test_features_count_from_zero() -> None:
    with pytest.raises(pc.InvalidArgument, match=r"^layer: -1 is no layer: layers count from 0"):
        pc.encoder(-1, 0)
    with pytest.raises(TypeError, match=r"^transcoder is the name"):
        pc.encoder(0, 0, transcoder=3)  # type: ignore[arg-type]
