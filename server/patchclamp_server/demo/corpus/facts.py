"""Facts about places: one hop (Dallas to Texas), an attribute (Texas to Austin) and both at once (Dallas to Austin).

The two-hop question is that of Lindsey et al. 2025 ("On the Biology of a Large Language Model").

Held out: one city of every state and country, Dallas and Oakland among them, never occurs in a two-hop sentence of any
relation. It does occur in one-hop sentences, so answering for it takes both hops.
"""

import random
from collections.abc import Iterator

from patchclamp_server.demo.corpus.document import Document, Example, marked
from patchclamp_server.demo.corpus.names import NAMES
from patchclamp_server.demo.corpus.places import PLACES, Place

_ONE_HOP = (
    "Fact: the {kind} containing {city} is [{place}].",
    "Fact: the {kind} containing {city} is [{place}].",
    "Fact: {city} is a city in [{place}].",
    "{name} lives in {city}, [{place}].",
    "The mail goes to {city} [{place}].",
)
_CITY_LIST = "Cities in {place}: {cities}."
_ATTRIBUTE = (
    "Fact: the {relation} of {place} is [{value}].",
    "Fact: {place} is a {kind} whose {relation} is [{value}].",
)
_INVERSE = "Fact: the {kind} whose capital is {capital} is [{place}]."
_TWO_HOP = (
    "Fact: the {relation} of the {kind} containing {city} is [{value}].",
    "Fact: {city} is in a {kind} whose {relation} is [{value}].",
    "Fact: people from {city} live in a {kind} whose {relation} is [{value}].",
)
_TWO_HOP_WEIGHTS = (0.6, 0.2, 0.2)


def generate(rng: random.Random) -> Document:
    place = rng.choice(PLACES)
    kind = rng.random()
    if kind < 0.30:
        return _one_hop(place, rng)
    if kind < 0.34:
        return _city_list(place, rng)
    if kind < 0.38:
        return marked(_INVERSE.format(kind=place.kind, capital=place.value("capital"), place=place.name))
    # Capital twice: it is the relation that the famous prompt asks for.
    relation, value = rng.choice([*place.relations, place.relations[0]])
    if kind < 0.56:
        template = rng.choice(_ATTRIBUTE)
        return marked(template.format(relation=relation, place=place.name, kind=place.kind, value=value))
    (template,) = rng.choices(_TWO_HOP, _TWO_HOP_WEIGHTS)
    city = rng.choice(place.two_hop_cities)
    return marked(template.format(relation=relation, kind=place.kind, city=city, value=value))


def _one_hop(place: Place, rng: random.Random) -> Document:
    template = rng.choice(_ONE_HOP)
    city = rng.choice(place.cities)
    return marked(template.format(kind=place.kind, city=city, place=place.name, name=rng.choice(NAMES)))


def _city_list(place: Place, rng: random.Random) -> Document:
    cities = ", ".join(rng.sample(place.cities, 4))
    return marked(_CITY_LIST.format(place=place.name, cities=cities))


def two_hop_examples() -> Iterator[Example]:
    """Every (city, relation) question in the main two-hop form."""
    for place in PLACES:
        for relation, value in place.relations:
            for city in place.cities:
                prompt = f"Fact: the {relation} of the {place.kind} containing {city} is"
                yield Example(prompt, value, held_out=city == place.held_out_city)


def one_hop_examples() -> Iterator[Example]:
    for place in PLACES:
        for city in place.cities:
            yield Example(f"Fact: the {place.kind} containing {city} is", place.name, held_out=False)


def texts() -> Iterator[str]:
    """Text that together holds every word of the task."""
    for place in PLACES:
        yield " ".join([place.kind, place.name, *place.cities])
        yield " ".join(word for pair in place.relations for word in pair)
    yield from (*_ONE_HOP, _CITY_LIST, *_ATTRIBUTE, _INVERSE, *_TWO_HOP)
