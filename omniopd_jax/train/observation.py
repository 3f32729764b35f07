"""What one batch comes to before anything is trained, and what is written about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from omniopd_jax.train import batching, tally
from omniopd_jax.train.answers import answers_of
from omniopd_jax.train.audit import Audit, audit, filled_up, joined, rows_of, split, whole
from omniopd_jax.train.credit import Credit, Evidence, give_credit, groups, mean_where
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.pipeline import parts_audited, parts_learnt, rows_sampled
from omniopd_jax.train.stops import Interrupts, check_finite
from omniopd_jax.types import PromptBatch, Rollout, TokenTree

if TYPE_CHECKING:
    from omniopd_jax.train.loop import Clock


class Observation(NamedTuple):
    """What one batch of responses and the teacher's texts come to, before anything is trained. Host arrays."""

    evidence: Evidence
    credit: Credit
    audits: list[dict[str, Any]]  # one record a chunk that the teacher was asked about
    asked: dict[str, float]  # metrics of what the teacher was asked; {} where it was not

    @property
    def batch(self) -> PromptBatch:
        return self.evidence.batch

    @property
    def rollout(self) -> Rollout:
        """The student's responses, where an arm needs them."""
        assert self.evidence.rollout is not None
        return self.evidence.rollout


def observe(
    experiment: Experiment,
    index: int,
    clock: Clock,
    interrupts: Interrupts,
    learn: Callable[[TokenTree], None] = lambda tree: None,
) -> Observation:
    """Prompts → what the arms need of responses, chunks, teacher's texts, answers, rewards → weights, of optimizer step
    `index` (from 0).

    `learn` is given the weights of the batch in `parts_learnt` parts, rows in order, each as soon as it is certain.
    """
    config, needs, step = experiment.config, experiment.needs, index + 1
    evidence = Evidence(experiment.stream.batch_for_step(index))
    total = len(evidence.batch.prompts)
    rows = total // parts_learnt(config)
    batches = rows_of(evidence.batch, rows_sampled(config))
    responses = (_respond(experiment, Evidence(batch), index, clock) for batch in batches)
    audits, asked = [], []
    if needs.chunks:
        sampled: list[Evidence] = []
        heard: list[Audit] = []
        size = total // parts_audited(config)
        parts = _kept((part for several in responses for part in split(several, size)), sampled)
        with closing(audit(experiment, parts, step=step, interrupts=interrupts, clock=clock)) as audited:
            for part in audited:
                if not heard:  # all are sampled by now
                    evidence = whole(sampled, evidence.batch)
                heard.append(part)
                end = len(heard) * len(part.verdicts.score_BxMxN)
                if end < total and end % rows == 0:
                    with clock.phase("update"):
                        so_far = evidence._replace(verdicts=filled_up(joined(heard).verdicts, total))
                        tree = give_credit(config, so_far, step).tree
                    learn(batching.sliced(tree, end - rows, end))
        verdicts, audits, of_chunks = joined(heard)
        evidence, asked = evidence._replace(verdicts=verdicts), [of_chunks]
    elif needs.responses:
        evidence = next(responses)
    with clock.phase("audit"):
        if needs.answers:
            answers, of_answers = answers_of(experiment, evidence.batch, step=step, interrupts=interrupts)
            evidence, asked = evidence._replace(answers=answers), [*asked, of_answers]
        if needs.reward:
            evidence = evidence._replace(reward_B=_rewards(experiment, evidence))
        credit = give_credit(config, evidence, step)
    learn(batching.sliced(credit.tree, total - rows, len(credit.tree.tokens_BxT)))
    return Observation(evidence, credit, _complete(audits, credit), tally.in_turn(asked).metrics)


def _kept(parts: Iterable[Evidence], to: list[Evidence]) -> Iterator[Evidence]:
    for part in parts:
        to.append(part)
        yield part


