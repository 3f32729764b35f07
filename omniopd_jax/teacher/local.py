"""A JAX model as a black-box teacher: text in, text out, whatever tokenizer it has.

The prefixes of one response are nested, so most requests of a response share one *trunk*: its longest prefix is read
once, and every continuation branches off that one cache. A prefix whose tokens are not the beginning of the longest
one's (a cut inside a word can change how the word is split) gets a row of its own. Shapes are rounded up to a few
sizes, so that few programs are compiled, and all batches are submitted before the first is collected.

The only file of this room that knows jax.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import models
from omniopd_jax.data.prompts import bucket_width
from omniopd_jax.data.tokenizer import BROKEN, Tokenizer, load_tokenizer
from omniopd_jax.rollout.branches import read_trunk, sample_branches
from omniopd_jax.teacher.protocol import Continuation, ContinuationRequest, ContinuationResult, TeacherStopped, Usage
from omniopd_jax.types import Array, Branches, InputError, Prompt

_LENGTH_STEP = 4  # continuation lengths are rounded up to a multiple of this


@dataclasses.dataclass
class _Trunk:
    """One row: the longest of its requests' token sequences and where each request leaves it."""

    tokens: list[int]
    members: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (request, its length in tokens)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A submitted batch: its rows and what the device is going to answer."""

    trunks: list[_Trunk]
    branches: Branches


class LocalTeacher:
    """A model and its own tokenizer, asked as if it were far away."""

    def __init__(
        self,
        model: models.Model,
        tokenizer: Tokenizer,
        *,
        name: str = "local",
        template_args: Mapping[str, Any] | None = None,
        max_batch_tokens: int = 2**18,
        attention: str = "auto",
    ):
        """Wraps a model.

        Args:
          model: the teacher.
          tokenizer: its own; it need not be the student's.
          name: for logs.
          template_args: arguments of the teacher's chat template.
          max_batch_tokens: cached tokens that may be alive at once, trunks and branches together.
          attention: `teacher.attention`, of the trunks.

        Raises:
          InputError: the tokenizer has more tokens than the model, or no stop token that the model can emit.
          ModelError: the kernel asked for cannot serve this model or machine.
        """
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"The teacher's tokenizer has ids up to {tokenizer.vocab_size - 1}, but its model has a vocabulary of "
                f"{vocab_size}; they do not belong together."
            )
        self.name = name
        self.tokenizer = tokenizer
        dtype, device = model.module.compute_dtype, jax.devices()[0]
        kernel = models.kernel_of(attention, model.config, dtype, device, whose="teacher")
        self.model = models.with_kernel(model, models.Kernel(kernel))
        self._template_args = template_args
        self._max_batch_tokens = max_batch_tokens
        self._stop_tokens = tuple(token for token in tokenizer.stop_tokens if token < vocab_size)
        self._banned_tokens = tokenizer.banned_tokens(vocab_size)
        if not self._stop_tokens:
            raise InputError(f"The teacher can emit none of its stop tokens {tokenizer.stop_tokens}.")

    def probe(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model.params))
        stops = ", ".join(self.tokenizer.token_texts(self._stop_tokens))
        return f"{self.name}: a local model of {count:,} parameters that samples by itself; it stops at {stops}."

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        """Raises:
        TeacherStopped: the model computes NaN.
        TokenizerError: its chat template refuses the messages.
        """
        began = time.perf_counter()
        prefixes, tokens = self._tokenise(requests)
        groups: dict[tuple[int, float, float], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.n, request.temperature, request.top_p), []).append(i)
        pending = []
        for members in groups.values():
            trunks = _share_trunks(members, requests, tokens)
            pending += [self._submit(batch, requests) for batch in self._batches(trunks, requests)]
        results: list[ContinuationResult | None] = [None] * len(requests)
        for batch in pending:
            for i, result in self._collect(batch, requests, prefixes):
                results[i] = dataclasses.replace(result, latency_s=time.perf_counter() - began)
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Lets go of the parameters; the device frees them when nobody else holds them."""
        self.model = dataclasses.replace(self.model, params={}, adapters=None)

    def _tokenise(self, requests: Sequence[ContinuationRequest]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of each prefix, and of prompt and prefix together. A prompt is rendered once however often asked."""
        conversations = list(dict.fromkeys((request.messages, request.is_raw) for request in requests))
        prompts = [Prompt("", messages, is_raw) for messages, is_raw in conversations]
        encoded = self.tokenizer.encode_prompts(prompts, self._template_args)
        prompt_of = dict(zip(conversations, encoded, strict=True))
        prefixes = self.tokenizer.encode_batch([request.prefix for request in requests])
        tokens = [
            prompt_of[request.messages, request.is_raw] + prefix
            for request, prefix in zip(requests, prefixes, strict=True)
        ]
        if not all(tokens):
            raise InputError("A prompt has no tokens for the teacher: an empty text cannot be continued.")
        return prefixes, tokens

    def _batches(self, trunks: list[_Trunk], requests: Sequence[ContinuationRequest]) -> list[list[_Trunk]]:
        """Rows that are computed together: no more than fit, and few slots idle."""
        batches: list[list[_Trunk]] = []
        for trunk in sorted(trunks, key=lambda trunk: (len(trunk.members), len(trunk.tokens)), reverse=True):
            batch = [*batches[-1], trunk] if batches else [trunk]
            rows, columns, slots = _shape(batch)
            slot_tokens = requests[trunk.members[0][0]].n * _length(batch, requests)
            idle = sum(slots - len(row.members) for row in batch) * slot_tokens
            fits = rows * (columns + slots * slot_tokens) <= self._max_batch_tokens
            if batches and fits and idle <= self._max_batch_tokens // 8:
                batches[-1].append(trunk)
            else:
                batches.append([trunk])
        return batches

    def _submit(self, trunks: list[_Trunk], requests: Sequence[ContinuationRequest]) -> _Pending:
        rows, columns, slots = _shape(trunks)
        tokens_BxS = np.zeros((rows, columns), np.int32)
        mask_BxS = np.zeros((rows, columns), bool)
        mask_BxS[:, 0] = True  # a padded row reads one token rather than none
        start_BxM = np.zeros((rows, slots), np.int32)
        is_valid_BxM = np.zeros((rows, slots), bool)
        seed_BxM = np.zeros((rows, slots), np.int32)
        for row, trunk in enumerate(trunks):
            tokens_BxS[row, : len(trunk.tokens)] = trunk.tokens
            mask_BxS[row, : len(trunk.tokens)] = True
            for slot, (request, length) in enumerate(trunk.members):
                start_BxM[row, slot] = length - 1  # counted from column 1, so that every row has the same "prompt"
                is_valid_BxM[row, slot] = True
                seed_BxM[row, slot] = requests[request].seed
        first = requests[trunks[0].members[0][0]]
        branches = _sample(
            self.model,
            tokens_BxS,
            mask_BxS,
            start_BxM,
            is_valid_BxM,
            seed_BxM,
            num_branches=first.n,
            length=_length(trunks, requests),
            stop_tokens=self._stop_tokens,
            banned_tokens=self._banned_tokens,
            temperature=first.temperature,
            top_p=first.top_p,
        )
        return _Pending(trunks, branches)

    def _collect(
        self, pending: _Pending, requests: Sequence[ContinuationRequest], prefixes: Sequence[list[int]]
    ) -> list[tuple[int, ContinuationResult]]:
        mask_BxMxNxC = np.asarray(pending.branches.mask_BxMxGxC)
        if not np.isfinite(np.asarray(pending.branches.logprob_BxMxGxC)[mask_BxMxNxC]).all():
            raise TeacherStopped(f"{self.name} computes NaN; its weights or its dtype are broken.")
        tokens = np.asarray(pending.branches.tokens_BxMxGxC).tolist()
        lengths = mask_BxMxNxC.sum(axis=-1).tolist()
        answers: list[tuple[int, int, list[list[int]]]] = []  # (request, tokens read for it, its samples)
        for row, trunk in enumerate(pending.trunks):
            for slot, (request, _) in enumerate(trunk.members):
                limit = requests[request].max_tokens
                drawn = zip(tokens[row][slot], lengths[row][slot], strict=True)
                # The trunk is read once, for the first of its requests.
                read = len(trunk.tokens) if slot == 0 else 0
                answers.append((request, read, [sample[: min(length, limit)] for sample, length in drawn]))
        spans = [
            (prefixes[request], ids[:-1] if ids[-1] in self._stop_tokens else ids)
            for request, _, samples in answers
            for ids in samples
        ]
        texts = iter(self.tokenizer.decode_after_batch(spans))
        results = []
        for request, read, samples in answers:
            found = tuple(
                continuation
                for ids in samples
                if (continuation := _continuation(next(texts), is_end=ids[-1] in self._stop_tokens)) is not None
            )
            usage = Usage(prompt_tokens=read, completion_tokens=sum(map(len, samples)), calls=1)
            num_missing = requests[request].n - len(found)
            results.append((request, ContinuationResult(found, num_missing, model=self.name, usage=usage)))
        return results


def _continuation(text: str, *, is_end: bool) -> Continuation | None:
    """The length limit may fall inside a character, which is then left out; None where nothing else was written."""
    if is_end:
        return Continuation(text, "stop")
    text = text.rstrip(BROKEN)
    return Continuation(text, "length") if text else None


def load_teacher(
    path: str | Path,
    *,
    template_args: Mapping[str, Any] | None = None,
    max_batch_tokens: int = 2**18,
    attention: str = "auto",
) -> LocalTeacher:
    """The model and tokenizer of a folder in HF layout, in float32 on a CPU and bfloat16 elsewhere.

    Raises:
      InputError: no such folder, a model that we do not know, no tokenizer.
    """
    if not str(path):
        raise InputError(
            "config.teacher.path is empty: a local teacher is a folder with config.json and *.safetensors."
        )
    tokenizer = load_tokenizer(path)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = models.load_model(path, dtype=dtype)
    return LocalTeacher(
        model,
        tokenizer,
        name=f"local:{Path(path).name}",
        template_args=template_args,
        max_batch_tokens=max_batch_tokens,
        attention=attention,
    )


def _share_trunks(
    members: Sequence[int], requests: Sequence[ContinuationRequest], tokens: Sequence[list[int]]
) -> list[_Trunk]:
    """Longest first: a request joins the first trunk of its conversation whose beginning it is."""
    trunks: list[_Trunk] = []
    of_conversation: dict[Any, list[_Trunk]] = {}
    for i in sorted(members, key=lambda i: len(tokens[i]), reverse=True):
        known = of_conversation.setdefault((requests[i].messages, requests[i].is_raw), [])
        length = len(tokens[i])
        trunk = next((trunk for trunk in known if trunk.tokens[:length] == tokens[i]), None)
        if trunk is None:
            trunk = _Trunk(tokens[i])
            known.append(trunk)
            trunks.append(trunk)
        trunk.members.append((i, length))
    return trunks


def _shape(trunks: Sequence[_Trunk]) -> tuple[int, int, int]:
    """(rows, columns, slots), rounded up to sizes that recur."""
    slots = max(len(trunk.members) for trunk in trunks)
    return (
        bucket_width(len(trunks), smallest=1),
        bucket_width(max(len(trunk.tokens) for trunk in trunks), smallest=64),
        slots + slots % 2 if slots > 1 else 1,
    )


def _length(trunks: Sequence[_Trunk], requests: Sequence[ContinuationRequest]) -> int:
    longest = max(requests[request].max_tokens for trunk in trunks for request, _ in trunk.members)
    return -(-longest // _LENGTH_STEP) * _LENGTH_STEP


@functools.partial(
    jax.jit,
    static_argnames=("num_branches", "length", "stop_tokens", "banned_tokens", "temperature", "top_p"),
)
def _sample(
    model: models.Model,
    tokens_BxS: Array,
    mask_BxS: Array,
    start_BxM: Array,
    is_valid_BxM: Array,
    seed_BxM: Array,
    **settings: Any,
) -> Branches:
    """Reads the trunks and samples the branches in one program. Keyed by the requests' own seeds."""
    keys_BxM = jax.vmap(jax.vmap(jax.random.key))(seed_BxM)
    trunk = read_trunk(model, tokens_BxS, mask_BxS)
    return sample_branches(model, trunk, start_BxM, is_valid_BxM, keys_BxM, prompt_width=1, **settings)
