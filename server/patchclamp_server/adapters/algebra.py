"""Solving a block: which modules write to the residual stream, with which factor, and which norm does what.

Method. Let `pre` enter a block and `post` leave it, as recorded in one short forward. In a sequential block some later
module reads `mid` with `mid - pre = c * out` for the output of an earlier module: that module is the attention write
and c its multiplier; in the same way `post - mid = c' * out'` is the MLP write. If there is no such `mid`, the block is
accepted as parallel when `post - pre` is a combination of the two output projections. Post-norms come out as writes
whose module is a norm. Whatever fits neither way is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from patchclamp_server.adapters.layout import Block, Layout
from patchclamp_server.adapters.norms import is_norm
from patchclamp_server.adapters.recording import Call, Recording
from patchclamp_server.errors import FailedPrecondition

# Relative misfit that counts as equal: rounding grows with the coarseness of the element type.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Multipliers in use are a tenth and more.
_LEAST_FACTOR = 1e-3


@dataclass(frozen=True, eq=False)
class Write:
    """A write to the residual stream: `factor` times the output of `module`. `raw` is the module whose output comes
    before a post-norm; it is `module` itself where there is none."""

    module: nn.Module
    factor: float
    raw: nn.Module

    @property
    def post_norm(self) -> nn.Module | None:
        return self.module if self.module is not self.raw else None


@dataclass(frozen=True, eq=False)
class BlockAlgebra:
    """How one block works. `mid_reader` is the module whose input is the stream between attention and MLP, None in a
    parallel block. `ln1` and `ln2` are the norms before attention and MLP, None where the block has none; in a parallel
    block with a single norm, that is `ln1`, and both branches read it."""

    attention: Write
    mlp: Write
    mid_reader: nn.Module | None
    ln1: nn.Module | None
    ln2: nn.Module | None

    @property
    def parallel(self) -> bool:
        return self.mid_reader is None


@dataclass(frozen=True, eq=False)
class Algebra:
    """How a model works: what the token embeddings write, its blocks, its final norm, and what follows the
    unembedding."""

    embed: Write
    blocks: tuple[BlockAlgebra, ...]
    ln_final: nn.Module | None
    logit_factor: float
    logit_softcap: float


def solve(layout: Layout, recording: Recording, softcap: float | None) -> Algebra:
    """Solves every block and the way from the last block to the logits. Raises FailedPrecondition where nothing fits.

    `softcap` is the configured cap on the logits, tried when they are not a multiple of the unembedding's output.
    """
    blocks = tuple(_solve_block(block, recording, layer) for layer, block in enumerate(layout.blocks))
    factor, cap = _after_unembedding(layout, recording, softcap)
    return Algebra(_embedding(layout, recording), blocks, _final_norm(layout, recording), factor, cap)


def _solve_block(block: Block, recording: Recording, layer: int) -> BlockAlgebra:
    whole = recording.call(block.module)
    if whole is None or whole.given is None or whole.value is None:
        raise FailedPrecondition(f"block {layer} was not called with a tensor")
    if not bool(whole.value.isfinite().all()):
        raise FailedPrecondition(f"block {layer} gives numbers that are not finite on a short prompt")
    calls = [call for call in recording.inside(block.module) if _as_wide(call.value, whole.given)]
    pre, post = _rows(whole.given), _rows(whole.value)
    found = _sequential(block, calls, recording, pre, post) or _parallel(block, recording, pre, post)
    if found is None:
        raise FailedPrecondition(
            f"the residual writes of block {layer} ({type(block.module).__name__}) could not be solved: its output is "
            "neither its input plus an attention write plus an MLP write, nor both in parallel"
        )
    return found


def _sequential(
    block: Block, calls: list[Call], recording: Recording, pre: torch.Tensor, post: torch.Tensor
) -> BlockAlgebra | None:
    for reader in _distinct_readers(recording.inside(block.module), pre):
        mid = _rows(reader.given)
        attention = _write_between(pre, mid, _before(calls, reader), block.attention.output)
        if attention is None:
            continue
        mlp = _write_between(mid, post, calls, block.mlp.down or block.mlp.module)
        if mlp is not None:
            return BlockAlgebra(
                attention=_with_raw(attention, block.attention.output),
                mlp=_with_raw(mlp, block.mlp.down or block.mlp.module),
                mid_reader=_outermost(reader, recording.inside(block.module)),
                ln1=_norm_reading(block, recording, pre),
                ln2=_norm_reading(block, recording, mid),
            )
    return None


def _parallel(block: Block, recording: Recording, pre: torch.Tensor, post: torch.Tensor) -> BlockAlgebra | None:
    mlp_output = block.mlp.down or block.mlp.module
    calls = recording.call(block.attention.output), recording.call(mlp_output)
    if any(call is None or not _as_wide(call.value, pre) for call in calls):
        return None
    columns = torch.stack([_rows(call.value).flatten() for call in calls if call is not None], dim=1)
    target = (post - pre).flatten()
    factors = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    # A factor near zero says nothing about its module, as in a block whose MLP writes zeros.
    if _misfit(target, columns @ factors) > _tolerance(recording) or float(factors.abs().min()) < _LEAST_FACTOR:
        return None
    norms = [call for call in _norms(block, recording) if _same(call.given, pre, recording)]
    return BlockAlgebra(
        attention=Write(block.attention.output, _round_factor(float(factors[0])), block.attention.output),
        mlp=Write(mlp_output, _round_factor(float(factors[1])), mlp_output),
        mid_reader=None,
        ln1=norms[0].module if norms else None,
        ln2=norms[1].module if len(norms) > 1 else None,
    )


def _write_between(
    before: torch.Tensor, after: torch.Tensor, calls: Iterable[Call], preferred: nn.Module
) -> Write | None:
    """The module whose output, times a factor, is what was added. Of several with equal outputs the preferred one."""
    added = after - before
    matches: list[Write] = []
    for call in calls:
        out = _rows(call.value)
        if out.shape != added.shape:
            continue
        factor = float((out * added).sum() / (out * out).sum().clamp_min(1e-30))
        # A factor near zero would make anything fit an empty write.
        if abs(factor) >= _LEAST_FACTOR and _misfit(added, factor * out) <= _TOLERANCE[_origin(call)]:
            matches.append(Write(call.module, _round_factor(factor), call.module))
    return next((match for match in matches if match.module is preferred), matches[0] if matches else None)


def _with_raw(write: Write, projection: nn.Module) -> Write:
    return Write(write.module, write.factor, projection if is_norm(write.module) else write.module)


def _distinct_readers(calls: Iterable[Call], pre: torch.Tensor) -> Iterator[Call]:
    """Calls whose input may be the stream between attention and MLP: as wide as the stream and not its beginning."""
    for call in calls:
        if _as_wide(call.given, pre) and _misfit(_rows(call.given), pre) > 1e-6:
            yield call


def _outermost(reader: Call, calls: Iterable[Call]) -> nn.Module:
    """The widest module that reads the same stream: the MLP itself rather than one of its projections."""
    found, stream = reader.module, _rows(reader.given)
    for call in calls:
        same = _as_wide(call.given, stream) and _misfit(_rows(call.given), stream) <= 1e-6
        if same and found in set(call.module.modules()):
            found = call.module
    return found


def _embedding(layout: Layout, recording: Recording) -> Write:
    """The module outside the blocks whose output (and the position embeddings') is what enters block 0."""
    first = recording.call(layout.blocks[0].module)
    assert first is not None
    entering = _rows(first.given)
    positions = recording.call(layout.pos_embed) if layout.pos_embed is not None else None
    start = _rows(positions.value) if positions is not None else torch.zeros_like(entering)
    outside = [call for call in _before(list(recording.calls), first) if _as_wide(call.value, entering)]
    inner = set(layout.blocks[0].module.modules())
    found = _write_between(start, entering, [call for call in outside if call.module not in inner], layout.embed)
    if found is None:
        raise FailedPrecondition("what enters block 0 is not the token embeddings, with or without learned positions")
    return found


def _before(calls: list[Call], reader: Call) -> list[Call]:
    """Calls that ended before the reader did."""
    return calls[: next((i for i, call in enumerate(calls) if call is reader), len(calls))]


def _norms(block: Block, recording: Recording) -> list[Call]:
    return [call for call in recording.inside(block.module) if is_norm(call.module)]


def _norm_reading(block: Block, recording: Recording, stream: torch.Tensor) -> nn.Module | None:
    matching = (call.module for call in _norms(block, recording) if _same(call.given, stream, recording))
    return next(matching, None)


def _final_norm(layout: Layout, recording: Recording) -> nn.Module | None:
    head = recording.call(layout.unembed)
    inner = {module for block in layout.blocks for module in block.module.modules()}
    for call in reversed(recording.calls):
        outside = call.module not in inner and is_norm(call.module)
        if outside and head is not None and head.given is not None and _same(call.value, _rows(head.given), recording):
            return call.module
    return None


def _after_unembedding(layout: Layout, recording: Recording, softcap: float | None) -> tuple[float, float]:
    """The factor and softcap between the unembedding's output and the logits (1 and 0 where there is none)."""
    head = recording.call(layout.unembed)
    if head is None or head.value is None:
        raise FailedPrecondition("the model's forward does not call its unembedding")
    raw, logits = _rows(head.value), _rows(recording.logits)
    factor = float((raw * logits).sum() / (raw * raw).sum())
    if _misfit(logits, factor * raw) <= _tolerance(recording):
        return _round_factor(factor), 0.0
    if softcap and _misfit(logits, softcap * torch.tanh(raw / softcap)) <= _tolerance(recording):
        return 1.0, float(softcap)
    raise FailedPrecondition("the logits are neither a multiple nor a softcap of the unembedding's output")


def _same(value: torch.Tensor | None, rows: torch.Tensor, recording: Recording) -> bool:
    return _as_wide(value, rows) and _misfit(_rows(value), rows) <= _tolerance(recording)


def _as_wide(value: torch.Tensor | None, stream: torch.Tensor) -> bool:
    return value is not None and value.numel() == stream.numel() and value.shape[-1] == stream.shape[-1]


def _misfit(target: torch.Tensor, guess: torch.Tensor) -> float:
    return float((target - guess).norm() / target.norm().clamp_min(1e-30))


def _rows(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    # Float64 on the host: the solver's own rounding must not blur what it compares.
    return value.reshape(-1, value.shape[-1]).to("cpu", torch.float64)


def _origin(call: Call) -> torch.dtype:
    assert call.value is not None
    return call.value.dtype


def _tolerance(recording: Recording) -> float:
    return _TOLERANCE[recording.logits.dtype]


def _round_factor(factor: float) -> float:
    """Exactly one where the least-squares factor is one up to rounding."""
    return 1.0 if abs(factor - 1.0) < 1e-3 else factor
