"""Optimisers and the learning-rate schedule: Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ADAM_BETAS = (0.9, 0.98)
_MUON_MOMENTUM = 0.95
# Biases carry the recency prior and must be able to leave it within a few hundred steps.
_BIAS_RATE = 5.0
_EMBEDDING_DECAY = 2.0


@dataclass(frozen=True)
class Rates:
    """Peak learning rates and weight decays. Without ``muon`` all parameters are AdamW's.

    Muon's decay differs between the matrices of attention and those of the MLPs: what both could hold ends up where it
    decays less.
    """

    adam: float
    adam_decay: float
    muon: float | None = None
    attention_decay: float = 0.0
    mlp_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one cosine down to ``floor`` times the peak."""

    steps: int
    warmup: int
    floor: float = 0.03

    def factor(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


class Optimizers:
    """The optimisers of one stage, stepped together under one schedule."""

    def __init__(self, model: nn.Module, rates: Rates, schedule: Schedule) -> None:
        self._schedule = schedule
        self._all = [*_optimizers(model, rates)]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._all]

    def step(self, step: int) -> None:
        factor = self._schedule.factor(step)
        for optimizer, peaks in zip(self._all, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._all]

    def load(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


def _optimizers(model: nn.Module, rates: Rates) -> Iterator[torch.optim.Optimizer]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if rates.muon is None:
        groups = _adam_groups(trained, rates)
    else:
        groups = _adam_groups([item for item in trained if not _is_hidden_matrix(*item)], rates)
        yield torch.optim.Muon(_muon_groups(trained, rates), lr=rates.muon, momentum=_MUON_MOMENTUM)
    yield torch.optim.AdamW(groups, lr=rates.adam, betas=_ADAM_BETAS, eps=1e-9)


def _muon_groups(trained: Iterable[tuple[str, nn.Parameter]], rates: Rates) -> list[dict[str, Any]]:
    hidden = [(name, parameter) for name, parameter in trained if _is_hidden_matrix(name, parameter)]
    attention = [parameter for name, parameter in hidden if ".self_attn." in name]
    mlp = [parameter for name, parameter in hidden if ".mlp." in name]
    return [
        {"params": attention, "weight_decay": rates.attention_decay},
        {"params": mlp, "weight_decay": rates.mlp_decay},
    ]


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in name


def _adam_groups(trained: Iterable[tuple[str, nn.Parameter]], rates: Rates) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {
        "embedding": {"params": [], "weight_decay": rates.adam_decay * _EMBEDDING_DECAY},
        "matrix": {"params": [], "weight_decay": rates.adam_decay},
        "bias": {"params": [], "weight_decay": 0.0, "lr": rates.adam * _BIAS_RATE},
        "norm": {"params": [], "weight_decay": 0.0},
    }
    for name, parameter in trained:
        groups[_adam_group(name, parameter)]["params"].append(parameter)
    return [{"lr": rates.adam, **group} for group in groups.values() if group["params"]]


def _adam_group(name: str, parameter: Tensor) -> str:
    if name.endswith("bias"):
        return "bias"
    if parameter.ndim < 2:
        return "norm"
    return "embedding" if "embed_tokens" in name else "matrix"
