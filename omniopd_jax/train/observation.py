"""What one batch comes to before anything is trained, and what is written about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from omniopd_jax.train import batching
from omniopd_jax.train.audit import audit
from omniopd_jax.train.credit import Credit, give_credit, mean_where
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts, check_finite
from omniopd_jax.types import Anchors, PromptBatch, Rollout, TokenTree

if TYPE_CHECKING:
    from omniopd_jax.train.loop import Clock


class Observation(NamedTuple):
    """What one batch of responses and the teacher's texts come to, before anything is trained. Host arrays."""

    batch: PromptBatch
    rollout: Rollout
    anchors: Anchors
    credit: Credit
    audits: list[dict[str, Any]]  # one record a chunk that the teacher was asked about
    asked: dict[str, float]  # metrics of the audit


def observe(experiment: Experiment, index: int, clock: Clock, interrupts: Interrupts) -> Observation:
    """Prompts → responses → chunks → teacher → weights, of optimizer step `index` (from 0)."""
    config, student, model = experiment.config, experiment.student, experiment.model
    batch = experiment.stream.batch_for_step(index)
    step = index + 1

    with clock.phase("sample"):
        prompts = (batch.tokens_BxP, batch.mask_BxP, batch.sample_index_B)
        tokens_BxP, mask_BxP, index_B = batching.to_devices(prompts, experiment.mesh)
        at = jnp.asarray(index, jnp.int32)
        rollout_on_devices = student.respond(model, tokens_BxP, mask_BxP, index_B, at)
        anchors_on_devices = student.choose(rollout_on_devices, index_B, at)
        rollout, anchors = batching.to_host((rollout_on_devices, anchors_on_devices))
    check_finite(step, {"rollout/entropy": rollout.entropy_BxT, "rollout/logprob": rollout.logprob_BxT})

    branches = None
    if config.objective.arm == "branch":
        with clock.phase("score"):
            branches = batching.to_host(student.branch(model, rollout_on_devices, anchors_on_devices, index_B, at))
        check_finite(step, {"branch/logprob": branches.logprob_BxMxGxC})

    with clock.phase("audit"):
        verdicts, audits, asked = audit(experiment, batch, rollout, anchors, branches, step=step, interrupts=interrupts)
        credit = give_credit(config, rollout, anchors, verdicts, branches, _groups(batch))
    return Observation(batch, rollout, anchors, credit, _complete(audits, credit), asked)


def _groups(batch: PromptBatch) -> np.ndarray:
    """int32 [B], equal for responses of one prompt."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(prompt.id, row) for row, prompt in enumerate(batch.prompts)], np.int32)


def step_metrics(
    experiment: Experiment, index: int, seen: Observation, packed: TokenTree, updated: Mapping[str, float]
) -> dict[str, float]:
    rollout, anchors, credit = seen.rollout, seen.anchors, seen.credit
    mask_BxT, chunk_tokens = rollout.mask_BxT, experiment.config.audit.chunk_tokens
    tokens = max(int(mask_BxT.sum()), 1)
    length_B = mask_BxT.sum(axis=1)
    is_audited_BxM, spent = credit.is_audited_BxM, experiment.spent
    start_entropy_BxM = np.take_along_axis(np.asarray(rollout.entropy_BxT), anchors.start_BxM, axis=1)
    metrics = dict(updated)
    kl_sum, anchored = metrics.pop("anchor/kl_sum"), metrics.pop("anchor/tokens")
    if anchored:
        metrics["anchor/kl"] = kl_sum / anchored
    metrics |= {
        "anchor/fraction": anchored / tokens,
        "rollout/tokens": float(length_B.mean()),
        "rollout/finished": float(rollout.is_finished_B.mean()),
        "rollout/empty": float((length_B <= rollout.is_finished_B).sum()),
        "rollout/entropy": mean_where(np.asarray(rollout.entropy_BxT), mask_BxT),
        "rollout/logprob": mean_where(rollout.logprob_BxT, mask_BxT),
        "rollout/epoch": float(experiment.stream.epoch(index)),
        "audit/fraction": float(is_audited_BxM.sum() * chunk_tokens / tokens),
        "audit/audited": mean_where(is_audited_BxM.astype(np.float32), anchors.is_valid_BxM),
        "audit/entropy": mean_where(start_entropy_BxM, is_audited_BxM),
        "audit/prior": mean_where(credit.prior_BxM, is_audited_BxM),
        "audit/advantage": mean_where(np.abs(credit.advantage), is_audited_BxM),
        "teacher/total_tokens": float(spent.completion_tokens),
        "teacher/total_prompt_tokens": float(spent.prompt_tokens),
        "teacher/total_calls": float(spent.calls),
        "teacher/total_dollars": spent.dollars,
    }
    if credit.target_BxM is not None:
        metrics["audit/target"] = mean_where(credit.target_BxM, is_audited_BxM)
    else:
        kept = int((packed.branch_weight_BxRxC != 0).any(axis=2).sum())
        metrics["branch/kept"] = kept / len(mask_BxT)
        metrics["branch/packed"] = kept / max(packed.branch_start_BxR.size, 1)
    return metrics


def _complete(audits: list[dict[str, Any]], credit: Credit) -> list[dict[str, Any]]:
    """The audit records with what the arm decided."""
    for record in audits:
        place = (record["response"], record["slot"])
        record["prior"] = round(float(credit.prior_BxM[place]), 4)
        if credit.target_BxM is not None:
            record["target"] = round(float(credit.target_BxM[place]), 4)
            record["weight"] = round(float(credit.advantage[place]), 4)
        else:
            for branch, weight in zip(record["branches"], credit.advantage[place], strict=True):
                branch["weight"] = round(float(weight), 4)
    return audits


def rollout_lines(experiment: Experiment, step: int, batch: PromptBatch, rollout: Rollout) -> list[dict[str, Any]]:
    lines = []
    for row, prompt in enumerate(batch.prompts):
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
        lines.append(line)
    return lines
