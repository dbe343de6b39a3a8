"""Reads: what a caller may write, and what travels."""

from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from patchclamp import _reads
from patchclamp.v1 import read_pb2, tensor_pb2


def message(item: pc.Read, token_ids: dict[str, int] | None = None) -> read_pb2.Read:
    return _reads.to_message(item, "read", None, token_ids or {})


def vectors(item: pc.Read) -> list[Any]:
    """The vectors of a projection: arrays, or token ids."""
    return [
        np.frombuffer(source.tensor.inline, "<f4").reshape(source.tensor.shape)
        if source.HasField("tensor")
        else source.unembed_token
        for source in message(item, {" Austin": 9}).reduction.project.onto
    ]


def test_a_plain_read() -> None:
    sent = message(pc.read("blocks.3.attn.z", heads=[2, 0], positions=pc.LAST, dtype="bfloat16"))
    assert sent.hook_point.layer == 3
    assert list(sent.heads) == [2, 0]
    assert sent.dtype == tensor_pb2.DTYPE_BFLOAT16
    assert not sent.HasField("reduction")


def test_every_layer_is_no_layer() -> None:
    assert not message(pc.read("blocks.*.resid_post")).hook_point.HasField("layer")
    assert message(pc.read("blocks.0.resid_post")).hook_point.HasField("layer")


@pytest.mark.parametrize("reduce", ["last", "mean", "norm", "moments"])
def test_reductions_without_arguments(reduce: Any) -> None:
    assert message(pc.read("resid_post", reduce=reduce)).reduction.WhichOneof("kind") == reduce


def test_ranked_reductions() -> None:
    assert message(pc.read("mlp.post", reduce="topk", k=7, by_magnitude=True)).reduction.top_k == (
        read_pb2.TopKReduction(k=7, by_magnitude=True)
    )
    assert message(pc.read("mlp.post", reduce="topk")).reduction.top_k.k == 5
    assert message(pc.read("resid_post", reduce="logit_lens", k=3)).reduction.logit_lens.k == 3


@pytest.mark.parametrize(
    ("onto", "shapes"),
    [
        (np.ones(4), [(4,)]),
        (np.ones((3, 4), np.float16), [(3, 4)]),
        ([1, 2, 3], [(3,)]),
        ([[1, 2], [3, 4]], [(2,), (2,)]),
        ([np.ones(4), np.ones((2, 4))], [(4,), (2, 4)]),
    ],
)
def test_projections_onto_arrays(onto: Any, shapes: list[tuple[int, ...]]) -> None:
    assert [vector.shape for vector in vectors(pc.read("resid_post", reduce="project", onto=onto))] == shapes


def test_projections_onto_unembeddings() -> None:
    onto: list[Any] = [pc.unembed(" Austin"), pc.unembed(np.int64(4)), np.arange(3)]
    first, second, third = vectors(pc.read("resid_post", reduce="project", onto=onto))
    assert (first, second) == (9, 4)
    np.testing.assert_array_equal(third, [0, 1, 2])


def test_projections_onto_vectors_that_the_server_has() -> None:
    handle = pc.Handle("replicas/r0/handles/abc", "embed", (4,), "float32", 16)
    onto: list[Any] = ["refusal", pc.decoder(1, 2), handle, np.ones((2, 4))]
    sent = message(pc.read("resid_post", reduce="project", onto=onto)).reduction.project.onto
    assert [source.WhichOneof("source") for source in sent] == ["direction", "decoder", "handle", "tensor"]
    (alone,) = message(pc.read("resid_post", reduce="project", onto="refusal")).reduction.project.onto
    assert alone.direction == "refusal"


def test_vectors_are_copied_when_given() -> None:
    direction = np.ones(3)
    item = pc.read("resid_post", reduce="project", onto=direction)
    direction[:] = 7
    np.testing.assert_array_equal(vectors(item)[0], [1, 1, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": "max"}, "reduce: 'max' is not one of last, mean"),
        ({"k": 3}, "k: belongs to"),
        ({"reduce": "norm", "k": 3}, "k: belongs to"),
        ({"reduce": "topk", "k": 0}, "k: 0 is not"),
        ({"reduce": "project"}, "onto: belongs to"),
        ({"onto": [1.0]}, "onto: belongs to"),
        ({"reduce": "project", "onto": np.ones((1, 2, 3))}, "onto: an array of shape"),
        ({"reduce": "project", "onto": []}, "onto: an array of shape"),
        ({"reduce": "project", "onto": [np.inf]}, "not finite"),
        ({"reduce": "norm", "by_magnitude": True}, "by_magnitude: belongs to"),
        ({"heads": [1, 1]}, "heads: a head is there twice"),
        ({"heads": [-1]}, "heads: -1 is no head"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of float32"),
        ({"positions": []}, "positions: an empty list"),
    ],
)
def test_refuses_at_once(options: Any, words: str) -> None:
    with pytest.raises(pc.InvalidArgument) as caught:
        pc.read("resid_post", **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"heads": "0"}, {"heads": [0.5]}, {"heads": [True]}, {"reduce": "project", "onto": [None]}, {"positions": 1.5}],
)
def test_refuses_types(options: Any) -> None:
    with pytest.raises(TypeError):
        pc.read("attn.z", **options)


def test_unembed_takes_ids_and_text() -> None:
    assert repr(pc.unembed(" Austin")) == "pc.unembed(' Austin')"
    with pytest.raises(pc.InvalidArgument):
        pc.unembed(-1)
    with pytest.raises(pc.InvalidArgument):
        pc.unembed("")
    with pytest.raises(TypeError):
        pc.unembed(1.5)  # type: ignore[arg-type]


def test_repr_is_what_one_types() -> None:
    assert repr(pc.read("hook_embed")) == "pc.read('embed')"
    assert repr(pc.read("blocks.3.attn.hook_pattern", heads=1, positions=pc.at("x"), reduce="topk")) == (
        "pc.read('blocks.3.attn.pattern', positions=pc.at('x'), heads=[1], reduce='topk', k=5)"
    )
