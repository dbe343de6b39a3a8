"""The unit of the corpus: a natural sentence with its answer marked, and stable hashing for held-out splits.

Generators write sentences with the predictable part in square brackets, ``"Fact: the capital of Texas is [Austin]."``;
``marked`` turns that into plain text and character spans. Nothing here, or in any task module, imports torch.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

_PIECE = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Document:
    """One training text. ``answers`` are half-open character spans of the parts that the text makes predictable."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Example:
    """One test item: a prompt and the text that should follow it. ``held_out`` items never occur in training."""

    prompt: str
    answer: str
    held_out: bool


Generator = Callable[[random.Random], Document]


def marked(text: str) -> Document:
    """Read ``[answer]`` marks out of ``text``."""
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length = cursor = 0
    for match in _PIECE.finditer(text):
        before, answer = text[cursor : match.start()], match.group(1)
        plain += [before, answer]
        spans.append((length + len(before), length + len(before) + len(answer)))
        length = spans[-1][1]
        cursor = match.end()
    plain.append(text[cursor:])
    return Document("".join(plain), tuple(spans))


def prompt_and_answer(document: Document) -> tuple[str, str]:
    """The text before the last answer, without the space that the answer's first word brings, and that answer."""
    start, end = document.answers[-1]
    return document.text[:start].rstrip(), document.text[start:end]


def one_in(n: int, key: str) -> bool:
    """True for a fixed 1/n of all keys: how split membership is decided, independent of any seed or Python version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % n == 0


def fixed_choice(options: tuple[str, ...], key: str) -> str:
    """An arbitrary but permanent choice for ``key``."""
    return options[int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % len(options)]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
