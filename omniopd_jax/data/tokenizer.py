"""Text ↔ tokens: a Hugging Face fast tokenizer with the few promises that distillation needs.

Three of them are easy to break in silence. A text that *follows* other text is encoded and decoded as such (no space
added or lost at the seam). Text of others never turns into a special token. A prefix that leaves the house as text
holds no broken character: byte-level vocabularies cut inside characters, and a teacher must not see that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd_jax.types import InputError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character
# How many tokens a cut may move. A character has at most 4 bytes, but tokens may straddle two characters one after the
# other (an emoji's parts do), so that a clean cut can be further away than 3 tokens.
LONGEST_MOVE = 8
_LEAD = "\n"  # a text that may stand before any other
_CONTEXT = 8  # tokens of context that decide how a span's first token is decoded


class TokenizerError(InputError):
    """A tokenizer that cannot be used as asked; the message names the folder and what would be right."""


class Tokenizer:
    """A fast tokenizer and the stop, pad and banned tokens that go with its checkpoint folder."""

    def __init__(self, hf: PreTrainedTokenizerFast, *, path: str = "", stop_tokens: Sequence[int] = ()):
        """Wraps a tokenizer.

        Args:
          hf: a fast tokenizer of transformers.
          path: the folder it came from, for messages.
          stop_tokens: ids that end an answer beside the tokenizer's own end-of-sequence token.
        """
        if getattr(hf, "backend_tokenizer", None) is None:
            raise TokenizerError(f"The tokenizer in {path!r} is not a fast one; save it with a tokenizer.json.")
        self.hf = hf
        self.path = path
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()  # what is too long is counted and named, never cut
        self._backend.no_padding()
        eos: Any = hf.eos_token_id
        own = () if eos is None else (int(eos),)
        self.stop_tokens: tuple[int, ...] = tuple(sorted({*map(int, stop_tokens), *own}))
        if not self.stop_tokens:
            raise TokenizerError(
                f"No stop token is known for {path!r}: neither generation_config.json, config.json nor the tokenizer "
                "names an eos token, so a response could never end."
            )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that stands for a token (a model's vocabulary may be padded beyond it)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def end_token(self) -> int:
        """The stop token that ends a text which somebody else wrote: the tokenizer's own, else the first."""
        eos: Any = self.hf.eos_token_id
        return self.stop_tokens[0] if eos is None else int(eos)

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset({i for i, token in added.items() if token.special} | set(self.hf.all_special_ids))

    @cached_property
    def pad_id(self) -> int:
        """The id written where there is nothing; always masked, so any token may lend its id."""
        pad: Any = self.hf.pad_token_id
        if pad is not None:
            return int(pad)
        return min(self.special_tokens - set(self.stop_tokens), default=self.stop_tokens[0])

    def banned_tokens(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below `vocab_size` that an answer never holds: pad, start and other special tokens that do not stop it,
        and the padding rows of a model's vocabulary that stand for no token."""
        known = set(self._backend.get_vocab(with_added_tokens=True).values())
        banned = (self.special_tokens | {self.pad_id} | (set(range(vocab_size)) - known)) - set(self.stop_tokens)
        return tuple(sorted(token for token in banned if token < vocab_size))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that goes on from other text: no special tokens, no space put in front."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text. A special token spelled out in a text stays text: it stops and switches nothing."""
        ids = self._encode(texts, self._backend)
        if self._special_pattern is not None:
            spelled = [i for i, text in enumerate(texts) if self._special_pattern.search(text)]
            for i in spelled:
                ids[i] = self._encode([texts[i]], self._literal)[0]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens left out, nothing tidied."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._backend.decode_batch([list(row) for row in ids], skip_special_tokens=True)

    def decode_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to the text of `context`: decode(context + ids) less decode(context)."""
        return self.decode_after_batch([(context, ids)])[0]

    def decode_after_batch(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
        """`decode_after` of each (context, ids); every context has to end on a clean cut."""
        tails = [list(context[max(len(context) - _CONTEXT, 0) :]) for context, _ in pairs]
        befores = self.decode_batch(tails)
        # A tail of special tokens alone, or one that begins inside a character, does not decode as it does in place.
        long = [i for i, text in enumerate(befores) if (not text or BROKEN in text) and len(pairs[i][0]) > _CONTEXT]
        for i, text in zip(long, self.decode_batch([pairs[i][0] for i in long]), strict=True):
            tails[i], befores[i] = list(pairs[i][0]), text
        afters = self.decode_batch([tail + list(ids) for tail, (_, ids) in zip(tails, pairs, strict=True)])
        return [after[len(before) :] for before, after in zip(befores, afters, strict=True)]

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """One readable text a token, for plots and logs; special tokens are shown, parts of characters as �."""
        return self._backend.decode_batch([[token] for token in ids], skip_special_tokens=False)

    def running_texts(self, ids: Sequence[int]) -> list[str]:
        """`token_texts`, each with the white space that stands before it in running text: word-level and
        SentencePiece-like tokenizers leave it out of a token by itself."""
        alone = self.token_texts(ids)
        pairs = [list(ids[i - 1 : i + 1]) for i in range(1, len(ids))]
        texts = alone[:1]
        both = self._backend.decode_batch(pairs, skip_special_tokens=False)
        for before, text, pair in zip(alone, alone[1:], both, strict=False):
            added = pair.removeprefix(before)
            texts.append(added if added.endswith(text) and pair.startswith(before) else text)
        return texts

    def first_special(self, text: str) -> int | None:
        """The first special token that a rendered text spells out; None where it spells none."""
        found = self._special_pattern.search(text) if self._special_pattern else None
        return None if found is None else self._backend.token_to_id(found[0])

    def has_same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both."""
        return self._backend.get_vocab(with_added_tokens=True) == other._backend.get_vocab(with_added_tokens=True)

    def is_clean_cut(self, ids: Sequence[int], end: int) -> bool:
        """Whether ids[:end] decodes to sound characters alone."""
        return BROKEN not in self.decode(ids[:end])

    def clean_prefix_length(self, ids: Sequence[int], end: int) -> int | None:
        """The nearest clean cut at or to the left of `end`; None where there is none within LONGEST_MOVE tokens.

        Where the student wrote bytes that are no character, every later cut stays broken: soon there is no text left
        to show a teacher.
        """
        for length in range(end, max(end - LONGEST_MOVE, 0) - 1, -1):
            if self.is_clean_cut(ids, length):
                return length
        return None

    def render(
        self, prompt: Prompt, template_args: Mapping[str, Any] | None = None, *, use_chat_template: bool = True
    ) -> str:
        """The exact text of a prompt, up to where the answer begins.

        Raises:
          TokenizerError: the tokenizer has no chat template or the template refuses these messages.
        """
        if prompt.is_raw or not use_chat_template:
            if len(prompt.messages) != 1:
                raise TokenizerError(f"Prompt {prompt.id!r} has {len(prompt.messages)} messages; a raw text is one.")
            return prompt.messages[0].content
        return self.render_messages([vars(m) for m in prompt.messages], template_args, add_generation_prompt=True)

    def render_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        template_args: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """What the chat template makes of a conversation, as text."""
        if not self.hf.chat_template:
            raise TokenizerError(
                f"The tokenizer in {self.path!r} has no chat template; set data.use_chat_template=False to continue "
                "the prompt's text as it stands."
            )
        try:
            text = self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template_args or {}),
            )
        except ImportError as error:
            raise TokenizerError(f"Chat templates need jinja2: pip install jinja2 ({error}).") from error
        except Exception as error:  # jinja2 raises whatever the template's author chose
            raise TokenizerError(f"The chat template in {self.path!r} refuses these messages: {error}") from error
        return str(text)

    def encode_prompt(
        self, prompt: Prompt, template_args: Mapping[str, Any] | None = None, use_chat_template: bool = True
    ) -> list[int]:
        """Tokens of a prompt, special tokens of the template included."""
        return self.encode_prompts([prompt], template_args, use_chat_template)[0]

    def encode_prompts(
        self,
        prompts: Sequence[Prompt],
        template_args: Mapping[str, Any] | None = None,
        use_chat_template: bool = True,
    ) -> list[list[int]]:
        """`encode_prompt` of each prompt. A template spells its own special tokens out; a raw text gets the start
        token where the tokenizer gives one to every text, and never an end."""
        texts = [self.render(prompt, template_args, use_chat_template=use_chat_template) for prompt in prompts]
        ids = _encode(texts, self._backend)
        raw = [i for i, prompt in enumerate(prompts) if prompt.is_raw or not use_chat_template]
        before, _ = self._wrapping
        for i in raw:
            ids[i] = before + ids[i]
        return ids

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json and its companions."""
        self.hf.save_pretrained(str(path))

    def _encode(self, texts: Sequence[str], backend: Any) -> list[list[int]]:
        if not self._lead:
            return _encode(texts, backend)
        led = _encode([_LEAD + text for text in texts], backend)
        plain = _encode(texts, backend)
        k = len(self._lead)  # where the lead grew together with the text, the text alone is the better reading
        return [row[k:] if row[:k] == self._lead else alone for row, alone in zip(led, plain, strict=True)]

    @cached_property
    def _wrapping(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after every text of its own accord."""
        bare = _encode(["1"], self._backend)[0]
        full = self._backend.encode("1", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    @cached_property
    def _lead(self) -> list[int]:
        """Tokens of a lead text that keeps a SentencePiece-like tokenizer from putting a space before a text; empty
        where the tokenizer puts none."""
        lead, plain, together = _encode([_LEAD, "1", _LEAD + "1"], self._backend)
        return lead if together[: len(lead)] == lead and together[len(lead) :] != plain else []

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        added = self._backend.get_added_tokens_decoder().values()
        spellings = sorted({token.content for token in added if token.special}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @cached_property
    def _literal(self) -> Any:
        """A second tokenizer to which special tokens are ordinary text; made only when a text spells one out."""
        from tokenizers import Tokenizer as Backend

        literal = Backend.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal


def _encode(texts: Sequence[str], backend: Any) -> list[list[int]]:
    # Lone surrogates have no UTF-8 form; they become question marks instead of an error.
    sound = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
    return [row.ids for row in backend.encode_batch_fast(sound, add_special_tokens=False)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder, with the stop tokens of its generation_config.json, its config.json
    and the tokenizer together.

    Raises:
      TokenizerError: no folder, no tokenizer in it, or no stop token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TokenizerError(f"No folder {str(folder)!r}: expected a checkpoint in Hugging Face layout.")
    if not (folder / "tokenizer.json").is_file() and not any(folder.glob("tokenizer*")):
        raise TokenizerError(
            f"No tokenizer in {str(folder)!r}: tokenizer.json and tokenizer_config.json belong next to config.json."
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "config.json").is_file():
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise TokenizerError(f"The tokenizer in {str(folder)!r} does not load: {error}") from error
    return Tokenizer(hf, path=str(folder), stop_tokens=_folder_stop_tokens(folder))


def _folder_stop_tokens(folder: Path) -> list[int]:
    """eos ids of generation_config.json and config.json (and its text part), each a number or a list."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{folder / name} is not JSON: {error}") from error
        for part in (values, values.get("text_config") or {}):
            eos = part.get("eos_token_id")
            found += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return found
