"""Training batches: texts packed into rows, with a weight for every token and a mask that keeps texts apart.

A batch is a pure function of the seed, the stage and the step, so an interrupted run resumes on the very same data.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from patchclamp_server.demo.corpus import induction
from patchclamp_server.demo.corpus.document import Document
from patchclamp_server.demo.corpus.mixture import Mixture
from patchclamp_server.demo.tokenizer import SPECIAL_TOKENS

ROW_LENGTH = 96
_ANSWER_WEIGHT = 1.0
_CONTEXT_WEIGHT = 0.25
_INDUCTION_WEIGHT = 0.5
# Some rows let later texts see earlier ones, as a conversation of several turns does.
_OPEN_ROW_SHARE = 0.15
# Texts drawn in a row that fit nowhere, after which the rows count as full.
_PATIENCE = 6


@dataclass(frozen=True)
class Batch:
    """ids and weights: [row, pos]; mask: [row, 1, query, key], True where attention may look."""

    ids: Tensor
    weights: Tensor
    mask: Tensor

    @property
    def bias(self) -> Tensor:
        """The mask as a term to add to the attention scores: zero where attention may look."""
        return torch.where(self.mask, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.weights.to(device), self.mask.to(device))


@dataclass(frozen=True)
class BatchSource:
    """Draws batches of ``rows`` rows, of which about ``induction_share`` are induction rows."""

    tokenizer: PreTrainedTokenizerFast
    mixture: Mixture | None
    rows: int
    induction_share: float
    seed: str

    def batch(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        n_induction = sum(rng.random() < self.induction_share for _ in range(self.rows))
        packed = [self._induction_row(rng) for _ in range(n_induction)]
        packed += self._text_rows(self.rows - n_induction, rng)
        ids, weights, texts = (torch.tensor(column) for column in zip(*packed, strict=True))  # each [row, pos]
        same_text = texts[:, :, None] == texts[:, None, :]  # [row, query, key]
        causal = torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril()
        return Batch(ids, weights, (same_text & causal)[:, None])

    def _induction_row(self, rng: random.Random) -> tuple[list[int], list[float], list[int]]:
        words = range(len(SPECIAL_TOKENS), len(self.tokenizer))
        sequence, predictable_from = induction.row(rng, words, ROW_LENGTH - 1)
        bos = self.tokenizer.bos_token_id
        weights = [0.0] * (predictable_from + 1) + [_INDUCTION_WEIGHT] * (ROW_LENGTH - predictable_from - 1)
        return [bos, *sequence], weights, [0] * ROW_LENGTH

    def _text_rows(self, count: int, rng: random.Random) -> list[tuple[list[int], list[float], list[int]]]:
        if not count or self.mixture is None:
            return []
        rows: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(count)]
        used = [0] * count
        misses = 0
        while misses < _PATIENCE:
            drawn = [self.mixture.sample(rng) for _ in range(count)]
            for ids, weights in encode(self.tokenizer, drawn):
                free = [index for index in range(count) if used[index] + len(ids) <= ROW_LENGTH]
                if not free:
                    misses += 1
                    continue
                rows[free[0]].append((ids, weights))
                used[free[0]] += len(ids)
        return [_join(texts, self.tokenizer, isolated=rng.random() >= _OPEN_ROW_SHARE) for texts in rows]


def _join(
    texts: list[tuple[list[int], list[float]]], tokenizer: PreTrainedTokenizerFast, *, isolated: bool
) -> tuple[list[int], list[float], list[int]]:
    """One padded row. The third list numbers the text of each position; padding is a text of its own."""
    ids: list[int] = []
    weights: list[float] = []
    numbers: list[int] = []
    for number, (text_ids, text_weights) in enumerate(texts):
        ids += text_ids
        weights += text_weights
        numbers += [number if isolated else 0] * len(text_ids)
    padding = ROW_LENGTH - len(ids)
    pad = tokenizer.pad_token_id
    return ids + [pad] * padding, weights + [0.0] * padding, numbers + [-1] * padding


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[tuple[list[int], list[float]]]:
    """Ids of each document, with the weight of each id as a prediction target."""
    # A tokenizer goes on padding once it was asked to, for prompts that are read together.
    tokenizer.backend_tokenizer.no_padding()
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return [
        (encoding.ids, [_weight(offsets, document.answers) for offsets in encoding.offsets])
        for document, encoding in zip(documents, encodings, strict=True)
    ]


def _weight(offsets: tuple[int, int], answers: tuple[tuple[int, int], ...]) -> float:
    start, end = offsets
    if start == end:
        return 0.0  # the bos token, which nothing predicts
    inside = any(start < answer_end and end > answer_start for answer_start, answer_end in answers)
    return _ANSWER_WEIGHT if inside else _CONTEXT_WEIGHT
