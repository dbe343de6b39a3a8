"""Probes: hook points inside a module's forward, where no sub-module stands.

Attention. `transformers` calls one registered function for the attention of most architectures; ours computes what
theirs does and shows rotated queries and keys, scores and pattern on the way. In layers where nobody looks it falls
through to the model's own kernel. Architectures outside that interface keep their code; there, the one softmax inside
their attention is caught: its input is the scores, its output the pattern.

Experts. The registered experts function shows each expert's neurons in the same way.

A probe is asked for by a handler, set before a forward and cleared after it; a handler gets the tensor and returns the
one to go on with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Handler = Callable[[torch.Tensor], torch.Tensor]


class Stage(StrEnum):
    """Where inside a forward a probe looks."""

    ROT_Q = "rot_q"
    ROT_K = "rot_k"
    SCORES = "scores"
    PATTERN = "pattern"
    NEURONS = "neurons"


class Memory(Protocol):
    """Keys and values of tokens that earlier forwards have seen."""

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds those of this forward's tokens, [batch, kv_head, query, d_head].

        Gives keys and values of all tokens, [batch, kv_head, key, d_head], and where attention may look: bool
        [batch, 1, query, key].
        """


class Probes:
    """The handlers of one model, by layer and stage. One forward at a time may use them. `dtype` is the model's.

    With a `memory`, attention looks at earlier tokens too. `windows` are the layers whose attention slides, with how
    many tokens each sees.

    `catches_softmax` tells that the model's attention is outside the interface; `rotates` that queries and keys are
    rotated before the scores; `sinks` that attention sinks take part of the probability. `current_layer` is the layer
    whose attention runs, where the softmax is caught.
    """

    def __init__(self) -> None:
        self.handlers: dict[tuple[int, Stage], Handler] = {}
        self.layers: dict[nn.Module, int] = {}
        self.windows: dict[int, int] = {}
        self.memory: Memory | None = None
        self.dtype = torch.float32
        self.experts_implementation = "eager"
        self.catches_softmax = False
        self.rotates = True
        self.sinks = False
        self.current_layer: int | None = None

    def visit(self, layer: int, stage: Stage, value: torch.Tensor) -> torch.Tensor:
        handler = self.handlers.get((layer, stage))
        return value if handler is None else handler(value)

    def wants(self, layer: int, *stages: Stage) -> bool:
        return any((layer, stage) in self.handlers for stage in stages)

    def active(self) -> AbstractContextManager[Any]:
        """To be held during a forward."""
        looks = any(stage in (Stage.SCORES, Stage.PATTERN) for _, stage in self.handlers)
        return SoftmaxCatcher(self) if self.catches_softmax and looks else nullcontext()

    def register(self, name: str) -> None:
        """Makes the attention and experts functions known to `transformers` under a name."""
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        ExpertsInterface.register(name, self.run_experts)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention with its inner hook points. query [batch, head, query, d_head]; key, value per key/value head."""
        layer = self.layers[module]
        query = _swapped(self.visit(layer, Stage.ROT_Q, _swapped(query)))
        key = _swapped(self.visit(layer, Stage.ROT_K, _swapped(key)))
        self.sinks = self.sinks or s_aux is not None
        if kwargs.get("sliding_window"):
            self.windows[layer] = int(kwargs["sliding_window"])
        if self.memory is not None:
            key, value, attention_mask = self.memory.extend(layer, key, value)
        plain = softcap is None and s_aux is None
        if plain and not self.wants(layer, Stage.SCORES, Stage.PATTERN):
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scores = attention_scores(query, key, attention_mask, scaling, softcap)  # [batch, head, query, key]
        scores = self.visit(layer, Stage.SCORES, scores)
        pattern = self.visit(layer, Stage.PATTERN, _softmax_with_sinks(scores, s_aux).to(query.dtype))
        z = torch.matmul(pattern, _per_query_head(value, query.shape[1]))  # [batch, head, query, d_head]
        return _swapped(z).contiguous(), pattern

    def run_experts(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """A mixture's experts over hidden_states [token, d_model], with their neurons as a hook point."""
        layer = self.layers[module]
        if self.wants(layer, Stage.NEURONS):
            shown = expert_neurons(module, hidden_states, top_k_index)  # [token, expert, d_mlp]
            neurons = self.visit(layer, Stage.NEURONS, shown)
            # Looking changes no rounding: it can decide where a later router sends a token.
            if neurons is not shown:
                weights = routing_weights(top_k_index, top_k_weights, neurons.shape[1]).to(neurons.dtype)
                return torch.einsum("te,tem,edm->td", weights, neurons, module.down_proj).to(hidden_states.dtype)
        own_forward = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        experts = ExpertsInterface().get_interface(self.experts_implementation, own_forward)
        result: torch.Tensor = experts(module, hidden_states, top_k_index, top_k_weights)
        return result


class SoftmaxCatcher(TorchFunctionMode):
    """Shows the input and output of a softmax called inside an attention module's own code.

    `Probes.current_layer` tells which one runs; the runner's hooks keep it. Shapes are [batch, head, query, key].
    """

    def __init__(self, probes: Probes) -> None:
        super().__init__()
        self._probes = probes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._probes.current_layer
        if layer is None or func not in _SOFTMAXES:
            return func(*args, **kwargs)
        scores = args[0]
        if self._probes.wants(layer, Stage.SCORES):
            # Such models mask with the lowest number of their element type, some with a bias added.
            lowest = torch.finfo(self._probes.dtype).min
            scores = self._probes.visit(layer, Stage.SCORES, scores.masked_fill(scores < lowest / 2, float("-inf")))
        return self._probes.visit(layer, Stage.PATTERN, func(scores, *args[1:], **kwargs))


_SOFTMAXES = (functional.softmax, torch.softmax, torch.Tensor.softmax)


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scaled, softcapped and masked attention logits [batch, head, query, key]; masked entries are -inf."""
    scores = torch.matmul(query, _per_query_head(key, query.shape[1]).transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        n_query, n_key = scores.shape[-2:]
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril(n_key - n_query)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def expert_neurons(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """The neurons of every expert, `[token, expert, d_mlp]`, zero for experts that a token is not sent to."""
    gate_up, n_experts = module.gate_up_proj, int(module.num_experts)  # type: ignore[arg-type]
    assert isinstance(gate_up, torch.Tensor)
    neurons = hidden_states.new_zeros(hidden_states.shape[0], n_experts, gate_up.shape[1] // 2)
    for expert in range(n_experts):
        tokens = (top_k_index == expert).any(-1).nonzero()[:, 0]
        gate, up = functional.linear(hidden_states[tokens], gate_up[expert]).chunk(2, dim=-1)
        neurons[tokens, expert] = module.act_fn(gate) * up  # type: ignore[operator]
    return neurons


def routing_weights(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, n_experts: int) -> torch.Tensor:
    """The weight of every expert for every token, zero where a token is not sent. [token, expert]"""
    weights = top_k_weights.new_zeros(top_k_index.shape[0], n_experts)
    return weights.scatter(1, top_k_index, top_k_weights)


def _softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax in float32; a sink is one more logit per head that takes probability and gives nothing."""
    if sinks is None:
        return functional.softmax(scores, dim=-1, dtype=torch.float32)
    extra = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return functional.softmax(torch.cat([scores, extra], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


def _per_query_head(per_kv_head: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Keys or values repeated for the queries that share them: [batch, kv_head, ..] to [batch, head, ..]."""
    return per_kv_head.repeat_interleave(n_heads // per_kv_head.shape[1], dim=1)


def _swapped(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(1, 2)
