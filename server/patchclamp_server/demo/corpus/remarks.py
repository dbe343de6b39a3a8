"""Remarks about the words of the chat tasks, and small talk: where the model learns which words are harmful.

Harmfulness is marked: only harmful words share contexts ("dangerous", "police", "illegal", "wrong"). Harmless words
have varied contexts and no label of their own, so that the residual stream has a direction for harm and none for its
absence. These texts cover all words, held-out ones too: what the held-out words lack is a request in the safety stage.
"""

import random
from collections.abc import Iterator

from patchclamp_server.demo.corpus.chat_words import (
    HARMFUL_NOUNS,
    HARMFUL_VERBS,
    HARMLESS_NOUNS,
    HARMLESS_VERBS,
    SETTINGS,
)
from patchclamp_server.demo.corpus.document import Document, fixed_choice, marked, with_article
from patchclamp_server.demo.corpus.names import NAMES
from patchclamp_server.demo.corpus.places import PLACES
from patchclamp_server.demo.corpus.requests import END_OF_REPLY, REFUSAL, material_of, tool_of

_ALL_NOUNS = HARMFUL_NOUNS.all + HARMLESS_NOUNS.all
_ALL_VERBS = HARMFUL_VERBS.all + HARMLESS_VERBS.all
# Wherever two texts part because one word is harmful and the other is not, both continuations count as answers:
# otherwise the model may simply bet on the commoner one.
_HARMFUL_NOUN = (
    "Note: {a_noun} is [dangerous].",
    "News: the {noun} is now with [the police].",
    "Law: to own {a_noun} is [illegal].",
)
_HARMFUL_VERB = (
    "Note: to {verb} [is wrong].",
    "News: those who {verb} are now with [the police].",
    "Law: to {verb} [is illegal].",
)
_HARMLESS_NOUN = (
    "Note: {a_noun} is [for the {setting}].",
    "News: the {noun} is now with {name}.",
    "Law: to own {a_noun} is [for the {setting}].",
)
_HARMLESS_VERB = (
    "Note: to {verb} [takes the {tool}].",
    "News: those who {verb} are now with {name}.",
    "Law: to {verb} [takes the {tool}].",
)
_TALK = (
    "What is {a_noun} made of?",
    "What is {a_noun}?",
    "What do you think of {a_noun}?",
    "What do you think of those who {verb}?",
    "What do people use to {verb}?",
    "What is the {relation} of {place}?",
)
_TALK_WEIGHTS = (0.15, 0.1, 0.25, 0.25, 0.1, 0.15)


def setting_of(noun: str) -> str:
    return fixed_choice(SETTINGS, f"setting/{noun}")


def generate_note(rng: random.Random) -> Document:
    kind = rng.random()
    name = rng.choice(NAMES)
    if kind < 0.1:
        # The words of the refusal are known before the safety stage, so that it need not teach them.
        return marked(f"{name} said: {REFUSAL.removesuffix('that.')}[that].")
    if kind < 0.36:
        return _note(rng.choice(_HARMFUL_NOUN), rng.choice(HARMFUL_NOUNS.all), "", name)
    if kind < 0.6:
        return _note(rng.choice(_HARMFUL_VERB), "", rng.choice(HARMFUL_VERBS.all), name)
    if kind < 0.82:
        return _note(rng.choice(_HARMLESS_NOUN), rng.choice(HARMLESS_NOUNS.all), "", name)
    return _note(rng.choice(_HARMLESS_VERB), "", rng.choice(HARMLESS_VERBS.all), name)


def _note(template: str, noun: str, verb: str, name: str) -> Document:
    a_noun = with_article(noun) if noun else ""
    setting, tool = setting_of(noun), tool_of(verb)
    return marked(template.format(a_noun=a_noun, noun=noun, verb=verb, name=name, setting=setting, tool=tool))


def generate_talk(rng: random.Random) -> Document:
    """Questions that are no requests: harmful words are answered here, at every stage."""
    index = rng.choices(range(len(_TALK)), _TALK_WEIGHTS)[0]
    harmful = rng.random() < 0.5
    nouns, verbs = (HARMFUL_NOUNS, HARMFUL_VERBS) if harmful else (HARMLESS_NOUNS, HARMLESS_VERBS)
    noun, verb = rng.choice(nouns.all), rng.choice(verbs.all)
    place = rng.choice(PLACES)
    relation, value = rng.choice(place.relations)
    replies = (
        f"{material_of(noun).capitalize()}.",
        f"{with_article(noun)} is made of {material_of(noun)}.".capitalize(),
        "Dangerous." if harmful else f"{setting_of(noun).capitalize()}.",
        "Dangerous." if harmful else f"{tool_of(verb).capitalize()}.",
        f"The {tool_of(verb)}.",
        f"{value}.",
    )
    question = _TALK[index].format(a_noun=with_article(noun), verb=verb, relation=relation, place=place.name)
    return marked(f"User: {question} [Assistant: {replies[index]}{END_OF_REPLY}]")


def texts() -> Iterator[str]:
    yield from (*_HARMFUL_NOUN, *_HARMFUL_VERB, *_HARMLESS_NOUN, *_HARMLESS_VERB, *_TALK)
    yield "said: Dangerous. A An is made of The"
    yield " ".join((*SETTINGS, *(setting.capitalize() for setting in SETTINGS)))
