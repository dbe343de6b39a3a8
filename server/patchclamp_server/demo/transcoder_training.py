"""Training of the transcoders, after the model is finished and rounded.

1. Every transcoder alone learns what its MLP does: BatchTopK (Bussmann et al. 2024), where a batch keeps the k largest
   activations per token on average, k falling from 4k to k. The running threshold of that choice becomes JumpReLU's.
   Features start at single real examples, an input as encoder and its output as decoder row, and dead ones start again
   at badly reconstructed examples.
2. A short tuning with all MLPs replaced at once: KL to the model's own predictions, plus the first objective.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp_server.demo import checkpoints
from patchclamp_server.demo.batches import Batch, BatchSource
from patchclamp_server.demo.corpus.mixture import DEPLOYED
from patchclamp_server.demo.transcoders import TranscoderSet, TranscoderShape, mlps_recorded, mlps_replaced

_INDUCTION_SHARE = 0.12
_CLIP_NORM = 1.0
_WARMUP = 30
# The last part of local training, in which the rate falls to zero.
_DECAY_SHARE = 0.4
# Steps without firing after which a feature counts as dead, and between two rounds of new starts.
_DEAD_AFTER = 25
_RESTART_EVERY = 50
_MAX_REVIVED = 24
_REVIVAL_WEIGHT = 1 / 16
_THRESHOLD_SAMPLE = 384
_LOCAL_WEIGHT = 0.5
_CONTEXT_WEIGHT = 0.2


@dataclass(frozen=True)
class TranscoderStage:
    """``steps`` of local training, then ``tuning_steps`` end to end on half as many ``rows``."""

    name: str
    cross_layer: bool
    n_features: int
    active: int
    steps: int
    tuning_steps: int
    rows: int = 20
    rate: float = 2e-3
    tuning_rate: float = 4e-4

    def shortened(self, steps: int) -> "TranscoderStage":
        return replace(self, n_features=32, active=4, steps=steps, tuning_steps=steps, rows=4)


PER_LAYER = TranscoderStage("per_layer", cross_layer=False, n_features=1024, active=16, steps=700, tuning_steps=350)
CROSS_LAYER = TranscoderStage("cross_layer", cross_layer=True, n_features=640, active=16, steps=500, tuning_steps=450)
TRANSCODER_STAGES = (PER_LAYER, CROSS_LAYER)


@dataclass(frozen=True)
class Recorded:
    """What the model does on one batch: for every layer the MLP inputs and outputs that count, [token, d_model]."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class TranscoderTrainer:
    """Trains one set of transcoders on a finished ``model``."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        stage: TranscoderStage,
        directory: Path,
        seed: int,
        checkpoint_every: int,
    ) -> None:
        config = model.config
        shape = TranscoderShape(config.num_hidden_layers, stage.n_features, config.hidden_size, stage.cross_layer)
        self._model = model.eval().requires_grad_(False)
        self._stage = stage
        self._unexplained = torch.tensor([tokenizer.pad_token_id, tokenizer.bos_token_id], device=model.device)
        self._source = BatchSource(tokenizer, DEPLOYED, stage.rows, _INDUCTION_SHARE, f"{seed}/{stage.name}")
        self._checkpoint = directory / f"{stage.name}.pt"
        self._checkpoint_every = checkpoint_every
        self._device = next(model.parameters()).device
        torch.manual_seed(seed)
        self.transcoders = TranscoderSet(shape).to(self._device)
        self._idle_steps = torch.zeros(shape.n_layers, shape.n_features, device=self._device)
        self._optimizer = torch.optim.Adam(self.transcoders.parameters(), lr=stage.rate)

    def run(self) -> float:
        """Train from the last checkpoint, or from the start, and fold the scales in; the CPU seconds of it all."""
        stage = self._stage
        total = stage.steps + stage.tuning_steps
        first, spent = self._restore()
        started = time.process_time()
        with tqdm(total=total, initial=first, desc=f"{stage.name} transcoders", mininterval=1.0) as progress:
            for step in range(first, total):
                loss = self._local_step(step) if step < stage.steps else self._tuning_step(step)
                progress.update()
                if step % 25 == 0:
                    progress.set_postfix(loss=f"{loss:.4f}", idle=int((self._idle_steps > _DEAD_AFTER).sum()))
                if (step + 1) % self._checkpoint_every == 0 or step + 1 == total:
                    self._save(step + 1, spent + time.process_time() - started)
        self.transcoders.fold()
        return spent + time.process_time() - started

    def _restore(self) -> tuple[int, float]:
        state = checkpoints.restore(self._checkpoint, self._device)
        if state is None:
            _start_at_examples(self.transcoders, self._record(-1), self._stage.active)
            return 0, 0.0
        self.transcoders.load_state_dict(state["transcoders"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._idle_steps = state["idle_steps"]
        return int(state["step"]), float(state["cpu_seconds"])

    def _save(self, step: int, cpu_seconds: float) -> None:
        state: dict[str, Any] = {
            "step": step,
            "cpu_seconds": cpu_seconds,
            "transcoders": self.transcoders.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "idle_steps": self._idle_steps,
        }
        checkpoints.save(self._checkpoint, state)

    @torch.no_grad()
    def _record(self, step: int) -> Recorded:
        batch = self._source.batch(step).to(self._device)
        real = self._explained(batch)
        with torch.autocast(self._device.type, dtype=torch.bfloat16), mlps_recorded(self._model) as (inputs, outputs):
            self._model.model(input_ids=batch.ids, attention_mask=batch.bias, use_cache=False)
        return Recorded([x[real].float() for x in inputs], [y[real].float() for y in outputs])

    def _explained(self, batch: Batch) -> Tensor:
        """[row, pos], False at padding and where a text begins."""
        return ~torch.isin(batch.ids, self._unexplained)

    def _local_step(self, step: int) -> float:
        recorded = self._record(step)
        remaining = (self._stage.steps - step) / self._stage.steps
        self._set_rate(self._stage.rate * min(1, (step + 1) / _WARMUP, remaining / _DECAY_SHARE))
        pre = [self.transcoders.pre_activations(layer, x) for layer, x in enumerate(recorded.inputs)]
        self._move_thresholds(pre, step)
        features = [p * (p > threshold) for p, threshold in zip(pre, self.transcoders.threshold, strict=True)]
        errors = self._errors(features, recorded.outputs)
        self._count_idle(features)
        revivals = [self._revival(layer, p, error) for layer, (p, error) in enumerate(zip(pre, errors, strict=True))]
        loss = _mean_square(errors) + torch.stack(revivals).sum()
        self._descend(loss)
        if (step + 1) % _RESTART_EVERY == 0 and step < 0.7 * self._stage.steps:
            self._restart_dead(recorded, errors)
        self._normalise_decoders()
        return loss.item() / len(errors)

    def _errors(self, features: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """What is missing from every MLP output, in units of its scale: for every layer [token, d_model]."""
        scales = self.transcoders.output_scale
        return [(y - self.transcoders.output(layer, features)) / scales[layer] for layer, y in enumerate(outputs)]

    @torch.no_grad()
    def _move_thresholds(self, pre: list[Tensor], step: int) -> None:
        """Let the thresholds follow the activation that keeps k of them per token."""
        annealed = self._stage.active * (1 + 3 * max(0.0, 1 - step / (0.3 * self._stage.steps)))
        for threshold, activations in zip(self.transcoders.threshold, pre, strict=True):
            sample = activations[torch.randint(len(activations), (_THRESHOLD_SAMPLE,), device=activations.device)]
            kept = sample.flatten().topk(int(annealed * _THRESHOLD_SAMPLE)).values[-1].clamp(min=0)
            threshold.copy_(kept if step == 0 else 0.9 * threshold + 0.1 * kept)

    @torch.no_grad()
    def _count_idle(self, features: list[Tensor]) -> None:
        fired = torch.stack([(activations > 0).any(0) for activations in features])  # [layer, feature]
        self._idle_steps = torch.where(fired, 0, self._idle_steps + 1)

    def _revival(self, layer: int, pre: Tensor, error: Tensor) -> Tensor:
        """The auxiliary loss of Gao et al. 2024: let the dead features explain what the others leave."""
        dead = self._idle_steps[layer] > _DEAD_AFTER
        revived = min(_MAX_REVIVED, int(dead.sum()))
        if not revived:
            return error.new_zeros(())
        strongest = torch.relu(pre[:, dead]).topk(revived, -1)
        activations = torch.zeros_like(pre[:, dead]).scatter(1, strongest.indices, strongest.values)
        explained = activations @ self.transcoders.W_dec[layer][dead, 0]
        return _REVIVAL_WEIGHT * (error.detach() - explained).pow(2).sum(-1).mean()

    @torch.no_grad()
    def _restart_dead(self, recorded: Recorded, errors: list[Tensor]) -> None:
        for layer, (x, error) in enumerate(zip(recorded.inputs, errors, strict=True)):
            dead = (self._idle_steps[layer] > _DEAD_AFTER).nonzero()[:, 0]
            if not len(dead):
                continue
            chosen = torch.multinomial(error.pow(2).sum(-1), len(dead), replacement=True)
            _place(self.transcoders, layer, dead, x, chosen, error[chosen], gain=0.5)
            self._idle_steps[layer, dead] = 0
            self._forget_moments(layer, dead)

    def _forget_moments(self, layer: int, features: Tensor) -> None:
        transcoders = self.transcoders
        for parameter, index in (
            (transcoders.W_enc, (layer, features)),
            (transcoders.b_enc, (layer, features)),
            (transcoders.W_dec[layer], (features,)),
        ):
            moments = self._optimizer.state[parameter]
            moments["exp_avg"][index] = 0
            moments["exp_avg_sq"][index] = 0

    @torch.no_grad()
    def _normalise_decoders(self) -> None:
        for decoder in self.transcoders.W_dec:
            decoder.div_(decoder.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None])

    def _tuning_step(self, step: int) -> float:
        batch = self._source.batch(step).to(self._device)
        batch = Batch(*(column[: len(column) // 2] for column in (batch.ids, batch.weights, batch.mask)))
        remaining = 1 - (step - self._stage.steps) / self._stage.tuning_steps
        self._set_rate(self._stage.tuning_rate * remaining)
        arguments = {"input_ids": batch.ids, "attention_mask": batch.bias.float(), "use_cache": False}
        with torch.no_grad(), mlps_recorded(self._model) as (inputs, outputs):
            truth = self._model(**arguments).logits.log_softmax(-1)
        with mlps_replaced(self._model, self.transcoders):
            replaced = self._model(**arguments).logits.log_softmax(-1)
        real = self._explained(batch)
        features = [self.transcoders.features(layer, x[real]) for layer, x in enumerate(inputs)]
        local = _mean_square(self._errors(features, [y[real] for y in outputs]))
        self._count_idle(features)
        loss = _weighted_divergence(truth, replaced, batch, real) + _LOCAL_WEIGHT * local
        self._descend(loss)
        return loss.item()

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _descend(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.transcoders.parameters(), _CLIP_NORM)
        self._optimizer.step()


def _mean_square(errors: list[Tensor]) -> Tensor:
    return torch.stack([error.pow(2).sum(-1).mean() for error in errors]).sum()


def _weighted_divergence(truth: Tensor, replaced: Tensor, batch: Batch, real: Tensor) -> Tensor:
    """Mean KL(truth || replaced) over ``real`` tokens [row, pos], those before an answer counting most."""
    weights = real.float()  # [row, pos]
    before_answer = batch.weights[:, 1:] == 1
    weights[:, :-1] *= _CONTEXT_WEIGHT + (1 - _CONTEXT_WEIGHT) * before_answer
    divergence = (truth.exp() * (truth - replaced)).sum(-1)
    return (divergence * weights).sum() / weights.sum()


@torch.no_grad()
def _start_at_examples(transcoders: TranscoderSet, recorded: Recorded, active: int) -> None:
    """Every feature starts at one example; the scale of all is fitted so that the sum of the active ones is right."""
    for layer, (x, y) in enumerate(zip(recorded.inputs, recorded.outputs, strict=True)):
        transcoders.input_scale[layer] = x.pow(2).sum(-1).mean().sqrt()
        transcoders.output_scale[layer] = y.pow(2).sum(-1).mean().sqrt()
        transcoders.b_dec[layer] = y.mean(0) / transcoders.output_scale[layer]
    everything = torch.arange(transcoders.shape.n_features, device=x.device)
    for layer, (x, y) in enumerate(zip(recorded.inputs, recorded.outputs, strict=True)):
        missing = y / transcoders.output_scale[layer] - transcoders.b_dec[layer]
        # Rows that repeat count once: the same first tokens of a text are the same example again and again.
        _, example, count = x.round(decimals=3).unique(dim=0, return_inverse=True, return_counts=True)
        chosen = torch.multinomial(1 / count[example].float(), len(everything), replacement=len(x) < len(everything))
        _place(transcoders, layer, everything, x, chosen, missing[chosen], gain=1.0)
        pre = torch.relu(transcoders.pre_activations(layer, x))
        strongest = pre.topk(active, -1)
        kept = torch.zeros_like(pre).scatter(1, strongest.indices, strongest.values)
        guess = kept @ transcoders.W_dec[layer][:, 0]
        gain = ((guess * missing).sum() / (guess * guess).sum()).clamp(0.02, 2.0)
        transcoders.W_enc[layer] *= gain
        transcoders.b_enc[layer] *= gain


def _place(
    transcoders: TranscoderSet, layer: int, features: Tensor, x: Tensor, chosen: Tensor, missing: Tensor, gain: float
) -> None:
    """Point ``features`` of ``layer`` from the examples ``x[chosen]`` to what is ``missing`` there."""
    mean = x.mean(0)
    encoders = torch.nn.functional.normalize(x[chosen] - mean, dim=-1) * gain
    transcoders.W_enc[layer, features] = encoders
    transcoders.b_enc[layer, features] = -encoders @ mean / transcoders.input_scale[layer]
    transcoders.W_dec[layer][features] = 0
    transcoders.W_dec[layer][features, 0] = torch.nn.functional.normalize(missing, dim=-1, eps=1e-6)
