"""AdamW against its equations in numpy, and the schedules at their corners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniopd_jax.train.optimizer import decays, learning_rate_schedule, make_optimizer


@pytest.fixture
def settings(make_config):
    return dataclasses.replace(
        make_config().optimizer, learning_rate=0.1, warmup_steps=4, clip_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.99
    )


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("constant", 0.1, 0.1), ("cosine", 0.05, 0.0), ("linear", 0.05, 0.0)]
)
def test_schedules(settings, schedule, half, end):
    rate = learning_rate_schedule(dataclasses.replace(settings, schedule=schedule), 14)
    np.testing.assert_allclose([rate(0), rate(1), rate(4)], [0.02, 0.04, 0.1], rtol=1e-6)
    np.testing.assert_allclose([rate(9), rate(14)], [half, end], atol=1e-8)
    assert learning_rate_schedule(dataclasses.replace(settings, warmup_steps=0), 5)(0) == np.float32(0.1)


def test_adamw_follows_its_equations(settings):
    settings = dataclasses.replace(settings, weight_decay=0.3)
    optimizer = make_optimizer(settings, 10)
    params = {"layer": {"kernel": jnp.array([1.0, -2.0])}, "final_norm": {"scale": jnp.array([1.0])}}
    grads = [
        {"layer": {"kernel": jnp.array([3.0, 4.0]) * k}, "final_norm": {"scale": jnp.array([0.0])}} for k in (1, 0.1)
    ]
    state = optimizer.init(params)
    x, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grad["layer"]["kernel"], np.float64)
        g = g / max(1.0, np.sqrt((g**2).sum()))  # clipped to norm 1
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        rate = 0.02 * t
        x = x - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + settings.eps) + 0.3 * x)
    np.testing.assert_allclose(params["layer"]["kernel"], x, rtol=1e-5)
    np.testing.assert_array_equal(params["final_norm"]["scale"], [1.0])  # norms do not decay


def test_no_clipping_and_a_small_first_moment(settings):
    optimizer = make_optimizer(dataclasses.replace(settings, clip_norm=0.0, state_dtype="bfloat16", b1=0.0), 10)
    params = {"kernel": jnp.ones(2)}
    state = optimizer.init(params)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == {"bfloat16", "float32"}


def test_norms_and_biases_of_a_decoder_do_not_decay(model):
    chosen = jax.tree_util.tree_leaves_with_path(decays(model.params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in chosen}
    assert names["embedding"]
    assert names["layers/attention/q_proj/kernel"]
    assert not names["final_norm/scale"]
    assert not names["layers/attention/q_norm/scale"]
