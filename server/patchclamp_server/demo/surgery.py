"""Hooks that look into a model, or change it, for the time of a ``with`` block.

They are plain PyTorch, so that what is measured with them stays independent of the service.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class Head(NamedTuple):
    """An attention head."""

    layer: int
    number: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.number}"


@contextmanager
def heads_replaced(
    model: LlamaForCausalLM, outputs: Mapping[Head, Tensor], where: slice = slice(None)
) -> Iterator[None]:
    """Put ``outputs`` [head_dim] in place of what these heads hand to their layer's output projection."""
    width = model.config.head_dim

    def replacing(layer: int) -> Callable[..., Any]:
        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            values = arguments[0].clone()  # [prompt, pos, head * head_dim]
            for head, output in outputs.items():
                if head.layer == layer:
                    values[:, where, head.number * width : (head.number + 1) * width] = output
            return (values, *arguments[1:])

        return replace

    with ExitStack() as hooks:
        for layer in {head.layer for head in outputs}:
            projection = model.model.layers[layer].self_attn.o_proj
            hooks.callback(projection.register_forward_pre_hook(replacing(layer)).remove)
        yield


@contextmanager
def residual_replaced(model: LlamaForCausalLM, layer: int, position: int, vectors: Tensor) -> Iterator[None]:
    """Put ``vectors`` [prompt, d_model] at one position of the input of block ``layer``."""

    def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        residual = arguments[0].clone()
        residual[:, position] = vectors
        return (residual, *arguments[1:])

    handle = model.model.layers[layer].register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def mlps_set(model: LlamaForCausalLM, outputs: Mapping[int, Tensor], position: int) -> Iterator[None]:
    """Put ``outputs`` [d_model] in place of what the MLPs of these layers write at one position."""

    def replacing(vector: Tensor) -> Callable[..., Any]:
        def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            written = output.clone()
            written[:, position] = vector
            return written

        return replace

    with ExitStack() as hooks:
        for layer, vector in outputs.items():
            hooks.callback(model.model.layers[layer].mlp.register_forward_hook(replacing(vector)).remove)
        yield


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every forward pass appends the module's output to."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def last_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every forward pass appends the module's input at the last position to: [prompt, width]."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0][:, -1]))
    try:
        yield kept
    finally:
        handle.remove()


def attention_patterns(model: LlamaForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """[layer, row, head, query, key]."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels never hold the pattern
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(chosen)
    return torch.stack(output.attentions)
