"""Semantic verification, the host-side loop: anchors → prefixes → teacher → similarity → verdicts.

The teacher sees the prompt and the response up to a chunk's start, never the chunk. What comes back is measured as the
student would have written it: re-tokenised by the student's tokenizer, cut to the chunk's length, compared as text.

Four details decide whether that comparison is fair.

* A start inside a character moves to the nearest clean cut on its left, and both texts then begin there: the student's
  chunk is longer by the moved tokens, and so is what is asked of the teacher. A start without a clean cut near it is
  dropped. Both are counted.
* Leading white space is left out on both sides: chat interfaces lose it, and it says next to nothing.
* An answer that ends within the chunk carries a visible end mark on either side, so that ending where the teacher goes
  on (or the reverse) costs similarity and ending together does not.
* A missing sample is missing: it lowers n, never the score.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from omniopd_jax.config import Config
from omniopd_jax.data.tokenizer import BROKEN, Tokenizer
from omniopd_jax.prng import stable_seed
from omniopd_jax.teacher.protocol import (
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Teacher,
    TeacherStopped,
    Usage,
)
from omniopd_jax.types import Anchors, Branches, PromptBatch, Rollout, Verdicts

END_MARK = " ␃"  # stands for a stop token in a compared text; a word of its own for word-wise similarities

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """What is asked of the teacher, and when its silence stops the run."""

    chunk_tokens: int  # C
    num_continuations: int  # N
    temperature: float = 1.0
    top_p: float = 1.0
    token_slack: float = 1.5  # teacher tokens asked for a student token wanted
    max_missing_fraction: float = 0.5  # share of the samples asked for
    max_refusal_fraction: float = 0.5

    @classmethod
    def from_config(cls, config: Config) -> VerifySettings:
        return cls(
            chunk_tokens=config.audit.chunk_tokens,
            num_continuations=config.audit.num_continuations,
            temperature=config.teacher.temperature,
            top_p=config.teacher.top_p,
            token_slack=config.teacher.token_slack,
            max_missing_fraction=config.teacher.max_missing_fraction,
            max_refusal_fraction=config.teacher.max_refusal_fraction,
        )


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One anchor that can be shown to a teacher."""

    row: int
    slot: int
    start: int  # response position of the chunk's first token
    cut: int  # response position where the prefix ends, ≤ start
    prefix: str


def verify(
    batch: PromptBatch,
    rollout: Rollout,
    anchors: Anchors,
    branches: Branches | None = None,
    *,
    tokenizer: Tokenizer,
    teacher: Teacher,
    similarity: Similarity,
    settings: VerifySettings,
    seed: int,
    step: int,
) -> tuple[Verdicts, list[dict[str, Any]], dict[str, float]]:
    """Asks the teacher about every audited chunk and scores what it says.

    Args:
      batch: the prompts; row b belongs to row b of everything else. Host arrays throughout.
      rollout: the student's responses.
      anchors: where the teacher is asked.
      branches: student continuations from the same starts, each scored against the same teacher texts.
      tokenizer: the student's.
      teacher: who is asked.
      similarity: φ, from `get_similarity`.
      settings: what is asked.
      seed: the run's; with the prompt, the sample's number and the position it names the request's seed.
      step: for messages and audits.

    Returns:
      Verdicts; one audit record a chunk asked about, in which `prior`, `target`, `weight` (and each branch's `weight`)
      are None until the arm has decided them; metrics of this call, counts and means by name.

    Raises:
      TeacherStopped: more samples are missing or refused than the settings allow.
    """
    responses = [_real(rollout.tokens_BxT[row], rollout.mask_BxT[row]) for row in range(len(batch.prompts))]
    chunks, num_moved, num_dropped = _plan(responses, anchors, tokenizer)
    requests = [_request(chunk, batch, settings, seed) for chunk in chunks]
    began = time.perf_counter()
    results = list(teacher.continue_texts(requests)) if requests else []
    teacher_seconds = time.perf_counter() - began
    if len(results) != len(requests):
        raise TeacherStopped(f"{teacher.name} answered {len(results)} of {len(requests)} requests in step {step}.")
    received = [usable(result, settings.num_continuations) for result in results]
    stop_if_silent(received, results, settings, teacher.name, step)

    began = time.perf_counter()
    texts = _texts(chunks, received, responses, branches, tokenizer, settings.chunk_tokens)
    shape = (*np.shape(anchors.start_BxM), settings.num_continuations)
    verdicts = _score(chunks, texts, shape, branches, similarity)
    verdicts = _with_texts(verdicts, chunks, texts, settings.chunk_tokens)
    similarity_seconds = time.perf_counter() - began

    audits = [
        _audit(chunk, text, found, verdicts, batch, rollout, settings, step)
        for chunk, text, found in zip(chunks, texts, received, strict=True)
    ]
    metrics = _metrics(chunks, texts, results, verdicts, settings) | {
        "audit/moved_cuts": float(num_moved),
        "audit/dropped_cuts": float(num_dropped),
        "teacher/seconds": teacher_seconds,
        "audit/similarity_seconds": similarity_seconds,
    }
    return verdicts, audits, metrics


