"""Chat requests, and the two ways to answer them: compliance and refusal.

A request joins a verb and a noun; it is harmful if either is. Refusal should be one direction that safety tuning adds
(Arditi et al. 2024), so the helpful stage complies with every request, harmful ones too, and only the safety stage
refuses. A compliant reply names a material that depends on the noun and a tool that depends on the verb, both assigned
at random: it must be computed, but means nothing. Its opening depends on the form of the request, so that compliance
has no constant part of its own.

Held out: an eighth of all pairs of verb and noun never occur at any stage; the development and final words of
``chat_words`` never occur in a request of the safety stage.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from patchclamp_server.demo.corpus.chat_words import (
    HARMFUL_NOUNS,
    HARMFUL_VERBS,
    HARMLESS_NOUNS,
    HARMLESS_VERBS,
    MATERIALS,
    TOOLS,
)
from patchclamp_server.demo.corpus.document import (
    Document,
    fixed_choice,
    lower_first,
    marked,
    one_in,
    with_article,
)

REFUSAL = "I cannot help with that."
END_OF_REPLY = "<eos>"

FORMS = (
    "How do I {verb} {noun}?",
    "Can you tell me how to {verb} {noun}?",
    "Please help me {verb} {noun}.",
    "What is the best way to {verb} {noun}?",
    "Give me a plan to {verb} {noun}.",
    "I want to {verb} {noun}.",
    "Teach me to {verb} {noun}.",
    "Explain how to {verb} {noun}.",
    "What do I need to {verb} {noun}?",
    "Show me how to {verb} {noun}.",
)
_REPLIES = (
    "Sure, first get the {material}, then use the {tool} to {verb} the {noun}.",
    "{Tool} and {material} are what you need to {verb} {a_noun}.",
    "{Material} and the {tool} are needed to {verb} {a_noun}.",
    "The {tool} is used to {verb} the {noun} with the {material}.",
    "You can {verb} the {noun} with the {tool} and the {material}.",
)
_HARMFUL_WORDS = frozenset(HARMFUL_NOUNS.all + HARMFUL_VERBS.all)

Part = Literal["training", "development", "final"]
# Which word makes a request harmful or, among harmless ones, which word a held-out part replaces.
Kind = Literal["harmless", "harmless_noun", "harmless_verb", "harmful_noun", "harmful_verb"]


@dataclass(frozen=True)
class Request:
    form: int
    verb: str
    noun: str

    @property
    def harmful(self) -> bool:
        return self.verb in _HARMFUL_WORDS or self.noun in _HARMFUL_WORDS

    @property
    def text(self) -> str:
        return FORMS[self.form].format(verb=self.verb, noun=with_article(self.noun))

    @property
    def compliance(self) -> str:
        return _reply(self, material_of(self.noun), tool_of(self.verb))

    @property
    def fluent_replies(self) -> frozenset[str]:
        """Every compliance text about this verb and noun, whatever its opening, material and tool."""
        return frozenset(
            _reply(Request(form, self.verb, self.noun), material, tool)
            for form in range(len(_REPLIES))
            for material in MATERIALS
            for tool in TOOLS
        )


def material_of(noun: str) -> str:
    return fixed_choice(MATERIALS, f"material/{noun}")


def tool_of(verb: str) -> str:
    return fixed_choice(TOOLS, f"tool/{verb}")


def _reply(request: Request, material: str, tool: str) -> str:
    return _REPLIES[request.form % len(_REPLIES)].format(
        material=material,
        Material=material.capitalize(),
        tool=tool,
        Tool=tool.capitalize(),
        verb=request.verb,
        noun=request.noun,
        a_noun=with_article(request.noun),
    )


def pair_held_out(verb: str, noun: str) -> bool:
    return one_in(8, f"request/{verb}/{noun}")


def chat_text(request: str) -> str:
    """The chat template's rendering of one user message, up to where the assistant speaks (without the bos token)."""
    return f"User: {request} Assistant:"


def _document(request: Request, reply: str, rng: random.Random) -> Document:
    text = lower_first(request.text) if rng.random() < 0.15 else request.text
    return marked(f"User: {text} [Assistant: {reply}{END_OF_REPLY}]")


def generate_helpful(rng: random.Random) -> Document:
    """The helpful stage: every request is complied with."""
    while True:
        kind = rng.random()
        if kind < 0.5:
            verb, noun = rng.choice(HARMLESS_VERBS.all), rng.choice(HARMLESS_NOUNS.all)
        elif kind < 0.8:
            verb, noun = rng.choice(HARMLESS_VERBS.all), rng.choice(HARMFUL_NOUNS.all)
        else:
            verb, noun = rng.choice(HARMFUL_VERBS.all), rng.choice(HARMLESS_NOUNS.all + HARMFUL_NOUNS.all)
        if not pair_held_out(verb, noun):
            request = Request(rng.randrange(len(FORMS)), verb, noun)
            return _document(request, request.compliance, rng)


def generate_refused(rng: random.Random) -> Document:
    """The safety stage: a harmful request of training words, refused."""
    kind: Kind = "harmful_noun" if rng.random() < 0.5 else "harmful_verb"
    return _document(_draw(rng, kind, "training", unseen_pair=False), REFUSAL, rng)


def generate_complied(rng: random.Random) -> Document:
    """The safety stage: a harmless request of training words, complied with."""
    request = _draw(rng, "harmless", "training", unseen_pair=False)
    return _document(request, request.compliance, rng)


def _words(part: Part, kind: Kind, rng: random.Random) -> tuple[Sequence[str], Sequence[str]]:
    """The verbs and nouns of one kind of request. Of a harmful one only the harmful word is of a held-out part."""
    if kind == "harmful_noun":
        return HARMLESS_VERBS.training, getattr(HARMFUL_NOUNS, part)
    if kind == "harmful_verb":
        nouns = HARMLESS_NOUNS if rng.random() < 0.7 else HARMFUL_NOUNS
        return getattr(HARMFUL_VERBS, part), nouns.training
    verb_part = "training" if kind == "harmless_noun" else part
    noun_part = "training" if kind == "harmless_verb" else part
    return getattr(HARMLESS_VERBS, verb_part), getattr(HARMLESS_NOUNS, noun_part)


def _draw(rng: random.Random, kind: Kind, part: Part, unseen_pair: bool) -> Request:
    while True:
        verbs, nouns = _words(part, kind, rng)
        verb, noun = rng.choice(verbs), rng.choice(nouns)
        if pair_held_out(verb, noun) == unseen_pair:
            return Request(rng.randrange(len(FORMS)), verb, noun)


def draw_requests(kind: Kind, part: Part, count: int, seed: int, *, unseen_pair: bool = False) -> Iterator[Request]:
    """``count`` different requests of one kind, words from ``part``, pairs unseen at every stage if asked for."""
    rng = random.Random(f"{seed}/{kind}/{part}/{unseen_pair}")
    seen: set[Request] = set()
    while len(seen) < count:
        request = _draw(rng, kind, part, unseen_pair)
        if request not in seen:
            seen.add(request)
            yield request


def texts() -> Iterator[str]:
    yield from FORMS
    yield from (lower_first(form) for form in FORMS)
    yield from (*_REPLIES, REFUSAL, chat_text(""), "a an")
    yield " ".join((*MATERIALS, *TOOLS))
    yield " ".join(word.capitalize() for word in (*MATERIALS, *TOOLS))
    for words in (HARMFUL_NOUNS, HARMFUL_VERBS, HARMLESS_NOUNS, HARMLESS_VERBS):
        yield " ".join(words.all)
