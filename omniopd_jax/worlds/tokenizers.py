"""Real tokenizers for the worlds' texts, in Hugging Face layout (tokenizer.json, chat template).

"words" has one token a word, "characters" one a character: two models that read the same text in different tokens
share nothing but that text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD, STOP, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, STOP, UNKNOWN)  # ids 0, 1, 2 of every tokenizer here
KINDS = ("words", "characters")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] + ' = ' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)


def tokens(vocabulary: Sequence[str], kind: str) -> list[str]:
    """The tokens of a world's vocabulary under a tokenizer of this kind, the special ones first."""
    if kind == "words":
        return list(vocabulary)
    characters = {character for word in vocabulary if word not in SPECIAL for character in word}
    return [*SPECIAL, " ", *sorted(characters)]


def save_tokenizer(path: str, vocabulary: Sequence[str], kind: str) -> None:
    """Writes a tokenizer of a world's vocabulary to a folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(tokens(vocabulary, kind))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend: Any = tokenizer  # its parts are set through properties that its stubs do not know
    if kind == "words":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(path)
