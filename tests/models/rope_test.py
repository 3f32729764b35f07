"""Rotary embeddings: the law of relative positions, and every kind against transformers' own functions."""

import numpy as np
import pytest

from omniopd_jax.models.rope import Rope, inverse_frequencies, rotate, rotation, yarn_attention_factor


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(query_position, key_position):
        tables = [rotation(Rope(theta=50.0), 8, np.array([[p]])) for p in (query_position, key_position)]
        return float(np.sum(np.asarray(rotate(q, *tables[0])) * np.asarray(rotate(k, *tables[1]))))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_a_layer_without_rope_leaves_vectors_alone():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    tables = rotation(Rope(kind="none"), 8, np.array([[0, 5, 90]]))
    np.testing.assert_array_equal(rotate(x, *tables), x)


@pytest.mark.parametrize(
    ("values", "rope"),
    [
        (dict(rope_type="linear", factor=4.0), Rope("linear", 1e4, 4.0)),
        (
            dict(
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            Rope("llama3", 5e5, 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), Rope("yarn", 1e6, 4.0, 32768)),
        (
            dict(
                rope_type="yarn",
                factor=16.0,
                original_max_position_embeddings=4096,
                beta_fast=20.0,
                beta_slow=2.0,
                truncate=False,
                mscale=0.7,
                mscale_all_dim=0.4,
            ),
            Rope("yarn", 1e4, 16.0, 4096, beta_fast=20.0, beta_slow=2.0, truncate=False),
        ),
    ],
)
def test_frequencies_equal_transformers(values, rope):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=128, rope_parameters=dict(values, rope_theta=rope.theta))
    frequency, attention_factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, "cpu")
    np.testing.assert_allclose(inverse_frequencies(rope, 128), frequency.numpy(), rtol=1e-5)
    if rope.kind == "yarn":
        ours = yarn_attention_factor(rope.factor, values.get("mscale", 0.0), values.get("mscale_all_dim", 0.0))
        assert ours == pytest.approx(attention_factor)
