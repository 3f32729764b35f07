"""The student's side of a step, as the loop calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.data.prompts import PromptStream
from omniopd_jax.rollout import columns
from omniopd_jax.train import sharding
from omniopd_jax.train.score import make_student


@pytest.fixture(scope="module")
def respond(make_config, model, tokenizer, prompts):
    def run(**overrides):
        config = make_config(**{"rollout.max_new_tokens": 24} | overrides)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        student = make_student(
            config,
            mesh,
            stop_tokens=tokenizer.stop_tokens,
            banned_tokens=tokenizer.banned_tokens(model.config.vocab_size),
        )
        stream = PromptStream(prompts, tokenizer, batch_size=8, max_prompt_tokens=64, seed=0)
        batch = stream.batch_for_step(0)
        return student.respond(model, batch.tokens_BxP, batch.mask_BxP, batch.sample_index_B, jnp.asarray(0, jnp.int32))

    return run


def test_responses_longer_than_the_first_segment_are_the_same_responses(respond, monkeypatch):
    whole = respond()
    monkeypatch.setattr(columns, "FIRST_SEGMENT", 4)
    np.testing.assert_array_equal(respond().tokens_BxT, whole.tokens_BxT)
    assert int(whole.mask_BxT.sum(axis=1).max()) > 4


def test_slots_change_when_a_response_is_written_and_not_what(respond):
    whole, refilled = respond(), respond(**{"rollout.slots": 3})
    np.testing.assert_array_equal(refilled.tokens_BxT, whole.tokens_BxT)
    np.testing.assert_array_equal(refilled.mask_BxT, whole.mask_BxT)