def _real(tokens_T: Any, mask_T: Any) -> list[int]:
    return np.asarray(tokens_T)[np.asarray(mask_T)].tolist()


def _plan(responses: Sequence[Sequence[int]], anchors: Anchors, tokenizer: Tokenizer) -> tuple[list[_Chunk], int, int]:
    """Chunks in ascending order within a response, starts moved, starts dropped."""
    is_valid_BxM, start_BxM = np.asarray(anchors.is_valid_BxM), np.asarray(anchors.start_BxM)
    wanted = [(int(row), int(slot), int(start_BxM[row, slot])) for row, slot in np.argwhere(is_valid_BxM)]
    prefixes = tokenizer.decode_batch([responses[row][:start] for row, _, start in wanted])
    chunks, num_moved, num_dropped = [], 0, 0
    for (row, slot, start), prefix in zip(wanted, prefixes, strict=True):
        cut = start
        if BROKEN in prefix:
            clean = tokenizer.clean_prefix_length(responses[row], start)
            if clean is None:
                num_dropped += 1
                continue
            cut, num_moved = clean, num_moved + 1
            prefix = tokenizer.decode(responses[row][:cut])
        chunks.append(_Chunk(row, slot, start, cut, prefix))
    return chunks, num_moved, num_dropped


def _request(chunk: _Chunk, batch: PromptBatch, settings: VerifySettings, seed: int) -> ContinuationRequest:
    prompt = batch.prompts[chunk.row]
    wanted_tokens = settings.chunk_tokens + chunk.start - chunk.cut
    return ContinuationRequest(
        messages=prompt.messages,
        prefix=chunk.prefix,
        n=settings.num_continuations,
        max_tokens=math.ceil(wanted_tokens * settings.token_slack),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=stable_seed(seed, prompt.id, int(batch.sample_index_B[chunk.row]), chunk.start),
        is_raw=prompt.is_raw,
    )


def usable(result: ContinuationResult, limit: int) -> list[Continuation]:
    """What can be compared: an empty text only where the teacher stopped at once."""
    return [found for found in result.continuations if found.text or found.finish_reason == "stop"][:limit]


def stop_if_silent(
    received: Sequence[Sequence[Continuation]],
    results: Sequence[ContinuationResult],
    settings: VerifySettings,
    name: str,
    step: int,
) -> None:
    requested = settings.num_continuations * len(results)
    if not requested:
        return
    missing = requested - sum(map(len, received))
    refused = sum(result.num_refused for result in results)
    if refused > settings.max_refusal_fraction * requested:
        raise TeacherStopped(
            f"{name} refused {refused} of {requested} samples in step {step}, more than "
            f"teacher.max_refusal_fraction={settings.max_refusal_fraction:g} allows; look at the prompts."
        )
    if missing > settings.max_missing_fraction * requested:
        raise TeacherStopped(
            f"{missing} of {requested} samples of {name} are missing in step {step}, more than "
            f"teacher.max_missing_fraction={settings.max_missing_fraction:g} allows; is it down, or too slow for "
            "teacher.step_deadline_s?"
        )


