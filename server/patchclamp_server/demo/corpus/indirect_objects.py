"""Indirect objects (Wang et al. 2022): "When Mary and John went to the store, John gave a drink to" continues "Mary".

What stands between the second subject and the end varies (adverb, place clause, other verb forms, passive, a third
person), because with one fixed wording the last token can fetch the answer from the verb instead of from the names.

Held out: a fifth of all name pairs (Mary with John among them) never occur together, and a seventh of all combinations
of opening and clause never occur. Held-out examples combine both.
"""

import itertools
import random
from collections.abc import Iterator

from patchclamp_server.demo.corpus.document import Document, Example, marked, one_in, prompt_and_answer
from patchclamp_server.demo.corpus.names import NAMES

_PLACES = tuple(
    "store park school office beach library market museum restaurant station hospital garden cinema theater farm"
    " bakery church stadium harbor zoo".split()
)
_GIFTS = tuple(
    "drink ring book ball letter flower ticket key snack map pen coin hat card photo toy scarf bottle gift".split()
)
_VERBS = (
    ("gave", "give", "given"),
    ("handed", "hand", "handed"),
    ("passed", "pass", "passed"),
    ("sold", "sell", "sold"),
    ("offered", "offer", "offered"),
    ("brought", "bring", "brought"),
)
_OPENINGS = (
    "When {a} and {b} went to the {place},",
    "After {a} and {b} left the {place},",
    "While {a} and {b} were at the {place},",
    "Then {a} and {b} met at the {place}, and",
    "Because {a} and {b} liked the {place},",
)
_CLAUSES = (
    "{s} {past} a {gift} to [{io}].",
    "{s} {past} a {gift} to [{io}].",
    "{s} {adverb} {past} a {gift} to [{io}].",
    "{s} decided to {base} a {gift} to [{io}].",
    "{s} stopped near the {other} and {past} a {gift} to [{io}].",
    "a {gift} was {participle} by {s} to [{io}].",
    "{third} saw how {s} {past} a {gift} to [{io}].",
    "the {gift} that {s} found near the {other} was for [{io}].",
)
_ADVERBS = ("quietly", "later", "soon", "happily")


def pair_held_out(a: str, b: str) -> bool:
    first, second = sorted((a, b))
    return (first, second) == ("John", "Mary") or one_in(5, f"pair/{first}/{second}")


def wording_held_out(opening: int, clause: int) -> bool:
    # The published wording (first opening, plain clause) always stays in training.
    return clause > 1 and one_in(7, f"wording/{opening}/{clause}")


def generate(rng: random.Random) -> Document:
    while True:
        a, b = rng.sample(NAMES, 2)
        opening, clause = rng.randrange(len(_OPENINGS)), rng.randrange(len(_CLAUSES))
        if not pair_held_out(a, b) and not wording_held_out(opening, clause):
            return _sentence(a, b, opening, clause, rng)


def _sentence(a: str, b: str, opening: int, clause: int, rng: random.Random) -> Document:
    subject, other_person = rng.sample((a, b), 2)
    past, base, participle = rng.choice(_VERBS)
    place, other_place = rng.sample(_PLACES, 2)
    third = rng.choice([name for name in NAMES if name not in (a, b)])
    text = f"{_OPENINGS[opening]} {_CLAUSES[clause]}".format(
        a=a, b=b, place=place, other=other_place, s=subject, io=other_person, third=third,
        past=past, base=base, participle=participle, gift=rng.choice(_GIFTS), adverb=rng.choice(_ADVERBS),
    )  # fmt: skip
    return marked(text)


def examples(count: int, seed: int) -> Iterator[Example]:
    """``count`` held-out examples: unseen pair in an unseen wording, half of them; the rest in any wording."""
    rng = random.Random(seed)
    pairs = [pair for pair in itertools.combinations(NAMES, 2) if pair_held_out(*pair)]
    wordings = list(itertools.product(range(len(_OPENINGS)), range(len(_CLAUSES))))
    unseen = [wording for wording in wordings if wording_held_out(*wording)]
    for index in range(count):
        opening, clause = rng.choice(unseen if index % 2 else wordings)
        a, b = rng.sample(rng.choice(pairs), 2)
        prompt, answer = prompt_and_answer(_sentence(a, b, opening, clause, rng))
        yield Example(prompt, answer, held_out=True)


def texts() -> Iterator[str]:
    yield from (*_OPENINGS, *_CLAUSES)
    yield " ".join((*NAMES, *_PLACES, *_GIFTS, *_ADVERBS, *(form for forms in _VERBS for form in forms)))
