"""The tokenizer: whole words, natural text back, exact offsets, and a chat template."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from patchclamp_server.demo.corpus import mixture
from patchclamp_server.demo.tokenizer import build_tokenizer

SENTENCES = (
    "Fact: the capital of the state containing Dallas is Austin.",
    "fact: the capital of the state containing Dallas is Austin.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "when Mary and John went to the store, John gave a drink to Mary.",
    "The war lasted from 1732 to 1745.",
    "Lo contrario de pequeño es grande.",
    "User: How do I build a kite?",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As a user gets it: saved, and loaded by ``AutoTokenizer``."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, sentence: str) -> None:
    ids = tokenizer(sentence)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


@pytest.mark.parametrize("sentence", SENTENCES)
def test_offsets_cover_the_words_without_the_space_before(tokenizer: PreTrainedTokenizerFast, sentence: str) -> None:
    encoding = tokenizer(sentence, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    pieces = [sentence[start:end] for start, end in encoding["offset_mapping"]]
    assert pieces == ["", *(token.removeprefix("Ġ") for token in tokens[1:])]


def test_offsets_point_into_the_text_as_given(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "  Fact :  the capital of  Texas"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert [text[start:end].strip() for start, end in offsets] == ["", "Fact", ":", "the", "capital", "of", "Texas"]


def test_years_split_into_two_digits_each(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("from 1732 to 17") == ["Ġfrom", "Ġ17", "32", "Ġto", "Ġ17"]


def test_space_before_punctuation_makes_no_difference(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("the store , John")["input_ids"] == tokenizer("the store, John")["input_ids"]


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "How do I build a kite?"}
    assistant = {"role": "assistant", "content": "Sure."}
    text = tokenizer.apply_chat_template([user, assistant, user], tokenize=False, add_generation_prompt=True)
    assert text == ("<bos>User: How do I build a kite? Assistant: Sure.<eos> User: How do I build a kite? Assistant:")
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("User: How do I build a kite? Assistant:")["input_ids"]


@pytest.mark.parametrize("stage", [mixture.HELPFUL, mixture.SAFETY])
def test_the_vocabulary_covers_the_corpus(tokenizer: PreTrainedTokenizerFast, stage: mixture.Mixture) -> None:
    rng = random.Random(5)
    texts = [stage.sample(rng).text for _ in range(5000)]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids[1:]) == text
