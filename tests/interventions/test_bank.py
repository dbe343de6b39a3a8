"""Slot 0 is zero, equal vectors share a slot, and slots without users are filled anew."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.running import CPU, PROMPTS, edits_of, model, planned
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.bank import Bank
from patchclamp_server.interventions.ops import Ablate, AblateEverywhere, SetCoordinate, Target


def test_zero_is_slot_zero_and_stays_there() -> None:
    bank = Bank(3, torch.float32, CPU, 2)
    slots = bank.acquire(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-0.0, 0.0, 0.0], [4.0, 5.0, 6.0]]))
    assert slots[0] == slots[2] == 0 and slots[1] != slots[3]
    bank.release(slots)
    assert len(bank) == 0 and not bank.vectors[0].any()


def test_equal_vectors_share_a_slot() -> None:
    bank = Bank(3, torch.float32, CPU)
    first = bank.acquire(torch.tensor([[1.0, 2.0, 3.0]]))
    second = bank.acquire(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.5]], dtype=torch.float64))
    assert first[0] == second[0] != second[1] and len(bank) == 2
    bank.release(first)
    assert torch.equal(bank.vectors[second[0]], torch.tensor([1.0, 2.0, 3.0]))


def test_narrower_vectors_end_in_zeros() -> None:
    bank = Bank(4, torch.float32, CPU)
    bank.release(bank.acquire(torch.full((1, 4), 9.0)))
    (slot,) = bank.acquire(torch.tensor([[1.0, 2.0]]))
    assert bank.vectors[slot].tolist() == [1.0, 2.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=12))
def test_what_is_held_is_kept_and_what_is_not_is_reused(steps: list[list[int]]) -> None:
    """Batches of vectors come; every other step the oldest goes."""
    bank, held = Bank(2, torch.float32, CPU, 1), list[tuple[list[int], list[int]]]()
    most = 0
    for turn, numbers in enumerate(steps):
        vectors = torch.tensor([[n, 2.0 * n] for n in numbers]).reshape(-1, 2)
        held.append((numbers, bank.acquire(vectors)))
        if turn % 2:
            bank.release(held.pop(0)[1])
        for kept, slots in held:
            assert [bank.vectors[slot].tolist() for slot in slots] == [[n, 2.0 * n] for n in kept]
        assert len(bank) == len({n for kept, _ in held for n in kept} - {0})
        most = max(most, len(bank))
    assert bank.vectors.shape[0] <= max(2 * (most + 5), 1)


def test_one_direction_at_every_site_of_every_row_is_held_once() -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    target = Target((HookPoint(Site.RESID_PRE, 0), HookPoint(Site.RESID_PRE, 1)))
    rows = [
        edits_of(PROMPTS[0], AblateEverywhere(direction)),
        edits_of(
            PROMPTS[1], Ablate(target, direction * 4)
        ),  # a power of two, so that the unit vector has the same bits
        edits_of(PROMPTS[2], SetCoordinate(target, direction, 2.0)),
    ]
    assert planned(model("gpt2"), rows).vectors_held == 1
