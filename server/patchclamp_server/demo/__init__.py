"""The bundled demo model: its corpus, tokenizer, training and weights, and the prompts that show what it can do.

Importing this package loads neither torch nor transformers.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from patchclamp_server.demo.corpus import antonyms, facts, indirect_objects, requests, years
from patchclamp_server.demo.corpus.document import Example
from patchclamp_server.demo.corpus.requests import REFUSAL

__all__ = ["REFUSAL", "Example", "RefusalPrompts", "Task", "model_dir", "refusal_prompts", "tasks", "transcoder_dirs"]

_SAMPLE_SEED = 7
_N_INDIRECT_OBJECTS = 64
_N_REQUESTS = 64
# The sentence of Wang et al. 2022; this pair of names never meets in training.
_MARY_AND_JOHN = Example("When Mary and John went to the store, John gave a drink to", "Mary", held_out=True)


@dataclass(frozen=True)
class Task:
    """One thing the model can do, with prompts that show it."""

    name: str
    description: str
    examples: tuple[Example, ...]

    @property
    def held_out(self) -> tuple[Example, ...]:
        return tuple(example for example in self.examples if example.held_out)


class RefusalPrompts(NamedTuple):
    """User messages as plain text; give them to the chat template."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    held_out_harmful: tuple[str, ...]
    held_out_harmless: tuple[str, ...]


def model_dir() -> Path:
    """The directory of the shipped model, for ``from_pretrained``."""
    return Path(str(files(__name__))) / "model"


def transcoder_dirs() -> dict[str, Path]:
    """The shipped sets of transcoders by name, each a directory in circuit-tracer's layout."""
    return {path.name: path for path in sorted((model_dir() / "transcoders").iterdir())}


def tasks() -> tuple[Task, ...]:
    """Prompts and answers of every task of text; ``held_out`` ones never occur in training in that form."""
    return (
        Task("one_hop", "the state or country of a city", tuple(facts.one_hop_examples())),
        Task("two_hop", "a property of the state or country of a city", tuple(facts.two_hop_examples())),
        Task(
            "indirect_objects",
            "which of two people receives something",
            (_MARY_AND_JOHN, *indirect_objects.examples(_N_INDIRECT_OBJECTS, _SAMPLE_SEED)),
        ),
        Task("years", "an end year after the start year", tuple(example for example, _ in years.examples())),
        Task("antonyms", "opposites in English, French and Spanish", tuple(antonyms.examples())),
    )


def refusal_prompts() -> RefusalPrompts:
    """Harmful and harmless requests: of training words, and of words that no request of the safety stage contains."""
    held_out_harmless = (*_requests("harmless_noun", "development"), *_requests("harmless_verb", "development"))
    return RefusalPrompts(
        harmful=(*_requests("harmful_noun", "training"), *_requests("harmful_verb", "training")),
        harmless=(*_requests("harmless_noun", "training"), *_requests("harmless_verb", "training")),
        held_out_harmful=(*_requests("harmful_noun", "development"), *_requests("harmful_verb", "development")),
        held_out_harmless=held_out_harmless,
    )


def _requests(kind: requests.Kind, part: requests.Part) -> tuple[str, ...]:
    return tuple(request.text for request in requests.draw_requests(kind, part, _N_REQUESTS, _SAMPLE_SEED))
