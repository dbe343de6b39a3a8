"""Rows without an edit come out bit for bit as they went in, whatever is in them and whatever is next to them."""

from __future__ import annotations

import pytest
import torch

from interventions.running import CPU, model
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Intervention,
    Mean,
    Op,
    RowEdits,
    Scale,
    Target,
    Unit,
    Zero,
)
from patchclamp_server.interventions.plan import Plan, compile_batch
from patchclamp_server.positions import Positions

POINT, HEADS = HookPoint(Site.RESID_PRE, 0), HookPoint(Site.ATTN_Z, 0)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LENGTH = 4


def vector(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(0))


def planned(dtype: torch.dtype, *rows: list[Op], positions: Positions) -> Plan:
    edits = [RowEdits(tuple(Intervention(op, positions) for op in ops), LENGTH, LENGTH) for ops in rows]
    plan = compile_batch(edits, model().facts.site_info, device=CPU, dtype=dtype)
    plan.step(torch.arange(LENGTH).expand(len(rows), -1))
    return plan


def ops(target: Target, width: int) -> list[list[Op]]:
    return [
        [Add(target, vector(width))],
        [Ablate(target, vector(width))],
        [Add(target, vector(width), 1.0, Unit.NORM_FRACTION, keep_norm=True)],
        [Zero(target)],
        [Mean(target)],
        [Scale(target, vector(width), 2.0), Zero(target), Add(target, vector(width))],
    ]


def odd_values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Minus zero, infinities, NaN, numbers without a normal form, and others."""
    odd = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1e-42, 3.0, -7e4], dtype=torch.float64)
    return odd[torch.arange(torch.Size(shape).numel()) % 8].reshape(shape).to(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(BITS[found.dtype]), expected.contiguous().view(BITS[found.dtype]))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_rows_and_positions_without_an_edit_keep_their_bits(dtype: torch.dtype) -> None:
    for edits in ops(Target((POINT,)), 32):
        plan = planned(dtype, edits, [], edits, positions=Positions((1,)))
        value = odd_values(dtype, 3, LENGTH, 32)
        value[:, 1] = vector(32).to(dtype)
        new = plan.edits()[POINT](value)
        assert new.dtype == dtype
        assert same_bits(new[1], value[1])
        assert same_bits(new[:, [0, 2, 3]], value[:, [0, 2, 3]])


def test_heads_without_an_edit_keep_their_bits() -> None:
    for edits in ops(Target((HEADS,), (2,)), 8):
        plan = planned(torch.float32, edits, edits, positions=Positions())
        value = odd_values(torch.float32, 2, LENGTH, 4, 8)
        assert same_bits(plan.edits()[HEADS](value)[:, :, [0, 1, 3]], value[:, :, [0, 1, 3]])


def test_what_is_not_finite_in_one_row_stays_there() -> None:
    """The edited neighbours of a row with NaN get what they get beside any other row."""
    for edits in ops(Target((POINT,)), 32):
        plan = planned(torch.float32, edits, edits, positions=Positions())
        value = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
        broken = value.clone()
        broken[0] = float("nan")
        edit = plan.edits()[POINT]
        assert same_bits(edit(broken)[1], edit(value)[1])
        assert bool(torch.isfinite(edit(broken)[1]).all())


def test_an_infinite_entry_does_not_spread_by_an_addition() -> None:
    """Beside an update that reads, in the same phase, on the next row."""
    target = Target((POINT,))
    plan = planned(torch.float32, [Add(target, vector(32))], [Ablate(target, vector(32))], positions=Positions())
    value = torch.zeros(2, LENGTH, 32)
    value[0, :, 3] = float("inf")
    new = plan.edits()[POINT](value)
    expected = value[0] + vector(32)
    assert torch.equal(new[0], expected)


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    target = Target((POINT,))
    edits: list[Op] = [
        Add(target, vector(32), 0.37),
        Scale(target, vector(32), 1.3),
        Ablate(target, vector(32).flip(0)),
    ]
    value = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    half = planned(torch.bfloat16, edits, positions=Positions()).edits()[POINT](value)
    full = planned(torch.float32, edits, positions=Positions()).edits()[POINT](value.float())
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())