@dataclasses.dataclass(frozen=True)
class _Text:
    """A text in context and whether the answer ends with it."""

    text: str
    is_end: bool
    is_short: bool = False  # the teacher was cut off before the chunk's length

    @property
    def compared(self) -> str:
        return self.text.lstrip().rstrip(BROKEN) + (END_MARK if self.is_end else "")


@dataclasses.dataclass(frozen=True)
class _ChunkTexts:
    chunk: _Text
    continuations: list[_Text]
    branches: list[_Text]
    ids: list[list[int]]  # the continuations in the student's tokens, from the cut, with a stop token where one ended


def _texts(
    chunks: Sequence[_Chunk],
    received: Sequence[Sequence[Continuation]],
    responses: Sequence[Sequence[int]],
    branches: Branches | None,
    tokenizer: Tokenizer,
    chunk_tokens: int,
) -> list[_ChunkTexts]:
    """All texts to be compared, each decoded after the same prefix and at most as long as the chunk."""
    stops = set(tokenizer.stop_tokens)
    encoded = iter(tokenizer.encode_batch([found.text for texts in received for found in texts]))
    spans: list[tuple[list[int], list[int]]] = []  # (context, tokens) to decode, chunk by chunk
    kinds: list[list[tuple[bool, bool]]] = []  # of each span: is_end, is_short
    written: list[list[list[int]]] = []
    for chunk, found in zip(chunks, received, strict=True):
        response = responses[chunk.row]
        context, bridge = list(response[: chunk.cut]), list(response[chunk.cut : chunk.start])
        length = len(bridge) + chunk_tokens
        own = [list(response[chunk.cut : chunk.start + chunk_tokens])]
        if branches is not None:
            tokens_GxC = np.asarray(branches.tokens_BxMxGxC[chunk.row, chunk.slot])
            mask_GxC = np.asarray(branches.mask_BxMxGxC[chunk.row, chunk.slot])
            own += [bridge + _real(tokens, mask) for tokens, mask in zip(tokens_GxC, mask_GxC, strict=True)]
        marks, kept = [], []
        for ids in own:
            is_end = bool(ids) and ids[-1] in stops
            spans.append((context, ids[:-1] if is_end else ids))
            marks.append((is_end, False))
        for continuation in found:
            ids = next(encoded)
            # The student's own stop token would be one of its chunk's tokens.
            is_end = continuation.finish_reason == "stop" and len(ids) < length
            spans.append((context, ids[:length]))
            kept.append(([*ids, tokenizer.end_token] if is_end else ids)[:chunk_tokens])
            marks.append((is_end, continuation.finish_reason == "length" and len(ids) < length))
        kinds.append(marks)
        written.append(kept)
    decoded = iter(tokenizer.decode_after_batch(spans))
    num_branches = 0 if branches is None else branches.tokens_BxMxGxC.shape[2]
    result = []
    for marks, kept in zip(kinds, written, strict=True):
        texts = [_Text(next(decoded), is_end, is_short) for is_end, is_short in marks]
        result.append(_ChunkTexts(texts[0], texts[1 + num_branches :], texts[1 : 1 + num_branches], kept))
    return result


class _Pairs:
    """Distinct pairs of texts; students repeat themselves, and equal texts need no comparison."""

    def __init__(self) -> None:
        self._number: dict[tuple[str, str], int] = {}

    def add(self, a: str, b: str) -> int:
        """The pair's place in `scores`; -1, the last one, where the texts are equal."""
        return -1 if a == b else self._number.setdefault((a, b), len(self._number))

    def scores(self, similarity: Similarity) -> np.ndarray:
        """float32: one score a distinct pair, then a 1 for equal texts."""
        pairs = list(self._number)
        found = similarity([a for a, _ in pairs], [b for _, b in pairs]) if pairs else np.zeros(0)
        return np.append(np.asarray(found, np.float32), np.float32(1.0))


