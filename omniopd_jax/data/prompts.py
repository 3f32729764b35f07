"""Prompts from files, and the order in which a run meets them.

Rows may have the columns of TRL (``prompt`` as text or as chat messages, ``messages``), of verl (``prompt`` as
messages, ``reward_model.ground_truth``) or of plain question sets such as GSM8K (``question``, ``answer``). The order
is a function of the seed and the step alone, so a resumed run needs no saved position. Equal rows are one: published
files repeat theirs so that one pass over them is many epochs (DAPO-Math-17K has each prompt about 100 times).
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omniopd_jax.data.tokenizer import Tokenizer
from omniopd_jax.types import InputError, Message, Prompt, PromptBatch

PROMPT_FIELDS = ("prompt", "question", "problem", "messages")  # what "auto" looks for, in this order
ANSWER_FIELDS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
ID_FIELDS = ("id", "task_id", "unique_id")

_LOG = logging.getLogger(__name__)


class PromptError(InputError):
    """A prompt file that cannot be used; the message names the file, the line and what would be right."""


def read_prompts(
    path: str | Path,
    prompt_field: str = "auto",
    answer_field: str = "auto",
    *,
    system_prompt: str = "",
    is_raw: bool = False,
    convert: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None,
) -> list[Prompt]:
    """Reads a jsonl (or .jsonl.gz) or parquet file, one prompt a row; rows with equal prompt and answer are one.

    The first of equal rows gives the prompt its place and its id; a row without an id is named by its number in the
    file, so ids do not depend on what repeats.

    Args:
      path: the file.
      prompt_field: column of the prompt (a text or a list of chat messages); a dotted name reaches into a row.
        "auto": the first of PROMPT_FIELDS that a row has.
      answer_field: column of the reference answer, "" or absent in a row: no answer. "auto": the first of
        ANSWER_FIELDS. In a conversation that ends with the assistant's turn, that turn is the answer unless a column
        gives one.
      system_prompt: put before conversations that have no system turn of their own.
      is_raw: the prompt is the exact text that the model continues; no chat template is applied.
      convert: (row, where it stands) → the row to be read instead, for files in another layout.

    Raises:
      PromptError: no such file, an empty one, a line that is not JSON, a row without a prompt, two different rows
        with one id.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    where_of: dict[str, str] = {}
    known: set[tuple[tuple[Message, ...], str]] = set()
    number = 0
    for number, row in enumerate(_rows(path), start=1):
        where, values = row
        if convert is not None and isinstance(values, Mapping):
            values = convert(values, f"{path} {where}")
        prompt = _prompt(values, f"{path} {where}", f"{path.name.split('.')[0]}:{number - 1}",
                         prompt_field, answer_field, system_prompt, is_raw)  # fmt: skip
        content = prompt.messages, prompt.answer
        if content in known:
            continue
        if prompt.id in where_of:
            raise PromptError(
                f"{path}: {where_of[prompt.id]} and {where} have the same id {prompt.id!r}; ids are unique."
            )
        where_of[prompt.id] = where
        known.add(content)
        prompts.append(prompt)
    if not prompts:
        raise PromptError(f"{path} holds no prompt: expected one row a prompt.")
    if len(prompts) < number:
        _LOG.info("%s: %d rows hold %d different prompts; equal rows are taken as one.", path, number, len(prompts))
    return prompts


def bucket_width(length: int, smallest: int = 16) -> int:
    """The smallest of 16, 32, 48, 64, 96, 128, 192, … that holds `length`: two shapes to compile for each doubling."""
    width = smallest
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 and width > smallest else _next_power(width)
    return width


def pad_prompts(
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int] | np.ndarray],
    sample_index: Sequence[int],
    *,
    width: int,
    pad_id: int,
) -> PromptBatch:
    """Left-pads tokenised prompts to `width` (host arrays).

    Raises:
      ValueError: a prompt is longer than `width`; nothing is cut.
    """
    longest = max(map(len, tokens), default=0)
    if longest > width:
        raise ValueError(f"A prompt of {longest} tokens does not fit a width of {width}.")
    tokens_BxP = np.full((len(tokens), width), pad_id, np.int32)
    mask_BxP = np.zeros((len(tokens), width), bool)
    for row, ids in enumerate(tokens):
        tokens_BxP[row, width - len(ids) :] = ids
        mask_BxP[row, width - len(ids) :] = True
    return PromptBatch(
        prompts=tuple(prompts),
        tokens_BxP=tokens_BxP,
        mask_BxP=mask_BxP,
        sample_index_B=np.asarray(sample_index, np.int32),
    )


