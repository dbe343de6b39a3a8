"""Sampling: the next token of every row of a batch, each by rules of its own.

The order is that of `transformers`: repetition penalty, temperature, top-k, top-p. What is drawn depends on (seed,
sample, token index) alone: one uniform number from a counter-based generator (Philox, Salmon et al. 2011), put through
the inverse of the cumulative distribution over the tokens that are left, in the order of the vocabulary. Neither
neighbours nor the order of requests matter.
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

    # With the largest score at 0, no temperature is too small.
    temperature = column([rule.temperature or 1.0 for rule in rules])
    probabilities = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    probabilities = _among_top_k(probabilities, rules)
    probabilities = _within_top_p(probabilities, rules)
    total = probabilities.cumsum(-1)
    uniform = column([choice.rules.uniform(choice.token_index) for choice in choices])
    place = torch.searchsorted(total, uniform * total[:, -1:], right=True)[:, 0]
    # Scores that are not finite are refused before; an index must not leave the vocabulary whatever they are.
    place = place.clamp(max=logits.shape[1] - 1)
    greedy = torch.tensor([rule.temperature == 0 for rule in rules], device=logits.device)
    return torch.where(greedy, scores.argmax(-1), place)


def _among_top_k(probabilities: torch.Tensor, rules: Sequence[SamplingRules]) -> torch.Tensor:
    """Zero for all but the k most probable tokens, and those as probable as the last of them."""
    most = max(rule.top_k for rule in rules)
    if not most:
        return probabilities
    top = probabilities.topk(most, dim=-1).values
    last = [rule.top_k - 1 if rule.top_k else most - 1 for rule in rules]
    least = top.gather(1, torch.tensor(last, device=top.device)[:, None])
    unlimited = torch.tensor([not rule.top_k for rule in rules], device=top.device)[:, None]
    return torch.where(unlimited | (probabilities >= least), probabilities, 0.0)


def _within_top_p(probabilities: torch.Tensor, rules: Sequence[SamplingRules]) -> torch.Tensor:
    """Zero for all but the most probable tokens that together reach p, and those as probable as the last of them."""
    if all(rule.top_p >= 1 for rule in rules):
        return probabilities
    share = torch.tensor([rule.top_p for rule in rules], dtype=torch.float64, device=probabilities.device)[:, None]
    ordered = probabilities.sort(-1, descending=True).values
    ordered = ordered / ordered.sum(-1, keepdim=True)
    # A token stays while those before it have not reached p: the first always does.
    kept = (ordered.cumsum(-1) - ordered < share).sum(-1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, kept - 1) * probabilities.sum(-1, keepdim=True)
    # Not below what rounding makes of the last one.
    return torch.where((share >= 1) | (probabilities >= least * (1 - 1e-12)), probabilities, 0.0)


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
