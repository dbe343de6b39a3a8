"""Taps: how each site is read from, and written into, the tensors that an unmodified forward passes along.

A tap says which module's input or output holds the value (or which probe shows it), how to view it with the site's own
axes behind a batch axis, and how a changed value goes back. It installs nothing: the runner's hooks call it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from patchclamp_server.adapters.algebra import Write
from patchclamp_server.adapters.heads import HeadView
from patchclamp_server.adapters.layout import weight_matrix
from patchclamp_server.adapters.norms import Norm
from patchclamp_server.adapters.probes import Stage, routing_weights
from patchclamp_server.adapters.recording import first_tensor
from patchclamp_server.hookpoints import HookPoint


class Moment(StrEnum):
    """When a tap sees its value."""

    BEFORE = "before"
    AFTER = "after"
    PROBE = "probe"


@dataclass
class Visit:
    """One call of a hooked module: the batch's size, the module's input and, afterwards, its output.

    `stream` is the block's input, for the taps that say they need it. `rescale` is by how much an edit of a norm's
    divisor multiplied its output.
    """

    batch: int
    given: torch.Tensor
    output: Any = None
    stream: torch.Tensor | None = None
    rescale: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        """The output's (first) tensor; the input before the call. Batch axis restored where a module works on rows."""
        tensor = self.given if self.output is None else first_tensor(self.output)
        assert tensor is not None
        return self.batched(tensor)

    @property
    def source(self) -> torch.Tensor:
        """The module's input, batch axis restored."""
        return self.batched(self.given)

    def batched(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, pos, ..] of a tensor that may be [batch * pos, width]."""
        return tensor.unflatten(0, (self.batch, -1)) if tensor.ndim == 2 else tensor

    def replaced(self, new: torch.Tensor) -> Any:
        """The module's input or output with its tensor replaced by `new`, in its own shape and dtype."""
        old = self.given if self.output is None else first_tensor(self.output)
        assert old is not None
        fitted = new.reshape(old.shape).to(old.dtype)
        if isinstance(self.output, tuple):
            return (fitted, *self.output[1:])
        return fitted


Reader = Callable[[Visit], torch.Tensor]
Writer = Callable[[Visit, torch.Tensor], Any]


@dataclass(frozen=True, eq=False)
class Tap:
    """Access to one hook point.

    `read` gives `[batch, *axes]`. `write` takes such a tensor and gives what goes on in place of the module's input or
    output; None where the site is read-only. Writes go in as differences, so that rows which an edit leaves alone stay
    bit for bit what they were. `rank` orders taps on the same module and moment by the data flow.
    `stream_of` is the block whose input `write` needs.
    """

    hook_point: HookPoint
    module: nn.Module
    moment: Moment
    read: Reader
    write: Writer | None
    rank: int = 0
    stage: Stage | None = None
    stream_of: nn.Module | None = None


def before(hook_point: HookPoint, module: nn.Module, *, writable: bool = True, rank: int = 0) -> Tap:
    """The module's input as it is."""
    return Tap(hook_point, module, Moment.BEFORE, _value, _replace if writable else None, rank)


def after(hook_point: HookPoint, module: nn.Module, *, factor: float = 1.0, rank: int = 0) -> Tap:
    """The module's output times a factor."""
    if factor == 1.0:
        return Tap(hook_point, module, Moment.AFTER, _value, _replace, rank)
    return Tap(
        hook_point,
        module,
        Moment.AFTER,
        lambda visit: visit.value * factor,
        lambda visit, new: visit.replaced(visit.value + (new - visit.value * factor) / factor),
        rank,
    )


def broadcast_after(hook_point: HookPoint, module: nn.Module) -> Tap:
    """The output of a module that the rows of a batch share: [1, pos, width] as [batch, pos, width]."""

    def read(visit: Visit) -> torch.Tensor:
        value = first_tensor(visit.output)
        assert value is not None
        return value.expand(visit.batch, *value.shape[-2:])

    return Tap(hook_point, module, Moment.AFTER, read, lambda visit, new: new.to(visit.output.dtype))


def resid_mid_write(hook_point: HookPoint, write: Write, block: nn.Module) -> Tap:
    """The stream between attention and MLP, written through the attention write so that the skip path has it too.

    What a norm reads there is only a branch.
    """

    def stream(visit: Visit) -> torch.Tensor:
        assert visit.stream is not None
        # A model spread over devices may have brought it here from another.
        return visit.stream.to(visit.value.device)

    def read(visit: Visit) -> torch.Tensor:
        return stream(visit) + visit.value * write.factor

    def edit(visit: Visit, new: torch.Tensor) -> Any:
        return visit.replaced(visit.value + (new - read(visit)) / write.factor)

    return Tap(hook_point, write.module, Moment.AFTER, read, edit, rank=4, stream_of=block)


def norm_scale(hook_point: HookPoint, norm: Norm, *, heads_first: bool = False) -> Tap:
    """The divisor of a norm, [batch, pos, 1], or [batch, pos, head, 1] for a norm on heads.

    `heads_first`: the module works on [batch, head, pos, d_head].
    """

    def turn(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2) if heads_first else value

    def write(visit: Visit, new: torch.Tensor) -> Any:
        visit.rescale = norm.scale(visit.source) / turn(new).float()
        return visit.replaced(norm.rescaled(visit.value, visit.rescale))

    return Tap(hook_point, norm.module, Moment.AFTER, lambda visit: turn(norm.scale(visit.source)), write, rank=-2)