class PromptStream:
    """An endless stream of batches: a fresh shuffle an epoch, every prompt once an epoch."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        samples_per_prompt: int = 1,
        max_prompt_tokens: int,
        seed: int,
        shuffle: bool = True,
        template_args: Mapping[str, Any] | None = None,
        use_chat_template: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Tokenises every prompt once and sets aside those that are too long.

        Args:
          prompts: what a run trains on.
          tokenizer: the student's.
          batch_size: B, samples of a step over all processes.
          samples_per_prompt: adjacent rows that share a prompt; divides `batch_size`.
          max_prompt_tokens: longer prompts are listed in `too_long` and left out, never cut.
          seed: names the order.
          shuffle: False keeps the file's order in every epoch.
          template_args: arguments of the chat template.
          use_chat_template: False continues the prompt's text as it stands.
          process_index: this host's number; it gets the rows [index · B / count, (index + 1) · B / count).
          process_count: hosts that share a batch; divides `batch_size`.

        Raises:
          PromptError: no prompt is short enough.
          ValueError: sizes that do not divide.
        """
        if batch_size % samples_per_prompt or batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of samples_per_prompt={samples_per_prompt} and of "
                f"process_count={process_count}."
            )
        tokens = [
            np.asarray(ids, np.int32) for ids in tokenizer.encode_prompts(prompts, template_args, use_chat_template)
        ]
        keep = [i for i, ids in enumerate(tokens) if 0 < len(ids) <= max_prompt_tokens]
        empty = [prompts[i].id for i, ids in enumerate(tokens) if len(ids) == 0]
        if empty:
            raise PromptError(f"Prompt {empty[0]!r} has no tokens at all: an empty text cannot be continued.")
        self.too_long: tuple[tuple[str, int], ...] = tuple(
            (prompt.id, len(ids)) for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > max_prompt_tokens
        )
        if not keep:
            shortest = min(length for _, length in self.too_long) if self.too_long else 0
            raise PromptError(
                f"All {len(prompts)} prompts are longer than max_prompt_tokens={max_prompt_tokens} (the shortest has "
                f"{shortest} tokens)."
            )
        self.prompts: tuple[Prompt, ...] = tuple(prompts[i] for i in keep)
        self._tokens = [tokens[i] for i in keep]
        self._pad_id = tokenizer.pad_id
        self._batch_size = batch_size
        self._repeats = samples_per_prompt
        self._seed = seed
        self._shuffle = shuffle
        self._process = (process_index, process_count)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.prompts)

    def epoch(self, step: int) -> float:
        """Epochs finished when `step` begins."""
        return step * (self._batch_size // self._repeats) / len(self)

    def batch_for_step(self, step: int) -> PromptBatch:
        """This process's share of the batch of `step`, a function of the seed and the step alone.

        The width is that of the whole batch, so that all processes hold pieces of one array.
        """
        per_step = self._batch_size // self._repeats
        chosen = [self._prompt_at(step * per_step + i) for i in range(per_step)]
        width = bucket_width(max(len(self._tokens[i]) for i in chosen))
        rows = [i for i in chosen for _ in range(self._repeats)]
        index, count = self._process
        share = range(index * self._batch_size // count, (index + 1) * self._batch_size // count)
        return pad_prompts(
            [self.prompts[rows[row]] for row in share],
            [self._tokens[rows[row]] for row in share],
            [step * self._batch_size + row for row in share],
            width=width,
            pad_id=self._pad_id,
        )

    def _prompt_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if not self._shuffle:
            return offset
        if epoch not in self._orders:
            # A batch touches at most a few epochs; older orders can be made again at any time.
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return int(self._orders[epoch][offset])


def _next_power(width: int) -> int:
    return 1 << width.bit_length()


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row; `where` is how a person finds it again."""
    if not path.is_file():
        raise PromptError(f"No prompt file {str(path)!r}: expected a .jsonl or .parquet file.")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}.") from error
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise PromptError(f"{path} after line {number} cannot be read as text: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PromptError(f"{path} is a parquet file, which needs pyarrow: pip install pyarrow.") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path} is not a readable parquet file: {error}") from error


def _prompt(
    row: Any, where: str, default_id: str, prompt_field: str, answer_field: str, system_prompt: str, is_raw: bool
) -> Prompt:
    if not isinstance(row, Mapping):
        raise PromptError(f"{where} is not an object with columns.")
    fields = PROMPT_FIELDS if prompt_field == "auto" else (prompt_field,)
    value = next((found for found in (_field(row, name) for name in fields) if found not in (None, "", [])), None)
    if value is None:
        raise PromptError(
            f"{where} has no prompt: expected {' or '.join(fields)}, found {', '.join(map(str, row)) or 'no column'}."
        )
    answer_fields = ANSWER_FIELDS if answer_field == "auto" else (answer_field,) if answer_field else ()
    answer = next((found for found in (_field(row, name) for name in answer_fields) if found is not None), "")
    messages = [Message("user", value)] if isinstance(value, str) else _messages(value, where)
    if messages[-1].role == "assistant":
        answer = answer or messages[-1].content
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        raise PromptError(f"{where} has no prompt: the conversation holds no user turn before the answer.")
    if is_raw:
        if len(messages) > 1 or system_prompt:
            raise PromptError(
                f"{where} has {len(messages) + bool(system_prompt)} messages, system prompt included, but a raw prompt "
                "is one text; use the chat template."
            )
    elif system_prompt and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt))
    own_id = next((found for found in (_field(row, name) for name in ID_FIELDS) if found not in (None, "")), default_id)
    return Prompt(
        id=str(own_id),
        messages=tuple(messages),
        is_raw=is_raw,
        answer=answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
    )


def _field(row: Mapping[str, Any], name: str) -> Any:
    """row["a.b"] where there is such a column, else row["a"]["b"]; None where there is neither."""
    if name in row:
        return row[name]
    head, dot, tail = name.partition(".")
    inner = row.get(head)
    return _field(inner, tail) if dot and isinstance(inner, Mapping) else None


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence):
        raise PromptError(f"{where}: a prompt is a text or a list of messages, got {type(value).__name__}.")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
            raise PromptError(f"{where}: a message has a role (system, user or assistant) and a content, got {turn!r}.")
        content = turn.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = None if None in parts else "".join(map(str, parts))
        if not isinstance(content, str):
            raise PromptError(f"{where}: the content of a message is text, got {turn.get('content')!r}.")
        messages.append(Message(turn["role"], content))
    return messages
