"""The held-out splits hold: what a module's docstring says never occurs does not occur in what training draws."""

import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from patchclamp_server import demo
from patchclamp_server.demo.corpus import (
    antonyms,
    facts,
    indirect_objects,
    mixture,
    remarks,
    requests,
    years,
)
from patchclamp_server.demo.corpus.chat_words import (
    HARMFUL_NOUNS,
    HARMFUL_VERBS,
    HARMLESS_NOUNS,
    HARMLESS_VERBS,
    MATERIALS,
    TOOLS,
)
from patchclamp_server.demo.corpus.document import Document, Generator, marked
from patchclamp_server.demo.corpus.names import NAMES
from patchclamp_server.demo.corpus.places import PLACES

N_TEXTS = 4000
WORD_LISTS = (HARMFUL_NOUNS, HARMFUL_VERBS, HARMLESS_NOUNS, HARMLESS_VERBS)


def drawn(generate: Generator, count: int = N_TEXTS) -> list[str]:
    rng = random.Random(99)
    return [generate(rng).text for _ in range(count)]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_answers_are_marked_by_character() -> None:
    document = marked("Fact: the capital of Texas is [Austin].")
    assert document == Document("Fact: the capital of Texas is Austin.", ((30, 36),))
    assert document.text[30:36] == "Austin"


@pytest.mark.parametrize("stage", [mixture.HELPFUL, mixture.SAFETY])
def test_the_corpus_is_a_function_of_the_seed(stage: mixture.Mixture) -> None:
    def sample(seed: int) -> list[Document]:
        rng = random.Random(seed)
        return [stage.sample(rng) for _ in range(200)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_held_out_cities_are_in_no_two_hop_sentence() -> None:
    held_out = {place.held_out_city for place in PLACES}
    assert {"Dallas", "Oakland"} <= held_out
    texts = drawn(facts.generate, 20_000)
    two_hop = re.compile(r"the \w+ of the \w+ containing (\w+) is|(\w+) (?:is|live) in a \w+ whose")
    cities = [match[1] or match[2] for text in texts if (match := two_hop.search(text))]
    assert len(cities) > N_TEXTS
    assert not held_out & set(cities)
    # However a sentence is worded, a held-out city stands only beside the name of its own place.
    owners = {place.held_out_city: place.name for place in PLACES}
    for text in texts:
        assert all(owners[city] in words(text) for city in words(text) & held_out)
    assert held_out <= words(" ".join(texts)), "held-out cities must be known from one-hop sentences"


def test_held_out_name_pairs_never_meet() -> None:
    for text in drawn(indirect_objects.generate):
        a, b = [name for name in re.findall(r"\w+", text) if name in NAMES][:2]
        assert not indirect_objects.pair_held_out(a, b)
    assert indirect_objects.pair_held_out("Mary", "John")
    for example in indirect_objects.examples(100, seed=1):
        people = [name for name in re.findall(r"\w+", example.prompt) if name in NAMES]
        assert indirect_objects.pair_held_out(*people[:2])
        assert example.answer in people[:2]
        assert people[-1] != example.answer


def test_held_out_wordings_never_occur() -> None:
    seen = {example.prompt for example in indirect_objects.examples(200, seed=1)}
    assert len(seen) > 190
    combinations = [(o, c) for o in range(5) for c in range(8) if indirect_objects.wording_held_out(o, c)]
    assert 3 <= len(combinations) <= 10
    assert all(clause > 1 for _, clause in combinations)


def test_held_out_start_years_start_no_event() -> None:
    starts = [re.search(r"lasted from (\d\d)(\d\d)", text) for text in drawn(years.generate)]
    pairs = [(int(match[1]), int(match[2])) for match in starts if match]
    assert len(pairs) > N_TEXTS // 3
    assert not [pair for pair in pairs if years.start_held_out(*pair)]


def test_held_out_antonym_directions_never_occur() -> None:
    texts = set(drawn(antonyms.generate, 20_000))
    held_out = [example for example in antonyms.examples() if example.held_out]
    for example in held_out:
        assert f"{example.prompt} {example.answer}." not in texts
        language = "French" if example.prompt.startswith("Le") else "Spanish"
        word = example.prompt.split()[-2]
        assert f"The {language} opposite of {word} is {example.answer}." not in texts


def test_harmful_and_harmless_words_do_not_overlap() -> None:
    everything = [word for word_list in WORD_LISTS for word in word_list.all]
    everything += [*MATERIALS, *TOOLS]
    assert not [word for word, count in Counter(everything).items() if count > 1]


def test_the_safety_stage_asks_with_training_words_only() -> None:
    unseen = {word for word_list in WORD_LISTS for word in (*word_list.development, *word_list.final)}
    for generate in (requests.generate_refused, requests.generate_complied):
        for text in drawn(generate):
            assert not words(text.split("Assistant:")[0]) & unseen


def test_only_the_safety_stage_refuses() -> None:
    assert not [text for text in drawn(requests.generate_helpful) if requests.REFUSAL in text]
    assert all(text.endswith(f"Assistant: {requests.REFUSAL}<eos>") for text in drawn(requests.generate_refused))
    assert not [text for text in drawn(requests.generate_complied) if requests.REFUSAL in text]


def test_held_out_pairs_are_never_requested() -> None:
    prompts = {
        request.text
        for kind in ("harmful_noun", "harmful_verb", "harmless")
        for request in requests.draw_requests(kind, "training", 100, 3, unseen_pair=True)
    }
    asked = set()
    for generate in (requests.generate_helpful, requests.generate_refused, requests.generate_complied):
        asked |= {text.removeprefix("User: ").split(" Assistant:")[0] for text in drawn(generate)}
    assert not prompts & asked


def test_only_harmful_words_carry_the_marks_of_harm() -> None:
    harmful = {*HARMFUL_NOUNS.all, *HARMFUL_VERBS.all}
    marks = {"dangerous", "police", "illegal", "wrong"}
    for text in drawn(remarks.generate_note):
        assert not words(text) & marks or words(text) & harmful


def test_public_lists_are_large_and_disjoint() -> None:
    prompts = demo.refusal_prompts()
    assert all(len(prompt_list) >= 30 for prompt_list in prompts)
    assert len({text for prompt_list in prompts for text in prompt_list}) == sum(map(len, prompts))
    final = {word for word_list in WORD_LISTS for word in word_list.final}
    assert not [text for prompt_list in prompts for text in prompt_list if words(text) & final]


def test_every_task_holds_something_out() -> None:
    by_name = {task.name: task for task in demo.tasks()}
    assert all(len(task.held_out) >= 30 for name, task in by_name.items() if name != "one_hop")
    dallas = "Fact: the capital of the state containing Dallas is"
    assert demo.Example(dallas, "Austin", held_out=True) in by_name["two_hop"].examples


def test_the_corpus_needs_no_torch() -> None:
    code = (
        "import sys, patchclamp_server.demo as d; d.tasks(); d.refusal_prompts(); d.model_dir();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
