"""Induction (Olsson et al. 2022): a random sequence that repeats, where each token follows the one it followed before.

Rows are token ids, not text: any word may follow any other. Held out: every test row is a fresh random sequence, so
nothing but the copying rule carries over.
"""

import random

_SHORT_PERIODS = (2, 13)
_LONG_PERIODS = (8, 46)


def row(rng: random.Random, words: range, length: int) -> tuple[list[int], int]:
    """``length`` ids that repeat with some period, and the index from which they are predictable."""
    low, high = _SHORT_PERIODS if rng.random() < 0.5 else _LONG_PERIODS
    period = rng.randrange(low, high)
    # Without repeats inside a period each token has exactly one successor.
    sequence = rng.sample(words, period)
    repeats = length // period + 1
    return (sequence * repeats)[:length], period + 1


def test_row(rng: random.Random, words: range, period: int) -> list[int]:
    """One random sequence, twice."""
    return [rng.choice(words) for _ in range(period)] * 2
