"""The stored arrays obey the algebra of a transformer, so that a mistaken array cannot pass for an oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from families import FAMILIES, Family

Array = NDArray[np.float32]
Block = dict[str, Array]

HERE = Path(__file__).parent
EPSILON = 0.01  # of every norm in the families
TOLERANCE = 2e-5
HIDDEN = -1e30  # scores below this are masked

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def load(family: Family) -> dict[str, Array]:
    with np.load(HERE / f"{family.name}.npz") as file:
        return dict(file)


def blocks(family: Family) -> Iterator[Block]:
    arrays = load(family)
    for layer in range(2):
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        if block:
            yield block


def close(left: Array, right: Array) -> bool:
    return left.shape == right.shape and bool(np.abs(left - right).max() < TOLERANCE)


def softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True), dtype=np.float32)


def root_mean_square(rows: Array) -> Array:
    return np.asarray(np.sqrt(np.square(rows).mean(-1, keepdims=True) + EPSILON), dtype=np.float32)


@every_family
def test_everything_is_float32_and_finite(family: Family) -> None:
    for array in load(family).values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


@every_family
def test_the_bridged_model_is_the_plain_one(family: Family) -> None:
    arrays = load(family)
    assert close(arrays.get("logits", arrays["hf_logits"]), arrays["hf_logits"])


@every_family
def test_attention_and_mlp_writes_add_up_to_the_stream(family: Family) -> None:
    for block in blocks(family):
        assert close(block["resid_pre"] + block["attn.out"] + block["mlp.out"], block["resid_post"])
        if "resid_mid" in block:
            assert close(block["resid_pre"] + block["attn.out"], block["resid_mid"])


@every_family
def test_patterns_are_causal_distributions_over_the_scores(family: Family) -> None:
    for block in blocks(family):
        pattern = block["attn.pattern"]
        assert np.abs(pattern.sum(-1) - 1).max() < TOLERANCE
        assert not np.triu(pattern, 1).any()
        if "attn.scores" in block:
            assert close(softmax(block["attn.scores"]), pattern)
            assert not pattern[block["attn.scores"] < HIDDEN].any()


@every_family
def test_z_is_the_pattern_applied_to_the_values(family: Family) -> None:
    for block in blocks(family):
        if "attn.z" not in block:
            continue
        groups = block["attn.z"].shape[1] // block["attn.v"].shape[1]
        values = np.repeat(block["attn.v"], groups, axis=1)
        assert close(np.einsum("hqk,khd->qhd", block["attn.pattern"], values), block["attn.z"])


@every_family
def test_heads_add_up_to_the_attention_output_but_for_its_bias(family: Family) -> None:
    for block in blocks(family):
        if "attn.result" not in block:
            continue
        bias = block.get("attn.out_raw", block["attn.out"]) - block["attn.result"].sum(1)
        assert close(bias, np.broadcast_to(bias[:1], bias.shape))


@every_family
def test_the_input_forks_are_the_stream_before_the_norm(family: Family) -> None:
    for block in blocks(family):
        for site in {"attn.in", "attn.q_input", "attn.k_input", "attn.v_input"} & block.keys():
            assert close(block[site], np.broadcast_to(block["resid_pre"][:, None], block[site].shape))
        if "mlp.in" in block:
            assert close(block["mlp.in"], block.get("resid_mid", block["resid_pre"]))


@every_family
def test_a_norm_divides_by_its_scale_with_epsilon_inside_the_root(family: Family) -> None:
    for block in blocks(family):
        for norm, source in {"ln1": "resid_pre", "ln2": "resid_mid"}.items():
            if f"{norm}.scale" not in block:
                continue
            rows, scale = block.get(source, block["resid_pre"]), block[f"{norm}.scale"]
            centred = rows - rows.mean(-1, keepdims=True)
            divided = [x for x in (rows, centred) if close(root_mean_square(x), scale)]
            assert len(divided) == 1, "root mean square of the rows or of the centred rows"
            assert close(divided[0] / scale, block[f"{norm}.normalized"])
        for norm, source in {"ln1_post": "attn.out_raw", "ln2_post": "mlp.out_raw"}.items():
            if f"{norm}.scale" in block:
                assert close(root_mean_square(block[source]), block[f"{norm}.scale"])
