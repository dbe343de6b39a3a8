"""The resident model: a checkpoint whose adapter was solved and proved, ready to run.

Stages: load the weights; record one short forward; solve the algebra of the blocks; put the probes in place; build the
adapter; prove it. Only then does the server say that it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from patchclamp_server.adapters.adapter import Adapter, build_adapter, mlp_width
from patchclamp_server.adapters.algebra import solve
from patchclamp_server.adapters.facts import Dims, ModelFacts
from patchclamp_server.adapters.heads import count_heads
from patchclamp_server.adapters.layout import Layout, locate
from patchclamp_server.adapters.load import Checkpoint, ModelSource, load_checkpoint
from patchclamp_server.adapters.probes import Probes, Stage
from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.engine.messages import Progress
from patchclamp_server.engine.proof import prove, why_no_slots
from patchclamp_server.engine.runner import Runner, record


@dataclass(frozen=True, eq=False)
class Resident:
    """A proved model: facts for the front, a runner for the worker."""

    facts: ModelFacts
    tokenizer: Tokenizer | None
    runner: Runner

    @property
    def fingerprint(self) -> str:
        """What decides rounding: two results with different fingerprints may differ by it."""
        facts = self.facts
        dtype = str(facts.dtype).removeprefix("torch.")
        return f"torch-{torch.__version__} {','.join(facts.devices)} {dtype} {facts.revision}"


def load_resident(source: ModelSource, progress: Callable[[Progress], None]) -> Resident:
    """Loads and proves a model. Raises FailedPrecondition that says what does not fit."""
    checkpoint = load_checkpoint(source, lambda stage, share: progress(Progress(stage, share)))
    return make_resident(checkpoint, source.name, progress)


@torch.no_grad()
def make_resident(checkpoint: Checkpoint, name: str, progress: Callable[[Progress], None]) -> Resident:
    """Solves and proves the adapter of a loaded checkpoint."""
    model, config = checkpoint.model, checkpoint.model.config.get_text_config()
    progress(Progress("solving hook points", 0.7))
    layout = locate(model, config.num_hidden_layers)
    dims = read_dims(layout, config)
    ids = proof_ids(dims, _input_device(layout))
    recording = record(model, ids)
    algebra = solve(layout, recording, getattr(config, "final_logit_softcapping", None))
    probes = attach_probes(model, layout, ids)
    adapter = build_adapter(layout, algebra, recording, dims, probes)
    runner = Runner(adapter)
    progress(Progress("proving hook points", 0.8))
    prove(runner, ids, recording.logits)
    no_slots_reason = why_no_slots(runner, ids, recording.logits)
    progress(Progress("ready", 1.0))
    return Resident(_facts(adapter, checkpoint, name, no_slots_reason), checkpoint.tokenizer, runner)


def read_dims(layout: Layout, config: Any) -> Dims:
    """Sizes of the model, from its modules where they tell and from its configuration where they do not."""
    n_heads = int(config.num_attention_heads)
    counts = count_heads(layout.blocks[0].attention, n_heads)
    experts = layout.blocks[-1].mlp.experts
    return Dims(
        n_layers=len(layout.blocks),
        n_heads=n_heads,
        n_kv_heads=counts.n_kv_heads if counts else n_heads,
        d_model=int(config.hidden_size),
        d_head=counts.d_head if counts else 0,
        d_mlp=mlp_width(layout.blocks[-1]),
        d_vocab=int(config.vocab_size),
        n_ctx=_context(config),
        n_experts=int(getattr(experts, "num_experts", 0)) if experts is not None else 0,
        n_experts_per_token=int(getattr(config, "num_experts_per_tok", 0)) if experts is not None else 0,
    )


def proof_ids(dims: Dims, device: torch.device) -> torch.Tensor:
    """A short prompt [1, pos] of scattered ids. Its length differs from every head count, so that no axis is mistaken
    for another."""
    taken = {dims.n_heads, dims.n_kv_heads, dims.n_experts, dims.d_head, dims.d_model}
    length = next(length for length in range(7, 64) if length not in taken)
    return (torch.arange(1, length + 1, device=device) * 7919 % dims.d_vocab)[None]


def attach_probes(model: nn.Module, layout: Layout, ids: torch.Tensor) -> Probes:
    """Puts the attention and experts functions in place and finds out, by a forward, whether attention calls them."""
    probes = Probes()
    probes.dtype = model.dtype  # type: ignore[assignment]
    probes.layers = {block.attention.module: layer for layer, block in enumerate(layout.blocks)}
    probes.layers |= {block.mlp.experts: layer for layer, block in enumerate(layout.blocks) if block.mlp.experts}
    probes.rotates = _rotates(model)
    # A name of its own for every loaded model: the registry of transformers is shared by all models of a process.
    name = f"patchclamp-{uuid4().hex}"
    probes.register(name)
    if any(block.mlp.experts for block in layout.blocks):
        probes.experts_implementation = str(model.config._experts_implementation)  # type: ignore[union-attr]
        model.set_experts_implementation(name)  # type: ignore[operator]
    model.set_attn_implementation(name)  # type: ignore[operator]
    if _visited(model, probes, ids) < len(layout.blocks):
        model.set_attn_implementation("eager")  # type: ignore[operator]
        probes.catches_softmax = True
    return probes


@torch.no_grad()
def _visited(model: nn.Module, probes: Probes, ids: torch.Tensor) -> int:
    """How many layers call the attention function."""
    seen: set[int] = set()

    def see(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def handle(value: torch.Tensor) -> torch.Tensor:
            seen.add(layer)
            return value

        return handle

    probes.handlers = {(layer, Stage.ROT_Q): see(layer) for layer in probes.layers.values()}
    try:
        model(input_ids=ids, use_cache=False)
    except (ValueError, KeyError, AttributeError, TypeError):
        return 0
    finally:
        probes.handlers = {}
    return len(seen)


def _rotates(model: nn.Module) -> bool:
    named = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return named or bool(getattr(model.config, "rotary_dim", None))


def _context(config: Any) -> int:
    names = ("max_position_embeddings", "n_positions", "seq_length")
    return int(next((getattr(config, name) for name in names if getattr(config, name, None)), 2048))


def _input_device(layout: Layout) -> torch.device:
    weight = next(layout.embed.parameters())
    return torch.device("cpu") if weight.is_meta else weight.device


def _facts(adapter: Adapter, checkpoint: Checkpoint, name: str, no_slots_reason: str) -> ModelFacts:
    model = checkpoint.model
    return ModelFacts(
        name=name,
        revision=checkpoint.revision,
        architecture=type(model).__name__,
        dims=adapter.dims,
        dtype=model.dtype,
        devices=tuple(sorted({str(parameter.device) for parameter in model.parameters()})),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        parallel=adapter.parallel,
        sites=adapter.sites,
        absent=adapter.absent,
        no_slots_reason=no_slots_reason,
        end_ids=_end_ids(model),
    )


def _end_ids(model: nn.Module) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