def _respond(experiment: Experiment, evidence: Evidence, index: int, clock: Clock) -> Evidence:
    """What the student does, and what a white-box teacher thinks of it."""
    student, model, needs, step = experiment.student, experiment.model, experiment.needs, index + 1
    batch = evidence.batch
    with clock.phase("sample"):
        prompts = (batch.tokens_BxP, batch.mask_BxP, batch.sample_index_B)
        tokens_BxP, mask_BxP, index_B = batching.to_devices(prompts, experiment.mesh)
        at = jnp.asarray(index, jnp.int32)
        rollout_on_devices = student.respond(model, tokens_BxP, mask_BxP, index_B, at)
        anchors_on_devices = student.choose(rollout_on_devices, index_B, at) if needs.chunks else None
        rollout, anchors = batching.to_host((rollout_on_devices, anchors_on_devices))
    check_finite(step, {"rollout/entropy": rollout.entropy_BxT, "rollout/logprob": rollout.logprob_BxT})
    evidence = evidence._replace(rollout=rollout, anchors=anchors)

    if needs.branches:
        with clock.phase("score"):
            assert anchors_on_devices is not None
            branches = batching.to_host(student.branch(model, rollout_on_devices, anchors_on_devices, index_B, at))
        check_finite(step, {"branch/logprob": branches.logprob_BxMxGxC})
        evidence = evidence._replace(branches=branches)
    if experiment.teacher_logprob is not None:
        with clock.phase("score"):
            logprob_BxT = batching.to_host(experiment.teacher_logprob(rollout_on_devices))
        check_finite(step, {"opd/divergence": logprob_BxT})
        evidence = evidence._replace(teacher_logprob_BxT=logprob_BxT)
    return evidence


def _rewards(experiment: Experiment, evidence: Evidence) -> np.ndarray:
    """float32 [B]: 1 for a response that its prompt's reference answer bears out, else 0."""
    rollout, judge = evidence.rollout, experiment.judge
    assert rollout is not None
    assert judge is not None
    rows = [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens_BxT, rollout.mask_BxT, strict=True)]
    texts = experiment.tokenizer.decode_batch(rows)
    answers = [prompt.answer for prompt in evidence.batch.prompts]
    return np.array([verdict.passed for verdict in judge.all(texts, answers)], np.float32)


def step_metrics(
    experiment: Experiment, index: int, seen: Observation, packed: Sequence[TokenTree], updated: Mapping[str, float]
) -> dict[str, float]:
    """What a step measured, by the names of `metrics.REGISTRY`, the clock's and the teacher's aside.

    `packed` is what was computed, part by part.
    """
    evidence, credit, spent, sums = seen.evidence, seen.credit, experiment.spent, dict(updated)
    mask_BxT = evidence.answers.mask_BxT if evidence.rollout is None and evidence.answers else seen.rollout.mask_BxT
    tokens = max(int(mask_BxT.sum()), 1)
    kl_sum, anchored = sums.pop("anchor/kl_sum"), sums.pop("anchor/tokens")
    metrics = {"anchor/fraction": anchored / tokens, "rollout/epoch": float(experiment.stream.epoch(index))}
    if anchored:
        metrics["anchor/kl"] = kl_sum / anchored
    if "opd/tokens" in sums:
        scored = sums.pop("opd/tokens")
        metrics |= {"opd/scored_tokens": scored, "opd/divergence": sums.pop("opd/divergence_sum") / max(scored, 1)}
    if "update/tokens" in sums:
        metrics["update/clip_fraction"] = sums.pop("update/clipped") / max(sums.pop("update/tokens"), 1)
    if evidence.rollout is not None:
        metrics |= _rollout_metrics(evidence.rollout)
    if evidence.teacher_logprob_BxT is not None:
        gap_BxT = seen.rollout.logprob_BxT - evidence.teacher_logprob_BxT
        metrics |= {"opd/scored_tokens": float(tokens), "opd/divergence": mean_where(gap_BxT, mask_BxT)}
    if evidence.anchors is not None:
        metrics |= _audit_metrics(evidence, credit, experiment.config.audit.chunk_tokens)
    if credit.tree.branch_start_BxR.shape[1]:
        kept = sum(int((part.branch_weight_BxRxC != 0).any(axis=2).sum()) for part in packed)
        metrics["branch/kept"] = kept / len(mask_BxT)
        metrics["branch/packed"] = kept / max(sum(part.branch_start_BxR.size for part in packed), 1)
    if evidence.answers is not None:
        length_B = evidence.answers.mask_BxT.sum(axis=1)
        metrics["sft/answer_tokens"] = mean_where(length_B, length_B > 0)
    if evidence.reward_B is not None:
        metrics |= _reward_metrics(evidence.reward_B, groups(evidence.batch))
    if experiment.needs.text:
        metrics |= {
            "teacher/total_tokens": float(spent.completion_tokens),
            "teacher/total_prompt_tokens": float(spent.prompt_tokens),
            "teacher/total_calls": float(spent.calls),
            "teacher/total_dollars": spent.dollars,
        }
    return sums | metrics


