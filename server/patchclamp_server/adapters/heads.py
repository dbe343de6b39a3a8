"""Heads: how a projection's output is divided into queries, keys and values, each per head, and put together again.

Separate projections hold one of the three. Fused ones hold `[all queries | all keys | all values]` (contiguous) or, for
each key/value head, `[its queries | its key | its value]` (grouped); with one key/value head the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from patchclamp_server.adapters.layout import Attention, widths


@dataclass(frozen=True)
class HeadCounts:
    """Numbers of heads and the width of one, as the projections' shapes tell."""

    n_heads: int
    n_kv_heads: int
    d_head: int


@dataclass(frozen=True, eq=False)
class HeadView:
    """A view of a projection's output `[batch, pos, width]` as `[batch, pos, head, d_head]`.

    `part` is 0 for queries, 1 for keys, 2 for values of a fused projection, None for a projection of its own.
    """

    module: nn.Module
    heads: int
    part: int | None
    grouped: bool
    counts: HeadCounts

    def read(self, output: torch.Tensor) -> torch.Tensor:
        if self.part is None:
            return output.unflatten(-1, (self.heads, self.counts.d_head))
        return self._parts(output)[self.part].flatten(-3, -2)

    def write(self, output: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The projection's output with this view's values replaced."""
        if self.part is None:
            return new.flatten(-2)
        parts = list(self._parts(output))
        parts[self.part] = new.unflatten(-2, parts[self.part].shape[-3:-1])
        if self.grouped:
            return torch.cat(parts, dim=-2).flatten(-3)
        return torch.cat([part.flatten(-3) for part in parts], dim=-1)

    def _parts(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values as [batch, pos, kv_head, heads of that group, d_head]."""
        kv, d_head = self.counts.n_kv_heads, self.counts.d_head
        group = self.counts.n_heads // kv
        if self.grouped:
            return output.unflatten(-1, (kv, group + 2, d_head)).split([group, 1, 1], dim=-2)
        sections = output.split([kv * group * d_head, kv * d_head, kv * d_head], dim=-1)
        return tuple(part.unflatten(-1, (kv, -1, d_head)) for part in sections)


def count_heads(attention: Attention, n_heads: int) -> HeadCounts | None:
    """Head counts of one block from the widths of its projections; None when they do not fit together."""
    d_head, remainder = divmod(widths(attention.output)[0], n_heads)
    if remainder:
        return None
    if attention.fused is not None:
        n_kv_heads, remainder = divmod(widths(attention.fused)[1] // d_head - n_heads, 2)
    elif attention.key is not None:
        n_kv_heads, remainder = divmod(widths(attention.key)[1], d_head)
    else:
        return None
    fits = not remainder and n_kv_heads > 0 and n_heads % n_kv_heads == 0
    return HeadCounts(n_heads, n_kv_heads, d_head) if fits else None


def head_views(attention: Attention, counts: HeadCounts) -> tuple[HeadView, HeadView, HeadView] | None:
    """Views of queries, keys and values; None when a projection is missing or of another width (a gated query)."""
    heads = (counts.n_heads, counts.n_kv_heads, counts.n_kv_heads)
    if attention.fused is not None:
        q, k, v = (HeadView(attention.fused, heads[part], part, attention.fused_grouped, counts) for part in range(3))
        return q, k, v
    modules = (attention.query, attention.key, attention.value)
    views = [
        HeadView(module, count, None, False, counts)
        for module, count in zip(modules, heads, strict=True)
        if module is not None and widths(module)[1] == count * counts.d_head
    ]
    return (views[0], views[1], views[2]) if len(views) == 3 else None
