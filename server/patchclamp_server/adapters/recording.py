"""A recording: what every module of a model took in and gave out during one short forward.

The runner makes it; the solver works on it as plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module: its first tensor argument and the first tensor of its output, copied.

    `parts` is how many values it gave out: 1, or the length of a tuple.
    """

    module: nn.Module
    given: torch.Tensor | None
    value: torch.Tensor | None
    parts: int = 1


@dataclass(frozen=True, eq=False)
class Recording:
    """The calls of one forward in the order in which they ended, and the logits it gave."""

    calls: tuple[Call, ...]
    logits: torch.Tensor

    @cached_property
    def _by_module(self) -> dict[nn.Module, Call]:
        return {call.module: call for call in self.calls}

    def call(self, module: nn.Module) -> Call | None:
        """The (last) call of a module; None when the forward never called it."""
        return self._by_module.get(module)

    def inside(self, module: nn.Module) -> tuple[Call, ...]:
        """The calls of a module's descendants, in order."""
        descendants = set(module.modules()) - {module}
        return tuple(call for call in self.calls if call.module in descendants)


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a module passes on: the value itself or the first one in a tuple, list or output object."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        return first_tensor(value[0])
    return None


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor that a module is called with."""
    return first_tensor(args) if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
