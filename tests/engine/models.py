"""The tiny families as resident models, made once per process, and short ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from families import FAMILIES, Family, build
from patchclamp_server.adapters.adapter import Adapter
from patchclamp_server.adapters.load import Checkpoint
from patchclamp_server.engine.loading import Resident, make_resident
from patchclamp_server.engine.messages import Progress
from patchclamp_server.engine.runner import Batch, Edit, Forward, Runner
from patchclamp_server.hookpoints import HookPoint, Site

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

# Float32 on the CPU: values below 30 with a relative rounding of 6e-8, through some dozens of sums in another order.
# On CUDA kernels also differ in their exponentials and in how they split their sums.
ROUNDING = {"cpu": 2e-5, "cuda": 1e-4}
# Three prompts of one length, and one of each other length: patched and batched with each other.
SAME_LENGTH = ((5, 17, 3, 40, 11, 17, 29), (9, 33, 21, 4, 48, 2, 30), (50, 1, 44, 44, 7, 19, 12))
LENGTHS = ((5, 17, 3), (9, 33, 21, 4, 48, 2, 30), (50, 1, 44, 44, 7), (13,), (8, 6, 7, 5, 3, 0))


def no_progress(_: Progress) -> None:
    """Nobody watches."""


@cache
def plain_model(family: Family, device: str = "cpu") -> PreTrainedModel:
    """The family's model without anything of ours."""
    model: PreTrainedModel = build(family).to(device)
    return model


@cache
def resident(family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Resident:
    """The family's model, solved and proved on a device. Shared by all tests: leave no hook on it."""
    return make_resident(Checkpoint(build(family).to(device, dtype), None, "r0"), family.name, no_progress)


def make(model: PreTrainedModel) -> Resident:
    """Solves and proves a model."""
    return make_resident(Checkpoint(model, None, "r0"), "tiny", no_progress)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The logits [pos, d_vocab] of a model as `transformers` computes them."""
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits


@dataclass(frozen=True, eq=False)
class Seen:
    """What one forward gave: the values of hook points with a batch axis, and each row's logits [pos, d_vocab]."""

    values: Mapping[HookPoint, torch.Tensor]
    logits: tuple[torch.Tensor, ...]

    def row(self, row: int, length: int) -> dict[HookPoint, torch.Tensor]:
        """One row's values without batch axis and padding."""
        return {point: unpadded(point.site, value[row], length) for point, value in self.values.items()}


def unpadded(site: Site, value: torch.Tensor, length: int) -> torch.Tensor:
    """A row's value at its real positions."""
    if site.position_axis:
        return value[:, :length, :length]
    return value if value.shape[0] == 1 and site is Site.POS_EMBED else value[:length]


def look(
    model: Resident,
    rows: Sequence[Sequence[int]],
    reads: Iterable[HookPoint] | None = None,
    edits: Mapping[HookPoint, Edit] | None = None,
) -> Seen:
    """Runs rows as one batch with these reads (None: every hook point) and gives all their logits."""
    runner = model.runner
    values: dict[HookPoint, torch.Tensor] = {}
    wanted = frozenset(runner.adapter.read_taps if reads is None else reads)
    logits = runner.run(
        Forward(
            Batch.of(rows, runner.input_device),
            reads=wanted,
            capture=lambda point, value: values.__setitem__(point, value.clone()),
            edits=edits,
            logit_rows=[(row, position) for row, ids in enumerate(rows) for position in range(len(ids))],
        )
    )
    return Seen(values, logits.split([len(ids) for ids in rows]))


def block_values(model: Resident, ids: Sequence[int]) -> list[dict[Site, torch.Tensor]]:
    """Every site of every block on one prompt."""
    values = look(model, [ids]).row(0, len(ids))
    return [
        {point.site: value for point, value in values.items() if point.layer == layer}
        for layer in range(model.facts.dims.n_layers)
    ]


def same_for_all(new: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit that puts a fixed value in place."""
    return lambda _: new


def adapter_of(model: Resident) -> Adapter:
    return model.runner.adapter


def hooks_on(runner: Runner) -> int:
    """Module hooks and probe handlers that stand on a model."""
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in runner.adapter.model.modules()
    )
    return hooks + len(runner.adapter.probes.handlers)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: object = "") -> None:
    """Equal up to an absolute tolerance; infinities must agree."""
    torch.testing.assert_close(
        found.float().cpu(), expected.float().cpu(), rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The first input of every call of the modules."""
    calls: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _, args, out: calls.append(args[0])) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
