"""Geometry: how the value of any site is seen as rows, `[batch, pos, group, width]`.

A group is a head (or an expert); sites without such an axis have one group. Attention scores and patterns have a row of
keys for each query and head; their width is 0 here, as it depends on the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchclamp_server.hookpoints import SiteInfo
from patchclamp_server.interventions.ops import Target


@dataclass(frozen=True)
class Geometry:
    """The rows of a site. `has_heads`: its groups are heads. `of_keys`: its rows are over keys."""

    groups: int
    width: int
    has_heads: bool
    of_keys: bool
    grouped: bool

    @classmethod
    def of(cls, info: SiteInfo) -> Geometry:
        names = [name for name, _ in info.axes]
        of_keys = "key" in names
        grouped = len(names) == 3
        groups = info.axes[0 if of_keys else 1][1] if grouped else 1
        return cls(groups, info.width, "head" in names or "kv_head" in names, of_keys, grouped)

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """A value `[batch, *axes]` as [batch, pos, group, width]."""
        if self.of_keys:
            return value.transpose(1, 2)
        return value if self.grouped else value.unsqueeze(2)

    def value(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`."""
        if self.of_keys:
            return rows.transpose(1, 2)
        return rows if self.grouped else rows.squeeze(2)

    def target_groups(self, target: Target) -> int:
        return len(target.heads) or self.groups

    def target_width(self, target: Target) -> int:
        return len(target.neurons) or self.width


def fitted(vectors: torch.Tensor, target: Target, width: int) -> torch.Tensor | None:
    """Vectors [.., width] that are zero outside the target's neurons; None where they have another width."""
    if not target.neurons:
        return vectors if vectors.shape[-1] == width else None
    index = torch.tensor(target.neurons)
    if vectors.shape[-1] == width:
        vectors = vectors[..., index]
    elif vectors.shape[-1] != len(target.neurons):
        return None
    full = vectors.new_zeros(*vectors.shape[:-1], width)
    full[..., index] = vectors
    return full