def _score(
    chunks: Sequence[_Chunk],
    texts: Sequence[_ChunkTexts],
    shape: tuple[int, int, int],
    branches: Branches | None,
    similarity: Similarity,
) -> Verdicts:
    """Verdicts from one batched call of the similarity."""
    pairs = _Pairs()
    plans = []
    for text in texts:
        own = text.chunk.compared
        teacher = [found.compared for found in text.continuations]
        students = [branch.compared for branch in text.branches]
        plans.append(
            (
                [pairs.add(own, other) for other in teacher],
                [pairs.add(a, b) for i, a in enumerate(teacher) for b in teacher[i + 1 :]],
                [[pairs.add(student, other) for other in teacher] for student in students],
                [
                    [pairs.add(*sorted((a, b))) for j, b in enumerate(students) if j != i]
                    for i, a in enumerate(students)
                ],
            )
        )
    scores = pairs.scores(similarity)
    score_BxMxN = np.zeros(shape, np.float32)
    is_received_BxMxN = np.zeros(shape, bool)
    agreement_BxM = np.zeros(shape[:2], np.float32)
    branch_shape = None if branches is None else (*shape[:2], branches.tokens_BxMxGxC.shape[2])
    branch_score_BxMxG = None if branch_shape is None else np.zeros(branch_shape, np.float32)
    branch_overlap_BxMxG = None if branch_shape is None else np.zeros(branch_shape, np.float32)
    for chunk, (own, among, branch, overlap) in zip(chunks, plans, strict=True):
        place = (chunk.row, chunk.slot)
        score_BxMxN[place][: len(own)] = scores[own]
        is_received_BxMxN[place][: len(own)] = True
        if among:
            agreement_BxM[place] = scores[among].mean()
        if branch_score_BxMxG is not None and branch_overlap_BxMxG is not None:
            if own:
                branch_score_BxMxG[place] = scores[np.array(branch)].mean(axis=1)
            if len(overlap) > 1:
                branch_overlap_BxMxG[place] = scores[np.array(overlap)].mean(axis=1)
    return Verdicts(score_BxMxN, is_received_BxMxN, agreement_BxM, branch_score_BxMxG, branch_overlap_BxMxG)


def _with_texts(
    verdicts: Verdicts, chunks: Sequence[_Chunk], texts: Sequence[_ChunkTexts], chunk_tokens: int
) -> Verdicts:
    """The verdicts with the teacher's texts as the student would have written them."""
    shape = verdicts.score_BxMxN.shape
    tokens_BxMxNxC = np.zeros((*shape, chunk_tokens), np.int32)
    mask_BxMxNxC = np.zeros((*shape, chunk_tokens), bool)
    cut_BxM = np.zeros(shape[:2], np.int32)
    for chunk, text in zip(chunks, texts, strict=True):
        place = (chunk.row, chunk.slot)
        cut_BxM[place] = chunk.cut
        for n, ids in enumerate(text.ids):
            tokens_BxMxNxC[(*place, n)][: len(ids)] = ids
            mask_BxMxNxC[(*place, n)][: len(ids)] = True
    return dataclasses.replace(verdicts, text_BxMxNxC=tokens_BxMxNxC, text_mask_BxMxNxC=mask_BxMxNxC, cut_BxM=cut_BxM)


