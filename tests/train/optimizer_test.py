"""AdamW against its equations in numpy, and the schedules at their corners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniopd_jax.train import one_pass
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


def updated(optimizer, grads, state, params, **more):
    return jax.jit(
        lambda grads, state, params: optimizer.update(
            grads, state, params, **{"norm": optax.tree.norm(grads), "is_kept": True} | more
        )
    )(grads, state, params)


@pytest.mark.parametrize("is_one_pass", [False, True])
def test_adamw_follows_its_equations(settings, is_one_pass):
    settings = dataclasses.replace(settings, weight_decay=0.3)
    optimizer = make_optimizer(settings, 10)
    params = {"layer": {"kernel": jnp.array([1.0, -2.0])}, "final_norm": {"scale": jnp.array([1.0])}}
    grads = [
        {"layer": {"kernel": jnp.array([3.0, 4.0]) * k}, "final_norm": {"scale": jnp.array([0.0])}} for k in (1, 0.1)
    ]
    state = optimizer.init(params)
    x, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        params, state, norm = updated(optimizer, grad, state, params, is_one_pass=is_one_pass)
        g = np.asarray(grad["layer"]["kernel"], np.float64)
        g = g / max(1.0, np.sqrt((g**2).sum()))  # clipped to norm 1
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        rate = 0.02 * t
        change = rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + settings.eps) + 0.3 * x)
        x = x - change
        np.testing.assert_allclose(norm, np.sqrt((change**2).sum()), rtol=1e-5)
    np.testing.assert_allclose(params["layer"]["kernel"], x, rtol=1e-5)
    np.testing.assert_array_equal(params["final_norm"]["scale"], [1.0])  # norms do not decay


def test_no_clipping_and_a_small_first_moment(settings):
    optimizer = make_optimizer(dataclasses.replace(settings, clip_norm=0.0, state_dtype="bfloat16", b1=0.0), 10)
    params = {"kernel": jnp.ones(2)}
    state = optimizer.init(params)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == {"bfloat16", "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pass_in_blocks_is_the_update_at_once(settings, monkeypatch, dtype):
    """Leaves shorter and longer than a block and a multiple of it; moments of another dtype; counts count updates."""
    monkeypatch.setattr(one_pass, "_BLOCK", 8)
    optimizer = make_optimizer(dataclasses.replace(settings, weight_decay=0.3, state_dtype=dtype), 10)
    shapes = {"a": {"kernel": (3, 7)}, "b": {"bias": (5,), "kernel": (2, 2, 4)}, "norm": {"scale": (8,)}}
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda shape: draw(size=shape).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple)
    rtol = 1e-5 if dtype == "float32" else 1e-2
    ways = {is_one_pass: (params, optimizer.init(params)) for is_one_pass in (False, True)}
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), params)
        norms = []
        for is_one_pass, (params, state) in ways.items():
            *ways[is_one_pass], norm = updated(optimizer, grads, state, params, is_one_pass=is_one_pass)
            norms.append(norm)
        np.testing.assert_allclose(*norms, rtol=1e-5)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol), *ways.values())
    assert [int(leaf) for leaf in jax.tree.leaves(ways[True][1]) if leaf.ndim == 0] == [3, 3]


@pytest.mark.parametrize("gradient", [[1.0, np.nan, 2.0, np.inf], [1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("is_one_pass", [False, True])
def test_an_update_that_is_not_kept_changes_nothing(settings, is_one_pass, gradient):
    optimizer = make_optimizer(settings, 10)
    params = {"kernel": jnp.arange(4.0), "norm": jnp.ones(3)}
    grads = {"kernel": jnp.array(gradient), "norm": jnp.ones(3)}
    state = optimizer.init(params)
    after = updated(optimizer, grads, state, params, is_kept=False, is_one_pass=is_one_pass)
    jax.tree.map(np.testing.assert_array_equal, after[:2], (params, state))


def test_one_pass_holds_blocks_and_no_copy_of_a_parameter(settings):
    """Else each block would copy its whole leaf: thousands of passes instead of one."""
    optimizer = make_optimizer(settings, 10)
    params = {"kernel": jnp.ones((1024, 1024))}
    state = optimizer.init(params)

    def update(params, state, grads):
        return optimizer.update(grads, state, params, norm=optax.tree.norm(grads), is_kept=True, is_one_pass=True)

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["kernel"].nbytes / 2


def test_norms_and_biases_of_a_decoder_do_not_decay(model):
    chosen = jax.tree_util.tree_leaves_with_path(decays(model.params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in chosen}
    assert names["embedding"]
    assert names["layers/attention/q_proj/kernel"]
    assert not names["final_norm/scale"]
    assert not names["layers/attention/q_norm/scale"]
