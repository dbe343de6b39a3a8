"""Sampling follows the rules of each row, and is a function of seed, sample and token index alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from patchclamp_server.engine.sampling import Choice, SamplingRules, choose

D_VOCAB = 40


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, D_VOCAB, generator=torch.Generator().manual_seed(seed))


def draws(row: torch.Tensor, rules: SamplingRules, count: int, present: tuple[int, ...] = ()) -> Counter[int]:
    rows = row.expand(count, -1)
    return Counter(choose(rows, [Choice(rules, index, present) for index in range(count)]).tolist())


def test_greedy_takes_the_most_probable_token_of_every_row() -> None:
    rows = logits(5)
    assert torch.equal(choose(rows, [Choice(SamplingRules(), 0)] * 5), rows.argmax(-1))


@pytest.mark.parametrize(
    "rules",
    [
        SamplingRules(temperature=0.7),
        SamplingRules(temperature=1.5, top_k=5),
        SamplingRules(temperature=1.0, top_p=0.6),
        SamplingRules(temperature=0.8, top_k=12, top_p=0.8),
        SamplingRules(temperature=0.9, top_k=12, top_p=0.8, repetition_penalty=1.6),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_distribution_that_transformers_makes(rules: SamplingRules) -> None:
    row, present, count = logits()[0], (3, 7, 11), 4000
    processors = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(rules.repetition_penalty),
        TemperatureLogitsWarper(rules.temperature),
    ])  # fmt: skip
    if rules.top_k:
        processors.append(TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        processors.append(TopPLogitsWarper(rules.top_p))
    expected = processors(torch.tensor([present]), row[None].clone()).softmax(-1)[0]
    found = draws(row, rules, count, present)
    assert set(found) <= set(expected.nonzero()[:, 0].tolist())
    for token, probability in enumerate(expected.tolist()):
        # Five standard deviations of a binomial share; of the rarest tokens a few may come without being expected.
        spread = 5 * (probability * (1 - probability) / count) ** 0.5 + 3 / count
        assert found[token] / count == pytest.approx(probability, abs=spread)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    rows = logits(4, seed=3)
    choices = [Choice(SamplingRules(1.0, seed=9, sample=row), 5) for row in range(4)]
    together = choose(rows, choices).tolist()
    alone = [int(choose(rows[row : row + 1], [choices[row]])) for row in range(4)]
    assert together == alone


def test_seed_sample_and_index_each_change_the_draw() -> None:
    base = SamplingRules(1.0, seed=4)
    numbers = {
        base.uniform(0),
        base.uniform(1),
        SamplingRules(1.0, seed=5).uniform(0),
        SamplingRules(1.0, seed=4, sample=1).uniform(0),
    }
    assert len(numbers) == 4
    assert base.uniform(7) == SamplingRules(1.0, seed=4).uniform(7)


def test_the_largest_seed_is_accepted() -> None:
    assert 0 <= SamplingRules(1.0, seed=2**64 - 1).uniform(2**31) < 1


def test_a_penalty_acts_on_greedy_choices_too() -> None:
    row = torch.zeros(1, D_VOCAB)
    row[0, 3], row[0, 4] = 2.0, 1.5
    penalised = SamplingRules(repetition_penalty=2.0)
    assert int(choose(row, [Choice(penalised, 0, present=(3,))])) == 4
    assert int(choose(row, [Choice(penalised, 0)])) == 3


def test_top_p_keeps_the_first_token_however_small_p_is() -> None:
    row = logits()
    rules = SamplingRules(temperature=1.0, top_p=1e-9)
    assert draws(row[0], rules, 20) == {int(row.argmax()): 20}


@pytest.mark.parametrize(
    "rules",
    [
        SamplingRules(5e-324),
        SamplingRules(1.0, repetition_penalty=1e-300),
        SamplingRules(1.0, repetition_penalty=1e300),
    ],
    ids=str,
)
def test_extreme_rules_still_choose_a_token_of_the_vocabulary(rules: SamplingRules) -> None:
    chosen = choose(logits(4), [Choice(rules, index, present=(1, 2, 3)) for index in range(4)])
    assert ((chosen >= 0) & (chosen < D_VOCAB)).all()


def test_a_vanishing_temperature_is_greedy() -> None:
    rows = logits(4)
    assert torch.equal(choose(rows, [Choice(SamplingRules(5e-324), 0)] * 4), rows.argmax(-1))
