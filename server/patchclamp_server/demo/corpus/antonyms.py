"""Antonyms and translations in English, French and Spanish.

Held out: for a quarter of all French and Spanish words the sentence that gives their opposite within the language never
occurs. The reverse direction, the translations and the opposites across languages do occur.
"""

import random
from collections.abc import Iterator

from patchclamp_server.demo.corpus.antonym_words import ANTONYMS
from patchclamp_server.demo.corpus.document import Document, Example, marked, one_in, prompt_and_answer

_LANGUAGES = ("English", "French", "Spanish")
_WITHIN = (
    "The opposite of {word} is [{answer}].",
    "Le contraire de {word} est [{answer}].",
    "Lo contrario de {word} es [{answer}].",
)
_TRANSLATION = "The {language} word for {word} is [{answer}]."
_ACROSS = "The {language} opposite of {word} is [{answer}]."


def _word(row: tuple[str, ...], language: int, pole: int) -> str:
    return row[2 * language + pole]


def direction_held_out(language: int, word: str) -> bool:
    return language > 0 and one_in(4, f"opposite/{_LANGUAGES[language]}/{word}")


def generate(rng: random.Random) -> Document:
    row, pole = rng.choice(ANTONYMS), rng.randrange(2)
    kind = rng.random()
    if kind < 0.38:
        return _within(rng)
    if kind < 0.65:
        source, target = rng.sample(range(3), 2)
        word, answer = _word(row, source, pole), _word(row, target, pole)
        return marked(_TRANSLATION.format(language=_LANGUAGES[target], word=word, answer=answer))
    # Input language by output language, so that concept, relation and language have to be told apart.
    source, target = rng.randrange(3), rng.randrange(3)
    word, answer = _word(row, source, pole), _word(row, target, 1 - pole)
    if source == target and direction_held_out(source, word):
        return _within(rng)
    return marked(_ACROSS.format(language=_LANGUAGES[target], word=word, answer=answer))


def _within(rng: random.Random) -> Document:
    while True:
        row, pole, language = rng.choice(ANTONYMS), rng.randrange(2), rng.randrange(3)
        if not direction_held_out(language, _word(row, language, pole)):
            return _sentence(row, pole, language)


def _sentence(row: tuple[str, ...], pole: int, language: int) -> Document:
    return marked(_WITHIN[language].format(word=_word(row, language, pole), answer=_word(row, language, 1 - pole)))


def examples() -> Iterator[Example]:
    """Every direction of every pair within each language."""
    for row in ANTONYMS:
        for language in range(3):
            for pole in range(2):
                prompt, answer = prompt_and_answer(_sentence(row, pole, language))
                yield Example(prompt, answer, direction_held_out(language, _word(row, language, pole)))


def texts() -> Iterator[str]:
    yield from (*_WITHIN, _TRANSLATION, _ACROSS)
    yield " ".join(_LANGUAGES)
    yield from (" ".join(row) for row in ANTONYMS)
