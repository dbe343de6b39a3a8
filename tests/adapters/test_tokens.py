"""The tokenizer: tokens with their text and where it stands."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from patchclamp_server.adapters.tokenizer import Tokenizer, TooManyTokens

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "The capital of Texas is Austin."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level pairs, as GPT-2's, with a chat template and a beginning-of-sequence token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<bos>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT] * 3, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", chat_template=TEMPLATE))


def test_the_pieces_of_a_text_are_the_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert "".join(tokens.pieces) == tokens.text == TEXT
    assert len(tokens.ids) == len(tokens.pieces) == len(tokens.spans)


def test_a_span_is_where_the_piece_stands(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    for piece, (start, end) in zip(tokens.pieces, tokens.spans, strict=True):
        assert TEXT[start:end].strip() == piece.strip()


def test_ids_are_described_by_what_they_decode_to(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.describe(tokenizer.encode(TEXT).ids)
    assert tokens.text == TEXT
    assert [TEXT[start:end] for start, end in tokens.spans] == list(tokens.pieces)


def test_a_special_token_is_named(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece(0) == "<bos>"


def test_an_id_without_token_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece(10_000) == ""


def test_a_conversation_goes_through_the_template(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode_chat([("user", "Hello"), ("assistant", "Hi")])
    assert tokens.text == "<user>Hello<assistant>Hi<assistant>"
    assert tokenizer.encode_chat([("user", "Hello")], generation_prompt=False).text == "<user>Hello"


def test_what_the_template_refuses_is_a_value_error_with_its_words(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no clowns"):
        tokenizer.encode_chat([("clown", "Hello")])


def test_without_a_template_there_is_no_conversation() -> None:
    plain = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend(models.WordLevel({"a": 0}, unk_token="a"))))
    assert not plain.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        plain.encode_chat([("user", "a")])


def test_too_long_a_text_is_told_before_its_tokens_are_made(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode(TEXT).ids)
    assert tokenizer.encode(TEXT, limit=count).ids == tokenizer.encode(TEXT).ids
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode(TEXT, limit=count - 1)
    assert caught.value.count == count
    with pytest.raises(TooManyTokens):
        tokenizer.encode_chat([("user", TEXT)], limit=2)
