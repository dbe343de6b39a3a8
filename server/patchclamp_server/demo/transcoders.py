"""Transcoders of the demo model: sparse stand-ins for its MLPs, and the model with all of them in place.

A transcoder reads what an MLP reads, after the norm, and writes what it writes:
``features = JumpReLU(W_enc x + b_enc)``, ``y = features W_dec + b_dec`` (Dunefsky et al. 2024). Features of a
cross-layer set write to the MLP outputs of their own and of every later layer, each with a decoder of its own (Ameisen
et al. 2025, "Circuit Tracing"). A per-layer set is the special case of one target.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TranscoderShape:
    n_layers: int
    n_features: int
    d_model: int
    cross_layer: bool

    @property
    def kind(self) -> str:
        return "cross-layer" if self.cross_layer else "per-layer"

    def n_targets(self, layer: int) -> int:
        """How many layers the features of ``layer`` write to, counting from their own."""
        return self.n_layers - layer if self.cross_layer else 1


class TranscoderSet(nn.Module):
    """One set of transcoders, for every layer.

    Parameters are in units of ``input_scale`` and ``output_scale`` [layer], the typical norms of what the MLPs read and
    write; ``fold`` makes both 1. Shapes: ``W_enc`` [layer, feature, d_model], ``b_enc`` and ``threshold``
    [layer, feature], ``b_dec`` [layer, d_model], ``W_dec`` for every layer [feature, target, d_model].
    """

    threshold: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, shape: TranscoderShape) -> None:
        super().__init__()
        n_layers, n_features, d_model = shape.n_layers, shape.n_features, shape.d_model
        self.shape = shape
        self.W_enc = nn.Parameter(torch.zeros(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, n_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        targets = [shape.n_targets(layer) for layer in range(n_layers)]
        self.W_dec = nn.ParameterList([nn.Parameter(torch.zeros(n_features, n, d_model)) for n in targets])
        self.register_buffer("threshold", torch.zeros(n_layers, n_features))
        self.register_buffer("input_scale", torch.ones(n_layers))
        self.register_buffer("output_scale", torch.ones(n_layers))

    def pre_activations(self, layer: int, x: Tensor) -> Tensor:
        """[..., d_model] to [..., feature]."""
        return torch.nn.functional.linear(x / self.input_scale[layer], self.W_enc[layer], self.b_enc[layer])

    def features(self, layer: int, x: Tensor) -> Tensor:
        """JumpReLU activations, [..., d_model] to [..., feature]."""
        pre = self.pre_activations(layer, x)
        return pre * (pre > self.threshold[layer])

    def write(self, source: int, target: int, features: Tensor) -> Tensor:
        """What ``features`` of layer ``source`` add to the MLP output of layer ``target``, without its bias."""
        decoded: Tensor = features @ self.W_dec[source][:, target - source]  # [..., d_model]
        return decoded * self.output_scale[target]

    def bias(self, layer: int) -> Tensor:
        return self.b_dec[layer] * self.output_scale[layer]

    def sources(self, target: int) -> range:
        """The layers whose features write to ``target``."""
        return range(0 if self.shape.cross_layer else target, target + 1)

    def output(self, target: int, features: Sequence[Tensor]) -> Tensor:
        """The stand-in for the MLP output of ``target``, given the features of all layers up to it."""
        writes = [self.write(source, target, features[source]) for source in self.sources(target)]
        return torch.stack(writes).sum(0) + self.bias(target)

    @torch.no_grad()
    def fold(self) -> None:
        """Bring all parameters to the units of the model, without changing the function."""
        self.W_enc.div_(self.input_scale[:, None, None])
        self.b_dec.mul_(self.output_scale[:, None])
        for layer, decoder in enumerate(self.W_dec):
            scales = self.output_scale[layer : layer + self.shape.n_targets(layer)]
            decoder.mul_(scales[:, None])
        self.input_scale.fill_(1)
        self.output_scale.fill_(1)


@contextmanager
def mlps_hooked(model: PreTrainedModel, hook: Callable[[int, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``hook(layer, input, output)`` at every MLP; what it returns, unless None, replaces the output."""

    def hooked(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Any]:
        return lambda _module, arguments, output: hook(layer, arguments[0], output)

    with ExitStack() as hooks:
        for layer, block in enumerate(model.model.layers):
            hooks.callback(block.mlp.register_forward_hook(hooked(layer)).remove)
        yield


@contextmanager
def mlps_recorded(model: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inputs and outputs of every MLP, filled by the next forward: for each layer [row, pos, d_model]."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(layer: int, x: Tensor, y: Tensor) -> None:
        del inputs[layer:], outputs[layer:]
        inputs.append(x)
        outputs.append(y)

    with mlps_hooked(model, record):
        yield inputs, outputs


@contextmanager
def mlps_replaced(model: PreTrainedModel, transcoders: TranscoderSet) -> Iterator[None]:
    """Every MLP's output is its transcoder's, each fed with what it meets in the replaced model.

    Only the token that begins a text keeps its MLPs: nothing precedes it, so what happens there is one constant, and
    circuit-tracer gives that position no features either.
    """
    features: list[Tensor] = []
    begins_text: list[Tensor] = []

    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        begins_text[:] = [(arguments[0] == model.config.bos_token_id)[..., None]]  # [row, pos, 1]

    def replace(layer: int, x: Tensor, y: Tensor) -> Tensor:
        del features[layer:]
        features.append(transcoders.features(layer, x))
        return torch.where(begins_text[0], y, transcoders.output(layer, features))

    handle = model.model.embed_tokens.register_forward_pre_hook(note)
    try:
        with mlps_hooked(model, replace):
            yield
    finally:
        handle.remove()
