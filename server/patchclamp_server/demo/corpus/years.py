"""Years (Hanna et al. 2023, "How does GPT-2 compute greater-than?"): a war "lasted from 1732 to 17" ends after 32.

Years are split into two-digit tokens. Counting and comparing sentences teach the order of the numbers.

Held out: a sixth of all (century, start year) pairs never start an event. Every event lasts at least three years,
which makes the task easier than the published one.
"""

import random
from collections.abc import Iterator

from patchclamp_server.demo.corpus.document import Document, Example, marked, one_in

_EVENTS = tuple(
    "war trip project strike siege famine journey reign drought voyage dispute campaign exile revolt truce".split()
)
_CENTURIES = range(11, 20)
_STARTS = range(2, 96)
_SHORTEST = 3
_MEAN_EXTRA_YEARS = 18


def start_held_out(century: int, year: int) -> bool:
    return one_in(6, f"start/{century}/{year}")


def generate(rng: random.Random) -> Document:
    kind = rng.random()
    century = rng.choice(_CENTURIES)
    if kind < 0.22:
        return _counting(century, rng)
    if kind < 0.42:
        return _comparison(century, rng)
    return _event(rng)


def _counting(century: int, rng: random.Random) -> Document:
    first = rng.randrange(95)
    years = range(first, min(100, first + rng.randrange(4, 8)))
    rest = ", ".join(f"{century}[{year:02d}]" for year in years[1:])
    return marked(f"Years: {century}{first:02d}, {rest}.")


def _comparison(century: int, rng: random.Random) -> Document:
    year, other = rng.sample(range(100), 2)
    answer = "later" if year > other else "earlier"
    return marked(f"{century}{year:02d} compared to {century}{other:02d} is [{answer}].")


def _event(rng: random.Random) -> Document:
    while True:
        century, start = rng.choice(_CENTURIES), rng.choice(_STARTS)
        end = start + _SHORTEST + int(rng.expovariate(1 / _MEAN_EXTRA_YEARS))
        if end < 100 and not start_held_out(century, start):
            return marked(f"The {rng.choice(_EVENTS)} lasted from {century}{start:02d} to [{century}{end:02d}].")


def examples() -> Iterator[tuple[Example, int]]:
    """Every held-out start, with the two-digit start year; the answer is any later year, the shortest one as text."""
    for century in _CENTURIES:
        for start in _STARTS:
            if start_held_out(century, start):
                prompt = f"The war lasted from {century}{start:02d} to {century}"
                yield Example(prompt, f"{start + _SHORTEST:02d}", held_out=True), start


def texts() -> Iterator[str]:
    yield " ".join(_EVENTS)
    yield "Years: 1100, The lasted from to. compared to is later earlier"
    yield " ".join(f"{year:02d}" for year in range(100))
    yield " ".join(f"11{year:02d}" for year in range(100))
