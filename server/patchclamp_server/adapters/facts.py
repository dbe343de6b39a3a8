"""Facts about a loaded model: what Describe tells and what requests are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from patchclamp_server.hookpoints import AbsentSite, Site, SiteInfo


@dataclass(frozen=True)
class Dims:
    """Sizes of a model; zero where it has no such thing. `d_mlp` is that of one expert in a mixture of experts."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_experts: int = 0
    n_experts_per_token: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """What is loaded: names, sizes, placement, and which sites exist or not.

    `no_slots_reason` says why generations of this model cannot share a cache and run one by one; empty where they can.
    `end_ids` are the tokens that the model's own settings end a text with.
    """

    name: str
    revision: str
    architecture: str
    dims: Dims
    dtype: torch.dtype
    devices: tuple[str, ...]
    n_parameters: int
    parallel: bool
    sites: tuple[SiteInfo, ...]
    absent: tuple[AbsentSite, ...]
    no_slots_reason: str = ""
    end_ids: frozenset[int] = frozenset()

    @cached_property
    def site_info(self) -> dict[Site, SiteInfo]:
        """The sites that this model has, by site."""
        return {info.site: info for info in self.sites}