def _rollout_metrics(rollout: Rollout) -> dict[str, float]:
    length_B = rollout.mask_BxT.sum(axis=1)
    return {
        "rollout/tokens": float(length_B.mean()),
        "rollout/finished": float(rollout.is_finished_B.mean()),
        "rollout/empty": float((length_B <= rollout.is_finished_B).sum()),
        "rollout/entropy": mean_where(np.asarray(rollout.entropy_BxT), rollout.mask_BxT),
        "rollout/logprob": mean_where(rollout.logprob_BxT, rollout.mask_BxT),
    }


def _audit_metrics(evidence: Evidence, credit: Credit, chunk_tokens: int) -> dict[str, float]:
    rollout, anchors, is_audited_BxM = evidence.rollout, evidence.anchors, credit.is_audited_BxM
    assert rollout is not None
    assert anchors is not None
    assert is_audited_BxM is not None
    assert credit.prior_BxM is not None
    start_entropy_BxM = np.take_along_axis(np.asarray(rollout.entropy_BxT), anchors.start_BxM, axis=1)
    metrics = {
        "audit/fraction": float(is_audited_BxM.sum() * chunk_tokens / max(int(rollout.mask_BxT.sum()), 1)),
        "audit/audited": mean_where(is_audited_BxM.astype(np.float32), anchors.is_valid_BxM),
        "audit/entropy": mean_where(start_entropy_BxM, is_audited_BxM),
        "audit/prior": mean_where(credit.prior_BxM, is_audited_BxM),
    }
    given = [credit.chunk_advantage_BxM, credit.branch_advantage_BxMxG]
    advantage = next((found for found in given if found is not None), None)
    if advantage is not None:
        metrics["audit/advantage"] = mean_where(np.abs(advantage), is_audited_BxM)
    if credit.target_BxM is not None:
        metrics["audit/target"] = mean_where(credit.target_BxM, is_audited_BxM)
    return metrics


def _reward_metrics(reward_B: np.ndarray, group_B: np.ndarray) -> dict[str, float]:
    by_group = [reward_B[group_B == group] for group in np.unique(group_B)]
    return {
        "reward/mean": float(reward_B.mean()),
        "reward/std": float(reward_B.std()),
        "reward/informative": float(np.mean([found.min() < found.max() for found in by_group])),
    }


def _complete(audits: list[dict[str, Any]], credit: Credit) -> list[dict[str, Any]]:
    """The audit records with what the arms decided."""
    for record in audits:
        place = (record["response"], record["slot"])
        assert credit.prior_BxM is not None
        record["prior"] = round(float(credit.prior_BxM[place]), 4)
        if credit.target_BxM is not None:
            record["target"] = round(float(credit.target_BxM[place]), 4)
        if credit.chunk_advantage_BxM is not None:
            record["weight"] = round(float(credit.chunk_advantage_BxM[place]), 4)
        if credit.branch_advantage_BxMxG is not None:
            for branch, weight in zip(record["branches"], credit.branch_advantage_BxMxG[place], strict=True):
                branch["weight"] = round(float(weight), 4)
    return audits


def rollout_lines(experiment: Experiment, step: int, seen: Observation) -> list[dict[str, Any]]:
    """One line of rollouts.jsonl a response; none where the student does not respond."""
    if seen.evidence.rollout is None:
        return []
    rollout, lines = seen.rollout, []
    for row, prompt in enumerate(seen.batch.prompts):
        length = int(rollout.mask_BxT[row].sum())
        line = {
            "step": step,
            "response": row,
            "prompt_id": prompt.id,
            "prompt": "\n\n".join(message.content for message in prompt.messages),
            "tokens": experiment.tokenizer.running_texts(rollout.tokens_BxT[row, :length].tolist()),
            "entropy": np.asarray(rollout.entropy_BxT)[row, :length].astype(np.float64).round(4).tolist(),
            "logprob": rollout.logprob_BxT[row, :length].astype(np.float64).round(4).tolist(),
            "is_finished": bool(rollout.is_finished_B[row]),
        }
        if prompt.answer:
            line["answer"] = prompt.answer
        if seen.evidence.reward_B is not None:
            line["reward"] = float(seen.evidence.reward_B[row])
        lines.append(line)
    return lines