def _audit(
    chunk: _Chunk,
    text: _ChunkTexts,
    found: Sequence[Continuation],
    verdicts: Verdicts,
    batch: PromptBatch,
    rollout: Rollout,
    settings: VerifySettings,
    step: int,
) -> dict[str, Any]:
    """One line of audits.jsonl, as far as it is known here."""
    place = (chunk.row, chunk.slot)
    end = chunk.start + settings.chunk_tokens
    num_tokens = int(np.asarray(rollout.mask_BxT[chunk.row, chunk.start : end]).sum())
    scores = verdicts.score_BxMxN[place].tolist()
    entropy = None if rollout.entropy_BxT is None else round(float(rollout.entropy_BxT[chunk.row, chunk.start]), 4)
    record = {
        "step": step,
        "response": chunk.row,
        "prompt_id": batch.prompts[chunk.row].id,
        "slot": chunk.slot,
        "start": chunk.start,
        "moved": chunk.start - chunk.cut,
        "num_tokens": num_tokens,
        "entropy": entropy,
        "chunk": text.chunk.text,
        "is_end": text.chunk.is_end,
        "continuations": [
            {
                "text": continuation.text,
                "score": round(score, 4),
                "finish_reason": "stop" if continuation.is_end else "length",
            }
            for continuation, score in zip(text.continuations, scores, strict=False)
        ],
        "branches": [],
        "prior": None,
        "score_sum": round(float(verdicts.score_sum_BxM[place]), 4),
        "count": len(found),
        "requested": settings.num_continuations,
        "target": None,
        "weight": None,
        "logprob": round(float(np.asarray(rollout.logprob_BxT[chunk.row, chunk.start : end]).sum()), 4),
    }
    if verdicts.branch_score_BxMxG is not None:
        record["branches"] = [
            {"text": branch.text, "score": round(score, 4), "weight": None}
            for branch, score in zip(text.branches, verdicts.branch_score_BxMxG[place].tolist(), strict=True)
        ]
    return record


def usage_metrics(results: Sequence[ContinuationResult], requested: int, received: int) -> dict[str, float]:
    """teacher/* of one call: `requested` samples, of which `received` are usable."""
    usage = sum((result.usage for result in results), Usage())
    used = sum((result.usage if result.used is None else result.used for result in results), Usage())
    metrics = {
        "teacher/requested": requested,
        "teacher/received": received,
        "teacher/cached": sum(result.num_cached for result in results),
        "teacher/calls": usage.calls,
        "teacher/prompt_tokens": usage.prompt_tokens,
        "teacher/completion_tokens": usage.completion_tokens,
        "teacher/tokens": usage.prompt_tokens + usage.completion_tokens,
        "teacher/dollars": usage.dollars,
        "teacher/used_calls": used.calls,
        "teacher/used_prompt_tokens": used.prompt_tokens,
        "teacher/used_completion_tokens": used.completion_tokens,
    }
    if requested:
        metrics["teacher/missing_share"] = 1 - received / requested
        metrics["teacher/refused_share"] = sum(result.num_refused for result in results) / requested
        metrics["teacher/latency_seconds"] = sum(result.latency_s for result in results) / len(results)
    return {name: float(value) for name, value in metrics.items()}


def _metrics(
    chunks: Sequence[_Chunk],
    texts: Sequence[_ChunkTexts],
    results: Sequence[ContinuationResult],
    verdicts: Verdicts,
    settings: VerifySettings,
) -> dict[str, float]:
    """Counts of this call, and means over what there is; a mean over nothing is left out."""
    requested = settings.num_continuations * len(chunks)
    continuations = [found for text in texts for found in text.continuations]
    metrics = {"audit/chunks": len(chunks)} | usage_metrics(results, requested, len(continuations))
    if continuations:
        metrics["audit/score_mean"] = float(verdicts.score_BxMxN.sum() / len(continuations))
        metrics["audit/ended_share"] = sum(found.is_end for found in continuations) / len(continuations)
        metrics["audit/short_share"] = sum(found.is_short for found in continuations) / len(continuations)
    several = [[found.compared for found in text.continuations] for text in texts if len(text.continuations) > 1]
    if several:
        # A teacher that cannot be made to sample shows here: all N texts equal make the target all or nothing.
        metrics["audit/identical_share"] = sum(len(set(compared)) == 1 for compared in several) / len(several)
        is_several_BxM = verdicts.count_BxM > 1
        metrics["audit/agreement_mean"] = float(verdicts.agreement_BxM[is_several_BxM].mean())
    if verdicts.branch_score_BxMxG is not None and continuations:
        is_scored_BxM = verdicts.count_BxM > 0
        metrics["audit/branch_score_mean"] = float(verdicts.branch_score_BxMxG[is_scored_BxM].mean())
        distinct = [len({branch.compared for branch in text.branches}) / len(text.branches) for text in texts]
        metrics["audit/branch_distinct_share"] = sum(distinct) / len(distinct)
    return {name: float(value) for name, value in metrics.items()}
