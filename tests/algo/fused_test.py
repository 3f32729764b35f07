"""The fused loss: the terms and gradients of the dense definitions, whatever the loss of a token is, and an anchor that
is exactly nothing at the base model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo.fused import fused_terms
from tests.algo.numeric import numeric_gradient

B, T, D, V = 2, 7, 4, 11
WEIGHT = np.cos(np.arange(B * T)).reshape(B, T)
ANCHOR = 0.5 + np.sin(np.arange(B * T)).reshape(B, T) ** 2


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)
    weight, anchor = WEIGHT.astype(np.float32), ANCHOR.astype(np.float32)
    weight[0, 3:6] = weight[1, -1] = anchor[1] = 0
    return dict(
        hidden=rng.normal(size=(B, T, D)).astype(np.float32),
        unembed=(1.5 * rng.normal(size=(D, V))).astype(np.float32),
        ref_hidden=rng.normal(size=(B, T, D)).astype(np.float32),
        ref_unembed=(1.5 * rng.normal(size=(D, V))).astype(np.float32),
        targets=rng.integers(0, V, (B, T)),
        fields={"weight": weight, "anchor": anchor},
    )


def linear(logprob, kl, fields, xp=jnp):
    return -xp.sum(fields["weight"] * logprob) + xp.sum(fields["anchor"] * kl)


def curved(logprob, kl, fields, xp=jnp):
    """A clipped ratio and a squared KL: slopes that depend on the terms themselves."""
    ratio = xp.exp(logprob + 3.0)
    surrogate = xp.minimum(ratio * fields["weight"], xp.clip(ratio, 0.8, 1.2) * fields["weight"])
    return -xp.sum(surrogate) + xp.sum(fields["anchor"] * kl**2)


def anchor_alone(logprob, kl, fields, xp=jnp):
    del logprob
    return xp.sum(fields["anchor"] * kl)


def logprobs(hidden, unembed, softcap):
    with np.errstate(all="ignore"):
        logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def dense_terms(arrays, softcap=None, *, has_reference=True):
    """(logprob, kl), float64, written out."""
    student = logprobs(arrays["hidden"], arrays["unembed"], softcap)
    logprob = np.take_along_axis(student, arrays["targets"][..., None], -1)[..., 0]
    if not has_reference:
        return logprob, np.zeros_like(logprob)
    reference = logprobs(arrays["ref_hidden"], arrays["ref_unembed"], softcap)
    with np.errstate(all="ignore"):
        return logprob, np.where(np.exp(reference) > 0, np.exp(reference) * (reference - student), 0.0).sum(-1)


def terms_of(loss, arrays, softcap=None, *, has_reference=True, block_tokens=5):
    """(carrier, logprob, kl)."""
    reference = (arrays["ref_hidden"], arrays["ref_unembed"]) if has_reference else None
    student = (arrays["hidden"], arrays["unembed"], arrays["targets"], arrays["fields"])
    return fused_terms(loss, *student, reference, block_tokens=block_tokens, logit_softcap=softcap)


def value_and_slopes(loss, arrays, names=("hidden", "unembed"), wrap=jax.jit, **options):
    """((loss, (logprob, kl)), its gradient in each named array)."""

    def value(*moved):
        given = arrays | dict(zip(names, moved, strict=True))
        carrier, logprob, kl = terms_of(loss, given, **options)
        return loss(logprob, kl, arrays["fields"]) + carrier, (logprob, kl)

    places = tuple(range(len(names)))
    return wrap(jax.value_and_grad(value, argnums=places, has_aux=True))(*(arrays[name] for name in names))


@pytest.mark.parametrize(("block_tokens", "softcap"), [(1, None), (5, 2.0), (5, None), (512, None)])
def test_any_block_gives_the_dense_values(arrays, block_tokens, softcap):
    carrier, *terms = terms_of(linear, arrays, softcap, block_tokens=block_tokens)
    assert carrier == 0
    for ours, dense in zip(terms, dense_terms(arrays, softcap), strict=True):
        assert ours.shape == (B, T)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "softcap", "has_reference"),
    [(linear, None, True), (linear, 2.0, True), (curved, 2.0, True), (curved, None, False)],
)
def test_gradients_are_those_of_the_dense_definition(arrays, loss, softcap, has_reference):
    (value, terms), slopes = value_and_slopes(loss, arrays, softcap=softcap, has_reference=has_reference)

    def dense(**moved):
        return loss(*dense_terms(arrays | moved, softcap, has_reference=has_reference), arrays["fields"], np)

    np.testing.assert_allclose(value, dense(), rtol=1e-5)
    for ours, expected in zip(terms, dense_terms(arrays, softcap, has_reference=has_reference), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    for name, slope in zip(("hidden", "unembed"), slopes, strict=True):
        expected = numeric_gradient(lambda point, name=name: dense(**{name: point}), arrays[name])
        np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(expected).max()))
    silent = (arrays["fields"]["weight"] == 0) & ((arrays["fields"]["anchor"] == 0) | (not has_reference))
    assert silent.any()
    np.testing.assert_array_equal(np.asarray(slopes[0])[silent], 0)


def test_the_gradient_is_scaled_with_the_loss(arrays):
    def tripled(hidden):
        carrier, logprob, kl = terms_of(linear, arrays | {"hidden": hidden})
        return 3 * (linear(logprob, kl, arrays["fields"]) + carrier)

    once = value_and_slopes(linear, arrays, ("hidden",))[1][0]
    np.testing.assert_allclose(jax.jit(jax.grad(tripled))(arrays["hidden"]), 3 * once, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_at_equal_parameters_the_anchor_is_exactly_nothing(arrays, wrap):
    equal = arrays | {"ref_hidden": arrays["hidden"], "ref_unembed": arrays["unembed"]}
    (value, (_, kl)), slopes = value_and_slopes(anchor_alone, equal, wrap=wrap, block_tokens=3)
    assert value == 0
    np.testing.assert_array_equal(kl, 0.0)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0.0), slopes)


def test_no_gradient_reaches_the_reference(arrays):
    _, slopes = value_and_slopes(linear, arrays, ("ref_hidden", "ref_unembed"))
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0.0), slopes)


BANNED = 5


def ban(arrays, side):
    """The side ("" the student, "ref_" the reference) gives one token a logit with which it has no chance."""
    hidden, unembed = np.copy(arrays[f"{side}hidden"]), np.copy(arrays[f"{side}unembed"])
    hidden[..., 0] = 1.0
    unembed[:, BANNED] = 0.0
    unembed[0, BANNED] = -1e30
    return arrays | {
        f"{side}hidden": hidden,
        f"{side}unembed": unembed,
        "targets": np.where(arrays["targets"] == BANNED, 0, arrays["targets"]),
    }


def test_a_token_banned_on_both_sides_contributes_nothing(arrays):
    banned = ban(ban(arrays, ""), "ref_")
    without = banned | {name: np.delete(banned[name], BANNED, 1) for name in ("unembed", "ref_unembed")}
    without["targets"] = banned["targets"] - (banned["targets"] > BANNED)
    (value, terms), (d_hidden, d_unembed) = value_and_slopes(linear, banned)
    (expected, _), expected_slopes = value_and_slopes(linear, without)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, dense in zip(terms, dense_terms(without), strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_hidden, expected_slopes[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.delete(d_unembed, BANNED, 1), expected_slopes[1], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(d_unembed)[:, BANNED], 0.0)


def test_a_token_that_only_one_side_bans(arrays):
    (_, (_, kl)), slopes = value_and_slopes(anchor_alone, ban(arrays, ""))
    assert np.all(np.asarray(kl) > 1e15)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    banned = ban(arrays, "ref_")
    np.testing.assert_allclose(terms_of(linear, banned)[2], dense_terms(banned)[1], rtol=1e-5)


def test_vocabularies_of_two_sizes_are_refused(arrays):
    with pytest.raises(ValueError, match=f"share one vocabulary, got {V - 1} and {V}"):
        terms_of(linear, arrays | {"ref_unembed": arrays["ref_unembed"][:, :-1]})
