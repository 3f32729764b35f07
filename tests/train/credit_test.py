"""When the weights of a response are certain."""

import dataclasses

import jax
import numpy as np
import pytest

from omniopd_jax.data.prompts import Prompt
from omniopd_jax.train.audit import filled_up
from omniopd_jax.train.credit import Evidence, give_credit, is_by_row
from omniopd_jax.types import Anchors, Branches, Message, PromptBatch, Rollout, Verdicts

B, P, T, M, N, G, C = 6, 3, 12, 2, 3, 3, 4
BRANCH = {"objective.arm": "branch", "objective.num_branches": G, "objective.repulsion": 0.25}
BY_ROW = {
    "verify": {},
    "verify, summed by response": {"objective.normalise": "sequence"},
    "verify, baseline of its own": {"objective.baseline": "teacher_agreement"},
    "branch": BRANCH,
    "imitate": {"objective.arm": "imitate", "objective.confidence_power": 0.5},
    "mixture": {"objective.arm": "mixture", "objective.weights.branch": 1.0, "objective.weights.imitate": 0.5}
    | {"objective.num_branches": G},
}
ACROSS = {
    "verify, baseline of others": {"objective.baseline": "leave_one_out"},
    "constant": {"audit.control": "constant"},
    "shuffled": BRANCH | {"audit.control": "shuffled"},
}


def evidence_of(make_config, overrides):
    config = make_config(
        **{"audit.num_chunks": M, "audit.chunk_tokens": C, "audit.num_continuations": N, "rollout.batch_size": B}
        | overrides
    )
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return rng.uniform(0, 1, shape).astype(np.float32)

    def tokens(*shape):
        return rng.integers(3, 20, shape).astype(np.int32)

    length_B = rng.integers(2 * C, T + 1, B)
    mask_BxT = np.arange(T) < length_B[:, None]
    batch = PromptBatch(
        prompts=tuple(Prompt(str(row // 2), (Message("user", "1 + 1"),)) for row in range(B)),
        tokens_BxP=tokens(B, P),
        mask_BxP=np.ones((B, P), bool),
        sample_index_B=np.arange(B, dtype=np.int32),
    )
    rollout = Rollout(
        prompt_tokens_BxP=batch.tokens_BxP,
        prompt_mask_BxP=batch.mask_BxP,
        tokens_BxT=tokens(B, T),
        mask_BxT=mask_BxT,
        logprob_BxT=-numbers(B, T),
        entropy_BxT=numbers(B, T),
        is_finished_B=np.ones(B, bool),
    )
    verdicts = Verdicts(
        score_BxMxN=numbers(B, M, N),
        is_received_BxMxN=np.ones((B, M, N), bool),
        agreement_BxM=numbers(B, M),
        branch_score_BxMxG=numbers(B, M, G),
        branch_overlap_BxMxG=numbers(B, M, G),
        text_BxMxNxC=tokens(B, M, N, C),
        text_mask_BxMxNxC=np.ones((B, M, N, C), bool),
        cut_BxM=np.tile(np.array([0, C], np.int32), (B, 1)),
    )
    whole = Evidence(
        batch=batch,
        rollout=rollout,
        anchors=Anchors(np.tile(np.array([0, C], np.int32), (B, 1)), np.ones((B, M), bool)),
        branches=Branches(
            tokens_BxMxGxC=tokens(B, M, G, C),
            mask_BxMxGxC=np.ones((B, M, G, C), bool),
            logprob_BxMxGxC=-numbers(B, M, G, C),
        ),
        verdicts=verdicts,
    )
    half = {name: value[: B // 2] for name, value in vars(verdicts).items()}
    return config, whole, whole._replace(verdicts=filled_up(dataclasses.replace(verdicts, **half), B))


def first_half(config, evidence):
    return jax.tree.map(lambda array: array[: B // 2], give_credit(config, evidence, 1).tree)


@pytest.mark.parametrize("name", BY_ROW)
def test_weights_are_certain_once_a_response_has_its_own_verdicts(make_config, name):
    config, whole, half = evidence_of(make_config, BY_ROW[name])
    assert is_by_row(config)
    found = first_half(config, half)
    jax.tree.map(np.testing.assert_array_equal, found, first_half(config, whole))
    assert any(np.abs(weight).max() > 0 for weight in (found.weight_BxT, found.branch_weight_BxRxC) if weight.size)


@pytest.mark.parametrize("name", ACROSS)
def test_weights_that_hang_on_other_responses_wait_for_all(make_config, name):
    config, whole, half = evidence_of(make_config, ACROSS[name])
    assert not is_by_row(config)
    trees = first_half(config, half), first_half(config, whole)
    assert not all(map(np.array_equal, *map(jax.tree.leaves, trees)))


@pytest.mark.parametrize("weights", [{"sft": 0.5}, {"grpo": 0.5}])
def test_answers_and_rewards_are_gathered_for_the_whole_batch(make_config, weights):
    mixture = {f"objective.weights.{name}": weight for name, weight in ({"verify": 1.0} | weights).items()}
    assert not is_by_row(make_config(**{"objective.arm": "mixture", "rollout.samples_per_prompt": 2} | mixture))
