"""Layout: where the parts of a decoder are among its modules, found by name and checked by shape.

A part that is not where any known name points is None, and every site that needs it is declared absent with that
reason. A model without a stack of blocks with attention is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from patchclamp_server.adapters import names
from patchclamp_server.errors import FailedPrecondition


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of one block. `fused` is the module that yields queries, keys and values together."""

    module: nn.Module
    output: nn.Module
    query: nn.Module | None
    key: nn.Module | None
    value: nn.Module | None
    fused: nn.Module | None
    fused_grouped: bool
    query_norm: nn.Module | None
    key_norm: nn.Module | None


@dataclass(frozen=True, eq=False)
class Mlp:
    """The MLP of one block. `fused` is a projection that yields gate and up together."""

    module: nn.Module
    gate: nn.Module | None
    up: nn.Module | None
    fused: nn.Module | None
    down: nn.Module | None
    router: nn.Module | None
    experts: nn.Module | None


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the stack."""

    module: nn.Module
    attention: Attention
    mlp: Mlp


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a decoder."""

    model: nn.Module
    embed: nn.Module
    pos_embed: nn.Module | None
    blocks: tuple[Block, ...]
    unembed: nn.Module


def locate(model: nn.Module, n_layers: int) -> Layout:
    """Finds the parts of a causal language model. Raises FailedPrecondition that says what is missing."""
    path, stack = _stack(model, n_layers)
    body = model.get_submodule(path.rpartition(".")[0])
    return Layout(
        model=model,
        embed=_required(model.get_input_embeddings(), "the model has no input embeddings"),  # type: ignore[operator]
        pos_embed=_child(body, names.POSITION_EMBEDDING),
        blocks=tuple(_block(module, layer) for layer, module in enumerate(stack)),
        unembed=_required(model.get_output_embeddings(), "the model has no unembedding"),  # type: ignore[operator]
    )


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The matrix of a projection as [out, in], whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def widths(module: nn.Module) -> tuple[int, int]:
    """Widths of a projection's input and output."""
    for inward, outward in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, outward) and hasattr(module, inward):
            return int(getattr(module, inward)), int(getattr(module, outward))
    out_width, in_width = weight_matrix(module).shape
    return in_width, out_width


def _stack(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _child(module[0], names.ATTENTION):
            return path, module
    raise FailedPrecondition(
        f"{type(model).__name__} has no stack of {n_layers} blocks with attention under a known name "
        f"({', '.join(names.ATTENTION)})"
    )


def _block(module: nn.Module, layer: int) -> Block:
    attention = _child(module, names.ATTENTION)
    if attention is None:
        raise FailedPrecondition(f"block {layer} ({type(module).__name__}) has no attention under a known name")
    return Block(module, _attention(attention, layer), _mlp(module))


def _attention(module: nn.Module, layer: int) -> Attention:
    inner = module
    output = _child(inner, names.ATTENTION_OUTPUT)
    if output is None:
        inner = _child(module, names.INNER_ATTENTION) or module
        output = _child(inner, names.ATTENTION_OUTPUT)
    if output is None:
        raise FailedPrecondition(f"the attention of block {layer} ({type(module).__name__}) has no known output")
    contiguous, grouped = _child(inner, names.FUSED_CONTIGUOUS), _child(inner, names.FUSED_GROUPED)
    return Attention(
        module=inner,
        output=output,
        query=_child(inner, names.QUERY),
        key=_child(inner, names.KEY),
        value=_child(inner, names.VALUE),
        fused=contiguous or grouped,
        fused_grouped=contiguous is None,
        query_norm=_child(inner, names.QUERY_NORM),
        key_norm=_child(inner, names.KEY_NORM),
    )


def _mlp(block: nn.Module) -> Mlp:
    # Some decoders (OPT) keep the two projections in the block itself.
    module = _child(block, names.MLP) or block
    experts = _child(module, names.EXPERTS)
    return Mlp(
        module=module,
        gate=_child(module, names.GATE) if experts is None else None,
        up=_child(module, names.UP) if experts is None else None,
        fused=_child(module, names.FUSED_GATE_UP) if experts is None else None,
        down=_child(module, names.DOWN) if experts is None else None,
        router=_child(module, names.ROUTER) if experts is not None else None,
        experts=experts,
    )


def _child(module: nn.Module, candidates: Sequence[str]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in candidates if name in children), None)


def _required(module: nn.Module | None, complaint: str) -> nn.Module:
    if module is None:
        raise FailedPrecondition(complaint)
    return module
