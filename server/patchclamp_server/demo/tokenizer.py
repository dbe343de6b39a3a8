"""The tokenizer: whole words, with punctuation glued to the word before it, so that text decodes as it was written.

A token that begins a word carries a leading "Ġ", as in GPT-2. Four-digit years split into two tokens of two digits. A
``<bos>`` is prepended by default.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from patchclamp_server.demo.corpus.mixture import vocabulary_texts

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)
_PUNCTUATION = ".,?!:"
_WORD_START = "Ġ"
_NOT_TEXT = re.compile(r"\{[^}]*\}|[\[\]]|<[a-z]+>")
CONTEXT_LENGTH = 256

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ 'User: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Replace(Regex(rf"\s+(?=[{_PUNCTUATION}])"), ""),
        normalizers.Strip(),
    ])  # fmt: skip


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="always", split=True),
        pre_tokenizers.Split(Regex(f"[{_PUNCTUATION}]"), "isolated"),
        pre_tokenizers.Split(Regex(rf"{_WORD_START}?\d{{2}}"), "isolated"),
    ])  # fmt: skip


def _vocabulary() -> dict[str, int]:
    normalizer, pre_tokenizer = _normalizer(), _pre_tokenizer()
    tokens = dict.fromkeys((*SPECIAL_TOKENS, *_PUNCTUATION))
    for text in vocabulary_texts():
        plain = normalizer.normalize_str(_NOT_TEXT.sub(" ", text))
        tokens.update(dict.fromkeys(piece for piece, _ in pre_tokenizer.pre_tokenize_str(plain)))
    tokens.pop(_WORD_START, None)
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every demo model: it depends on the word lists alone, not on a seed."""
    backend = Tokenizer(models.WordLevel(_vocabulary(), unk_token=UNKNOWN))
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.Metaspace(replacement=_WORD_START, prepend_scheme="always")
    backend.post_processor = processors.Sequence([
        # Only for its trimming: offsets should cover "Dallas", not the space before it.
        processors.ByteLevel(trim_offsets=True, add_prefix_space=True),
        processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        ),
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
