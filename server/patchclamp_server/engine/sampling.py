"""Sampling: the next token of every row of a batch, each by rules of its own.

The order is that of `transformers`: repetition penalty, temperature, top-k, top-p. What is drawn depends on (seed,
sample, token index) alone: one uniform number from a counter-based generator (Philox, Salmon et al. 2011), put through
the inverse of the cumulative distribution with tokens from the most probable down. Neither neighbours nor the order of
requests matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingRules:
    """How one sample chooses. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample: int = 0

    @property
    def plain(self) -> bool:
        """Whether the most probable token is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def uniform(self, token_index: int) -> float:
        """The number in [0, 1) that decides token `token_index`."""
        bits = np.random.Philox(key=np.array([self.seed, self.sample], np.uint64), counter=token_index)
        return float(np.random.Generator(bits).random())


@dataclass(frozen=True)
class Choice:
    """What one row is asked: its rules, which token of the sample comes, and the tokens that are there already."""

    rules: SamplingRules
    token_index: int
    present: Sequence[int] = ()


def choose(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """The next token of each row. logits [rows, d_vocab]; int64 [rows]."""
    chosen = logits.argmax(-1)
    drawn = [row for row, choice in enumerate(choices) if not choice.rules.plain]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _drawn(logits.index_select(0, index), [choices[row] for row in drawn])
    return chosen


def _drawn(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    rules = [choice.rules for choice in choices]
    scores = _penalised(logits.float(), choices)

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # [rows, 1]

    # Temperature 0 takes the first of the sorted tokens, whatever it is divided by. With the largest score at 0, no
    # temperature is too small.
    temperature = column([rule.temperature or 1.0 for rule in rules])
    ordered = ((scores.double() - scores.double().amax(-1, keepdim=True)) / temperature).sort(
        dim=-1, descending=True, stable=True
    )
    probabilities = ordered.values.softmax(-1)
    rank = torch.arange(scores.shape[1], device=logits.device)
    most = torch.tensor([_most(rule, scores.shape[1]) for rule in rules], device=logits.device)[:, None]
    kept = torch.where(rank < most, probabilities, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    # A token stays while those before it have not reached p: the first always does.
    kept = torch.where(kept.cumsum(-1) - kept < column([rule.top_p for rule in rules]), kept, 0.0)
    total = kept.cumsum(-1)
    uniform = column([choice.rules.uniform(choice.token_index) for choice in choices])
    place = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1
    return ordered.indices.gather(1, torch.minimum(place, last))[:, 0]


def _most(rule: SamplingRules, d_vocab: int) -> int:
    """How many tokens may be drawn at most."""
    if rule.temperature == 0:
        return 1
    return rule.top_k or d_vocab


def _penalised(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Positive logits of tokens already present are divided by the penalty, negative ones multiplied (CTRL, Keskar et
    al. 2019)."""
    scores = logits.clone()
    for row, choice in enumerate(choices):
        penalty = choice.rules.repetition_penalty
        if penalty != 1 and choice.present:
            present = torch.tensor(sorted(set(choice.present)), device=logits.device)
            seen = scores[row, present]
            # Finite, however small or large the penalty.
            scores[row, present] = torch.nan_to_num(torch.where(seen > 0, seen / penalty, seen * penalty))
    return scores
