"""Norms: the divisor that a norm module uses, and what its output becomes when that divisor is changed.

A norm module yields `y = bias + weight * n` with `n = (x - m) / s`: for LayerNorm `s = sqrt(var(x) + eps)` and m is
the mean, for RMSNorm `s = sqrt(mean(x^2) + eps)` and m is 0. Some store `weight - 1`. Which form a module has is
decided by what it gave out in a recorded call, not by its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from patchclamp_server.adapters.recording import Call


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm module in the form above. `offset` is added to its stored weight."""

    module: nn.Module
    eps: float
    centre: bool
    offset: float

    def scale(self, given: torch.Tensor) -> torch.Tensor:
        """The divisor s of each row: `[..., d]` to `[..., 1]`, in float32 as the modules compute it."""
        rows = given.float()
        if self.centre:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def normalized(self, given: torch.Tensor) -> torch.Tensor:
        """n: the input, centred where the module does that, over its divisor. `[..., d]`, float32."""
        rows = given.float()
        if self.centre:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def weighted(self, normalized: torch.Tensor) -> torch.Tensor:
        """n times the module's weight: what it yields, less its bias."""
        weight = getattr(self.module, "weight", None)
        return normalized if weight is None else normalized * (weight.float() + self.offset)

    def output(self, normalized: torch.Tensor) -> torch.Tensor:
        """What the module yields for a given n."""
        return self.weighted(normalized) + self._bias()

    def rescaled(self, output: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """The module's output with its divisor divided by `ratio`."""
        bias = self._bias()
        changed = bias + (output.float() - bias) * ratio
        return torch.where(ratio == 1, output, changed.to(output.dtype))

    def _bias(self) -> torch.Tensor | float:
        bias = getattr(self.module, "bias", None)
        return 0.0 if bias is None else bias.float()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: named so, and without parts of its own."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def fit(call: Call | None) -> Norm | None:
    """The form of the norm that made this call, or None when it has none of those above."""
    if call is None or call.given is None or call.value is None:
        return None
    if any(parameter.is_meta for parameter in call.module.parameters()):
        return None
    eps = _epsilon(call.module)
    forms = [Norm(call.module, eps, centre, offset) for centre in (False, True) for offset in (0.0, 1.0)]
    misfits = [_misfit(form, call.given, call.value) for form in forms]
    best = min(range(len(forms)), key=misfits.__getitem__)
    return forms[best] if misfits[best] <= _TOLERANCE[call.value.dtype] else None


# Rounding of one multiplication and one division in the element type, with room for the order of summation.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def _misfit(form: Norm, given: torch.Tensor, value: torch.Tensor) -> float:
    guess = form.output(form.normalized(given.to(value.device)))
    return float((guess - value.float()).norm() / value.float().norm().clamp_min(1e-30))


def _epsilon(module: nn.Module) -> float:
    found = (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name))
    return float(next(found, 0.0) or 0.0)