def norm_normalized(hook_point: HookPoint, norm: Norm) -> Tap:
    """A norm's input over its divisor, before weight and bias."""

    def read(visit: Visit) -> torch.Tensor:
        normalized = norm.normalized(visit.source)
        return normalized if visit.rescale is None else normalized * visit.rescale

    def write(visit: Visit, new: torch.Tensor) -> Any:
        return visit.replaced(visit.value + norm.weighted(new.float() - read(visit)))

    return Tap(hook_point, norm.module, Moment.AFTER, read, write, rank=-1)


def heads(hook_point: HookPoint, view: HeadView) -> Tap:
    """Queries, keys or values, [batch, pos, head, d_head], at their projection's output."""
    return Tap(
        hook_point,
        view.module,
        Moment.AFTER,
        lambda visit: view.read(visit.value),
        lambda visit, new: visit.replaced(view.write(visit.value, new)),
    )


def head_inputs(hook_point: HookPoint, tap: Tap, n_heads: int) -> Tap:
    """The stream that a branch reads, one copy per head. Read-only: the copies are one tensor in the forward."""
    return replace(
        tap,
        hook_point=hook_point,
        read=lambda visit: visit.value.unsqueeze(2).expand(-1, -1, n_heads, -1),
        write=None,
    )


def attention_z(hook_point: HookPoint, output: nn.Module, n_heads: int) -> Tap:
    """Pattern-weighted values, [batch, pos, head, d_head], at the output projection's input."""
    return Tap(
        hook_point,
        output,
        Moment.BEFORE,
        lambda visit: visit.value.unflatten(-1, (n_heads, -1)),
        lambda visit, new: visit.replaced(new.flatten(-2)),
    )


def attention_result(hook_point: HookPoint, output: nn.Module, n_heads: int) -> Tap:
    """Each head's output, [batch, pos, head, d_model]: z times its slice of W_O."""

    def read(visit: Visit) -> torch.Tensor:
        w_o = weight_matrix(output).unflatten(1, (n_heads, -1))  # [d_model, head, d_head]
        return torch.einsum("bphe,dhe->bphd", visit.source.unflatten(-1, (n_heads, -1)), w_o)

    def write(visit: Visit, new: torch.Tensor) -> Any:
        return visit.replaced(visit.value + (new - read(visit)).sum(2))

    return Tap(hook_point, output, Moment.AFTER, read, write, rank=1)


def half(hook_point: HookPoint, fused: nn.Module, part: int) -> Tap:
    """Gate (0) or linear branch (1) of a projection that yields both side by side."""

    def write(visit: Visit, new: torch.Tensor) -> Any:
        halves = list(visit.value.chunk(2, dim=-1))
        halves[part] = new
        return visit.replaced(torch.cat(halves, dim=-1))

    return Tap(hook_point, fused, Moment.AFTER, lambda visit: visit.value.chunk(2, dim=-1)[part], write)


def probe(hook_point: HookPoint, module: nn.Module, stage: Stage) -> Tap:
    """A value shown by a probe, as [batch, *axes]; some attentions fold the heads into the batch."""

    def read(visit: Visit) -> torch.Tensor:
        return visit.given if visit.given.ndim == 4 else visit.given.unflatten(0, (visit.batch, -1))

    return Tap(hook_point, module, Moment.PROBE, read, lambda visit, new: new.reshape(visit.given.shape), stage=stage)


def expert_neurons(hook_point: HookPoint, experts: nn.Module) -> Tap:
    """Neurons of every expert, [batch, pos, expert, d_mlp]; the probe shows them as [batch * pos, expert, d_mlp]."""
    return Tap(
        hook_point,
        experts,
        Moment.PROBE,
        lambda visit: visit.given.unflatten(0, (visit.batch, -1)),
        lambda visit, new: new.flatten(0, 1),
        stage=Stage.NEURONS,
    )


def router_logits(hook_point: HookPoint, router: nn.Module) -> Tap:
    """A router's logits, [batch, pos, expert]. Read-only: the routing is computed from them inside the same module."""
    return Tap(hook_point, router, Moment.AFTER, _value, None)


def router_weights(hook_point: HookPoint, router: nn.Module) -> Tap:
    """Routing weights as applied, [batch, pos, expert]. A write keeps which experts a token is sent to."""

    def read(visit: Visit) -> torch.Tensor:
        logits, weights, index = visit.output
        return visit.batched(routing_weights(index, weights, logits.shape[-1]))

    def write(visit: Visit, new: torch.Tensor) -> Any:
        logits, weights, index = visit.output
        return logits, new.flatten(0, 1).gather(1, index).to(weights.dtype), index

    return Tap(hook_point, router, Moment.AFTER, read, write, rank=1)


def _value(visit: Visit) -> torch.Tensor:
    return visit.value


def _replace(visit: Visit, new: torch.Tensor) -> Any:
    return visit.replaced(new)
