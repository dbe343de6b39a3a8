"""The tiny checkpoints are fit to prove hook points with: the same every time, and nothing in them is inert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, Family, build, family_named, prompt_ids

GOLDEN = Path(__file__).parent / "golden"
# Kernels may reassociate sums between builds of torch: a few units in the last place of logits near ten.
DRIFT = 1e-5

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def logits(family: Family, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = build(family)(torch.tensor([prompt])).logits[0]
    return output


@every_family
def test_every_family_is_reproducible(family: Family) -> None:
    prompt = prompt_ids(family)[0]
    first = logits(family, prompt)
    assert torch.equal(first, logits(family, prompt))
    with np.load(GOLDEN / f"{family.name}.npz") as golden:
        assert np.abs(first.numpy() - golden["hf_logits"]).max() < DRIFT


@every_family
def test_activations_and_logits_are_of_order_one(family: Family) -> None:
    with torch.inference_mode():
        output = build(family)(torch.tensor([prompt_ids(family)[0]]), output_hidden_states=True)
    for rows in (*output.hidden_states, output.logits):
        assert 0.2 < float(rows.std()) < 5


@every_family
def test_every_parameter_changes_the_logits(family: Family) -> None:
    model = build(family)
    model(torch.tensor([prompt_ids(family)[0]])).logits.square().sum().backward()
    inert = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or float(parameter.grad.abs().max()) < 1e-4
    ]
    assert inert == []


@every_family
def test_no_norm_weight_or_bias_is_trivial(family: Family) -> None:
    vectors = {name: value for name, value in build(family).named_parameters() if value.ndim == 1}
    assert vectors
    assert all(float(value.detach().std()) > 0.1 for value in vectors.values())


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 12}),
        ("gemma3", {"sliding_window": 64}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("llama", {"rms_norm_eps": 1e-6}),
        ("gpt2", {"layer_norm_epsilon": 1e-5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_sets_a_family_apart_matters_within_the_prompt(name: str, without: Mapping[str, object]) -> None:
    family = family_named(name)
    prompt = prompt_ids(family)[0]
    plainer = replace(family, settings={**family.settings, **without})
    assert float((logits(family, prompt) - logits(plainer, prompt)).abs().max()) > 0.01


@every_family
def test_the_prompts_differ_in_length_and_fit_the_vocabulary(family: Family) -> None:
    long, short = prompt_ids(family)
    assert len(long) == 7
    assert len(short) == 5
    assert max(*long, *short) < build(family).config.vocab_size
