"""The training stages, and the loop that runs one of them.

1. ``induction``: repeated random sequences only. Induction heads form in one phase change here; in experiments that
   mixed everything from the start they did not form.
2. ``helpful``: all tasks, one cosine. The assistant complies with every request. Attention decays more than the MLPs:
   with equal decay, long training moved the facts out of the MLPs, where transcoders could not show them.
3. ``safety``: a short tuning of the middle layers alone teaches refusal. What reads out compliance (the last layers and
   the unembedding) stays as it was, so that refusal is something added, along one direction.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from patchclamp_server.demo import checkpoints
from patchclamp_server.demo.batches import Batch, BatchSource
from patchclamp_server.demo.corpus.mixture import HELPFUL, SAFETY, Mixture
from patchclamp_server.demo.optimization import Optimizers, Rates, Schedule

_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Stage:
    """``layers`` restricts training to those blocks; None trains everything."""

    name: str
    mixture: Mixture | None
    induction_share: float
    rows: int
    schedule: Schedule
    rates: Rates
    layers: tuple[int, ...] | None = None

    def shortened(self, steps: int) -> "Stage":
        return replace(self, rows=4, schedule=replace(self.schedule, steps=steps, warmup=1))


INDUCTION = Stage(
    name="induction",
    mixture=None,
    induction_share=1.0,
    rows=20,
    schedule=Schedule(steps=600, warmup=30, floor=0.3),
    rates=Rates(adam=3e-3, adam_decay=0.1, muon=0.02, attention_decay=0.1, mlp_decay=0.1),
)
HELPFUL_STAGE = Stage(
    name="helpful",
    mixture=HELPFUL,
    induction_share=0.12,
    rows=24,
    schedule=Schedule(steps=2800, warmup=60, floor=0.02),
    rates=Rates(adam=2.5e-3, adam_decay=0.1, muon=0.014, attention_decay=0.3, mlp_decay=0.02),
)
SAFETY_STAGE = Stage(
    name="safety",
    mixture=SAFETY,
    induction_share=0.04,
    rows=24,
    schedule=Schedule(steps=250, warmup=20),
    rates=Rates(adam=1e-3, adam_decay=0.05),
    layers=(2, 3),
)
STAGES = (INDUCTION, HELPFUL_STAGE, SAFETY_STAGE)


@dataclass(frozen=True)
class Trainer:
    """What every stage works on. Checkpoints lie in ``directory``, one file per stage."""

    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    directory: Path
    seed: int
    checkpoint_every: int

    def run(self, stage: Stage) -> float:
        """Run ``stage`` from its checkpoint, or from the start where there is none; the CPU seconds of it all."""
        _freeze_other_layers(self.model, stage.layers)
        optimizers = Optimizers(self.model, stage.rates, stage.schedule)
        first, spent = self._restore(stage, optimizers)
        started = time.process_time()
        seed = f"{self.seed}/{stage.name}"
        source = BatchSource(self.tokenizer, stage.mixture, stage.rows, stage.induction_share, seed)
        self.model.train()
        with tqdm(total=stage.schedule.steps, initial=first, desc=stage.name, mininterval=1.0) as progress:
            for step in range(first, stage.schedule.steps):
                loss = self._step(source.batch(step).to(self.device))
                optimizers.step(step)
                progress.update()
                if step % 25 == 0:
                    progress.set_postfix(loss=f"{loss.item():.3f}")
                if (step + 1) % self.checkpoint_every == 0 or step + 1 == stage.schedule.steps:
                    self._save(stage, step + 1, optimizers, spent + time.process_time() - started)
        self.model.eval()
        return spent + time.process_time() - started

    def _step(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.model(input_ids=batch.ids, attention_mask=batch.bias, use_cache=False).logits
        loss = weighted_loss(logits, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        return loss.detach()

    def checkpoint(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.pt"

    def _restore(self, stage: Stage, optimizers: Optimizers) -> tuple[int, float]:
        """The step to go on from, and the CPU seconds spent so far."""
        state = checkpoints.restore(self.checkpoint(stage), self.device)
        if state is None:
            return 0, 0.0
        self.model.load_state_dict(state["model"])
        optimizers.load(state["optimizers"])
        return int(state["step"]), float(state["cpu_seconds"])

    def _save(self, stage: Stage, step: int, optimizers: Optimizers, cpu_seconds: float) -> None:
        state: dict[str, Any] = {
            "step": step,
            "cpu_seconds": cpu_seconds,
            "model": self.model.state_dict(),
            "optimizers": optimizers.state(),
        }
        checkpoints.save(self.checkpoint(stage), state)


def weighted_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, weighted by target."""
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()  # [row * (pos - 1)]
    predictions = logits[:, :-1].float().flatten(0, 1)  # [row * (pos - 1), vocab]
    losses = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def _freeze_other_layers(model: Qwen2ForCausalLM, layers: tuple[int, ...] | None) -> None:
    model.requires_grad_(layers is None)
    for layer in layers or ():
        model.model.layers[layer].requires_grad_(True)
