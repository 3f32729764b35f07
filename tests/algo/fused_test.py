"""The fused loss: the same numbers and gradients as dense logits give, whatever the loss of a token is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo.fused import fused_terms

B, T, D, V = 2, 13, 8, 37


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 7)
    weight = jax.random.normal(keys[5], (B, T))
    return dict(
        hidden=jax.random.normal(keys[0], (B, T, D)),
        unembed=jax.random.normal(keys[1], (D, V)),
        ref_hidden=jax.random.normal(keys[2], (B, T, D)),
        ref_unembed=jax.random.normal(keys[3], (D, V)),
        targets=jax.random.randint(keys[4], (B, T), 0, V),
        weight=weight.at[0, 3:6].set(0.0).at[1, -1].set(0.0),
        anchor=jax.random.uniform(keys[6], (B, T)).at[1].set(0.0),
    )


def _linear(logprob, kl, fields):
    return -jnp.sum(fields["weight"] * logprob) + jnp.sum(fields["anchor"] * kl)


def _curved(logprob, kl, fields):
    """A clipped ratio and a squared KL: slopes that depend on the terms themselves."""
    ratio = jnp.exp(logprob + 3.0)
    surrogate = jnp.minimum(ratio * fields["weight"], jnp.clip(ratio, 0.8, 1.2) * fields["weight"])
    return -jnp.sum(surrogate) + jnp.sum(fields["anchor"] * kl**2)


def _dense(loss, arrays, hidden, unembed, softcap=None, *, has_reference=True):
    def logprobs(hidden, unembed):
        logits = hidden @ unembed
        return jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))

    student = logprobs(hidden, unembed)
    logprob = jnp.take_along_axis(student, arrays["targets"][..., None], -1)[..., 0]
    kl = jnp.zeros_like(logprob)
    if has_reference:
        reference = logprobs(arrays["ref_hidden"], arrays["ref_unembed"])
        kl = jnp.sum(jnp.exp(reference) * (reference - student), axis=-1)
    return loss(logprob, kl, arrays), (logprob, kl)


def _fused(loss, arrays, hidden, unembed, softcap=None, *, has_reference=True, block_tokens=5):
    fields = {"weight": arrays["weight"], "anchor": arrays["anchor"]}
    reference = (arrays["ref_hidden"], arrays["ref_unembed"]) if has_reference else None
    carrier, logprob, kl = fused_terms(
        loss, hidden, unembed, arrays["targets"], fields, reference, block_tokens=block_tokens, logit_softcap=softcap
    )
    return loss(logprob, kl, fields) + carrier, (logprob, kl)


@pytest.mark.parametrize(
    ("loss", "softcap", "has_reference"), [(_linear, None, True), (_curved, 4.0, True), (_curved, None, False)]
)
def test_terms_and_gradients_are_those_of_dense_logits(arrays, loss, softcap, has_reference):
    def run(function, scale):
        def scaled(hidden, unembed):
            value, terms = function(loss, arrays, hidden, unembed, softcap, has_reference=has_reference)
            return scale * value, terms

        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(arrays["hidden"], arrays["unembed"])

    (value, terms), gradients = run(_fused, 3.0)
    (expected, dense_terms), dense_gradients = run(_dense, 3.0)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for ours, theirs in zip((*terms, *gradients), (*dense_terms, *dense_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(np.abs(theirs).max() or 1.0))
    silent = (np.asarray(arrays["weight"]) == 0) & ((np.asarray(arrays["anchor"]) == 0) | (not has_reference))
    assert silent.sum() >= 1
    np.testing.assert_array_equal(np.asarray(gradients[0])[silent], 0)


def test_a_token_banned_on_both_sides_passes_no_gradient(arrays):
    unembed = arrays["unembed"].at[:, 4].set(-jnp.inf)
    with_ban = arrays | {
        "ref_unembed": arrays["ref_unembed"].at[:, 4].set(-jnp.inf),
        "hidden": jnp.abs(arrays["hidden"]),
    }
    with_ban |= {
        "ref_hidden": jnp.abs(arrays["ref_hidden"]),
        "targets": jnp.where(arrays["targets"] == 4, 5, arrays["targets"]),
    }
    gradients = jax.grad(lambda h, u: _fused(_linear, with_ban, h, u)[0], argnums=(0, 1))(with_ban["hidden"], unembed)
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    np.testing.assert_array_equal(np.asarray(gradients[1])[:, 4], 0)


def test_without_a_gradient_the_terms_are_the_same(arrays):
    carrier, *terms = fused_terms(
        _linear,
        arrays["hidden"],
        arrays["unembed"],
        arrays["targets"],
        {"weight": arrays["weight"], "anchor": arrays["anchor"]},
        (arrays["ref_hidden"], arrays["ref_unembed"]),
        block_tokens=7,
    )
    assert carrier == 0
    _, dense_terms = _dense(_linear, arrays, arrays["hidden"], arrays["unembed"])
    for ours, theirs in zip(terms, dense_terms, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_shapes_that_do_not_belong_together_are_refused(arrays):
    with pytest.raises(ValueError, match="one vocabulary"):
        fused_terms(
            _linear,
            arrays["hidden"],
            arrays["unembed"],
            arrays["targets"],
            {},
            (arrays["ref_hidden"], arrays["ref_unembed"][:, :-1]),
        )
