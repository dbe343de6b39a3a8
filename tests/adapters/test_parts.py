"""The arithmetic of heads and norms, on tensors whose every entry is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patchclamp_server.adapters.heads import HeadCounts, HeadView
from patchclamp_server.adapters.norms import fit, is_norm
from patchclamp_server.adapters.recording import Call

# Six query heads on two key/value heads of width four.
COUNTS = HeadCounts(n_heads=6, n_kv_heads=2, d_head=4)
HEADS = (6, 2, 2)


def tagged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [1, 3, head, 4] of which no two entries are equal."""
    entries = torch.arange(3 * 10 * 4).reshape(1, 3, 10, 4)
    queries, keys, values = entries.split([6, 2, 2], dim=2)
    return queries, keys, values


def contiguous() -> torch.Tensor:
    return torch.cat([part.flatten(-2) for part in tagged()], dim=-1)


def grouped() -> torch.Tensor:
    """For each key/value head: its three queries, its key, its value."""
    queries, keys, values = tagged()
    groups = [
        torch.cat([queries[:, :, 3 * i : 3 * i + 3], keys[:, :, i : i + 1], values[:, :, i : i + 1]], dim=2)
        for i in range(2)
    ]
    return torch.cat(groups, dim=2).flatten(-2)


def view(part: int, *, by_group: bool) -> HeadView:
    return HeadView(nn.Identity(), HEADS[part], part, by_group, COUNTS)


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_fused_projection_is_divided_into_its_heads(part: int, by_group: bool) -> None:
    fused = grouped() if by_group else contiguous()
    assert torch.equal(view(part, by_group=by_group).read(fused), tagged()[part])


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_a_fused_projection_is_replaced_and_no_other(part: int, by_group: bool) -> None:
    fused = grouped() if by_group else contiguous()
    new = -tagged()[part] - 1
    written = view(part, by_group=by_group).write(fused, new)
    for other in range(3):
        expected = new if other == part else tagged()[other]
        assert torch.equal(view(other, by_group=by_group).read(written), expected)


def test_with_one_key_value_head_both_layouts_agree() -> None:
    counts = HeadCounts(4, 1, 8)
    fused = torch.randn(2, 5, 48)
    for part, heads in enumerate((4, 1, 1)):
        one, other = (HeadView(nn.Identity(), heads, part, flag, counts) for flag in (False, True))
        assert torch.equal(one.read(fused), other.read(fused))


class OffsetNorm(nn.Module):
    """An RMSNorm that stores its weight less one, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.01
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(6, eps=0.01)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def rms_norm() -> nn.Module:
    norm = nn.RMSNorm(6, eps=0.01)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("make", [layer_norm, rms_norm, OffsetNorm])
@torch.no_grad()
def test_the_form_of_a_norm_is_found_from_one_call(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, given = make(), torch.randn(2, 3, 6) + 1
    norm = fit(Call(module, given, module(given)))
    assert norm is not None
    assert is_norm(module)
    assert (norm.centre, norm.offset) == (make is layer_norm, float(make is OffsetNorm))
    # Of numbers below five, through a root and a product.
    torch.testing.assert_close(norm.output(norm.normalized(given)), module(given), rtol=0, atol=2e-6)
    centred = given - given.mean(-1, keepdim=True) if norm.centre else given
    torch.testing.assert_close(norm.normalized(given) * norm.scale(given), centred, rtol=0, atol=2e-6)


@torch.no_grad()
def test_dividing_by_another_scale_multiplies_all_but_the_bias() -> None:
    torch.manual_seed(0)
    module, given = layer_norm(), torch.randn(1, 2, 6)
    norm = fit(Call(module, given, module(given)))
    assert norm is not None
    ratio = torch.tensor([[[1.0], [0.5]]])
    found = norm.rescaled(module(given), ratio)
    assert torch.equal(found[:, 0], module(given)[:, 0])
    half = module.bias + (module(given)[:, 1] - module.bias) / 2
    torch.testing.assert_close(found[:, 1], half, rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_is_no_norm_of_a_known_form_is_not_taken_for_one() -> None:
    class SumNorm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().sum(-1, keepdim=True)

    module, given = SumNorm(), torch.randn(1, 4, 6)
    assert is_norm(module)
    assert fit(Call(module, given, module(given))) is None
    assert fit(None) is None
