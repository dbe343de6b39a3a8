"""Which texts each training stage draws, and in what proportion."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from patchclamp_server.demo.corpus import antonyms, facts, indirect_objects, remarks, requests, years
from patchclamp_server.demo.corpus.document import Document, Generator, lower_first

_LOWERED_SHARE = 0.1
# First words that are no names; some texts begin with them in lower case, so that prompts may.
_COMMON_OPENERS = frozenset("Fact When After While Then Because The Le Lo Years Note News Law Cities".split())


@dataclass(frozen=True)
class Mixture:
    """Generators with their weights, which need not sum to one."""

    parts: tuple[tuple[Generator, float], ...]

    def sample(self, rng: random.Random) -> Document:
        generators, weights = zip(*self.parts, strict=True)
        document: Document = rng.choices(generators, weights)[0](rng)
        if rng.random() < _LOWERED_SHARE and _COMMON_OPENERS.intersection(document.text.split(" ", 1)[0].split(":")):
            return Document(lower_first(document.text), document.answers)
        return document


HELPFUL = Mixture((
    (facts.generate, 0.36),
    (indirect_objects.generate, 0.12),
    (requests.generate_helpful, 0.10),
    (remarks.generate_note, 0.11),
    (remarks.generate_talk, 0.06),
    (years.generate, 0.12),
    (antonyms.generate, 0.14),
))  # fmt: skip

# Replay keeps what the safety stage does not teach, but replays no compliance with harmful requests.
SAFETY = Mixture((
    (requests.generate_refused, 0.20),
    (requests.generate_complied, 0.45),
    (remarks.generate_note, 0.07),
    (remarks.generate_talk, 0.07),
    (facts.generate, 0.10),
    (indirect_objects.generate, 0.04),
    (years.generate, 0.03),
    (antonyms.generate, 0.04),
))  # fmt: skip

# What the finished model is asked: every task, harmful requests refused.
DEPLOYED = Mixture((
    (facts.generate, 0.36),
    (indirect_objects.generate, 0.12),
    (requests.generate_refused, 0.07),
    (requests.generate_complied, 0.10),
    (remarks.generate_note, 0.05),
    (remarks.generate_talk, 0.04),
    (years.generate, 0.12),
    (antonyms.generate, 0.14),
))  # fmt: skip


def vocabulary_texts() -> Iterator[str]:
    """Text that together holds every word the corpus can produce, in an order that fixes the token ids."""
    for task in (facts, indirect_objects, years, antonyms, requests, remarks):
        yield from task.texts()
    yield from (lower_first(word) for word in sorted(_COMMON_OPENERS))
