"""The draw: proportional, truncated as asked, safe at the edges of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from omniopd_jax.rollout import sampling
from omniopd_jax.rollout.sampling import SamplingRule

_draw = jax.jit(sampling.draw, static_argnums=2)


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def _reference(logits, rule):
    """The distribution that the rule asks for, by sorting, in float64."""
    logits = np.asarray(logits, np.float64).copy()
    logits[list(rule.banned_tokens)] = -np.inf
    probability = _softmax(logits / rule.temperature)
    order = np.argsort(-probability, kind="stable")
    keep = np.ones(len(logits), bool)
    if rule.top_k:
        keep[order[rule.top_k :]] = False
    if rule.top_p < 1:
        mass = np.cumsum(np.where(keep, probability, 0)[order]) / probability[keep].sum()
        count = int(np.searchsorted(mass, rule.top_p)) + 1  # the token that reaches top_p is the last one kept
        keep[order[count:]] = False
    if rule.min_p:
        keep &= probability >= rule.min_p * probability.max()
    probability = np.where(keep, probability, 0)
    return probability / probability.sum()


def _even_grid(count):
    return (np.arange(count, dtype=np.float64) / count).astype(np.float32)


@pytest.fixture(scope="module")
def logits_V():
    return np.random.default_rng(0).normal(0, 2.5, 97).astype(np.float32)  # no multiple of any block


RULES = [
    SamplingRule(),
    SamplingRule(temperature=0.6, banned_tokens=(3, 50)),
    SamplingRule(top_k=5),
    SamplingRule(top_p=0.8),
    SamplingRule(min_p=0.1),
    SamplingRule(temperature=1.7, top_k=30, top_p=0.9, min_p=0.05, banned_tokens=(0, 96)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_choice_obeys_the_rule_and_the_figures_are_the_models_own(logits_V, rule):
    # An even grid of uniforms, the draw's only randomness: the counts are right to one or two a token, without noise.
    count = 20_000
    drawn = _draw(jnp.asarray(logits_V)[None], jnp.asarray(_even_grid(count))[None], rule)
    token = np.asarray(drawn.token_AxQ[0])
    frequency = np.bincount(token, minlength=97)
    expected = _reference(logits_V, rule) * count
    np.testing.assert_allclose(frequency, expected, atol=2.0)
    np.testing.assert_array_equal(frequency[expected == 0], 0)

    probability = _softmax(logits_V)  # temperature 1, nothing banned or cut off
    np.testing.assert_allclose(drawn.logprob_AxQ[0], np.log(probability)[token], atol=2e-6)
    np.testing.assert_allclose(drawn.entropy_A[0], -(probability * np.log(probability)).sum(), rtol=1e-6)


def test_sampled_counts_pass_chi_square(logits_V):
    count = 50_000
    keys = jax.random.split(jax.random.key(1), count)
    uniform = jax.jit(sampling.uniforms)(keys, np.arange(count))
    token = _draw(jnp.asarray(logits_V)[None], uniform[None], SamplingRule()).token_AxQ[0]
    frequency = np.bincount(np.asarray(token), minlength=97)
    expected = _softmax(logits_V) * count
    rare = expected < 5  # chi-square wants expected counts of 5 or more: the rare ones go into one bin
    frequency = np.append(frequency[~rare], frequency[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(frequency, expected).pvalue > 1e-3


def test_greedy_takes_the_likeliest_that_is_allowed():
    logits = np.asarray([[0.0, 5.0, 3.0, 3.0], [1.0, 0.0, 1.0, 1.0]], np.float32)
    rule = SamplingRule(temperature=0.0, banned_tokens=(1,))
    np.testing.assert_array_equal(_draw(logits, jnp.full((2, 1), 0.9), rule).token_AxQ[:, 0], [2, 0])


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 31, 64, 1000])
def test_no_uniform_reaches_a_token_without_weight(vocab_size):
    # Weights over 60 orders of magnitude, most of them 0: rounding disagrees everywhere.
    generator = np.random.default_rng(vocab_size)
    weight = 10.0 ** generator.uniform(-38, 0, (64, vocab_size)) * (generator.random((64, vocab_size)) < 0.2)
    weight[np.arange(64), generator.integers(0, vocab_size, 64)] = 1.0
    uniform = np.concatenate([[0.0, 1e-45, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24], generator.random(200)])
    uniform = np.tile(uniform.astype(np.float32), (64, 1))
    token = np.asarray(jax.jit(sampling.inverse_cdf)(jnp.asarray(weight, jnp.float32), jnp.asarray(uniform)))
    assert token.min() >= 0
    assert token.max() < vocab_size
    assert (np.take_along_axis(weight.astype(np.float32), token, axis=1) > 0).all()


def test_minus_infinity_is_never_drawn_and_gives_no_nan():
    logits = np.full((1, 40), -np.inf, np.float32)
    logits[0, [7, 21]] = [0.0, np.log(3.0)]
    drawn = _draw(jnp.asarray(logits), jnp.asarray(_even_grid(400))[None], SamplingRule())
    frequency = np.bincount(np.asarray(drawn.token_AxQ[0]), minlength=40)
    np.testing.assert_array_equal(frequency[[7, 21]], [100, 300])
    np.testing.assert_allclose(drawn.entropy_A, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), rtol=1e-6)


def test_a_likely_banned_token_leaves_the_others_in_proportion():
    logits = np.asarray([[500.0, 0.0, np.log(3.0)]], np.float32)
    rule = SamplingRule(banned_tokens=(0,))
    drawn = _draw(jnp.asarray(logits), jnp.asarray(_even_grid(400))[None], rule)
    np.testing.assert_array_equal(np.bincount(np.asarray(drawn.token_AxQ[0]), minlength=3), [0, 100, 300])


def test_logits_that_are_no_numbers_show_and_stay_inside_the_vocabulary():
    drawn = _draw(jnp.full((1, 40), jnp.nan), jnp.full((1, 3), 0.5), SamplingRule())
    assert ((drawn.token_AxQ >= 0) & (drawn.token_AxQ < 40)).all()
    assert jnp.isnan(drawn.logprob_AxQ).all()


def test_blocks_of_rows_and_the_softcap_change_nothing_but_memory_and_logits():
    generator = np.random.default_rng(4)
    hidden, unembed = generator.normal(size=(7, 8)), generator.normal(size=(8, 50))
    uniform = generator.random((7, 3)).astype(np.float32)
    hidden, unembed = hidden.astype(np.float32), 4 * unembed.astype(np.float32)
    capped = 5.0 * np.tanh((hidden @ unembed) / 5.0)
    expected = _draw(capped, uniform, SamplingRule())
    assert expected.entropy_A.mean() > 1.1 * _draw(hidden @ unembed, uniform, SamplingRule()).entropy_A.mean()
    for block_logits in (2**26, 3 * 50):  # one block; 7 rows as 3 + 3 + 1
        blocked = jax.jit(
            functools.partial(
                sampling.draw_from_hidden, rule=SamplingRule(), logit_softcap=5.0, block_logits=block_logits
            )
        )
        drawn = blocked(hidden, uniform, head=unembed)
        np.testing.assert_array_equal(drawn.token_AxQ, expected.token_AxQ)
        np.testing.assert_allclose(drawn.logprob_AxQ, expected.logprob_AxQ, atol=1e-5)
        np.testing.assert_allclose(drawn.entropy_A, expected.entropy_A, atol=1e-5)


def test_a_draw_depends_on_its_own_key_and_step_alone():
    keys = jax.random.split(jax.random.key(3), 5)
    steps = jnp.asarray([0, 7, 7, 2, 100])
    uniforms = jax.jit(sampling.uniforms)
    together = uniforms(keys, steps)
    np.testing.assert_array_equal(together[::-1], uniforms(keys[::-1], steps[::-1]))
    np.testing.assert_array_equal(together[2:3], uniforms(keys[2:3], steps[2:3]))
    assert len(set(np.asarray(together).tolist())) == 5


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (SamplingRule(temperature=-1.0), "temperature"),
        (SamplingRule(top_k=-1), "top_k"),
        (SamplingRule(top_p=0.0), "top_p"),
        (SamplingRule(min_p=1.5), "min_p"),
        (SamplingRule(stop_tokens=(50,)), "stop_tokens holds 50"),
        (SamplingRule(stop_tokens=(1,), banned_tokens=(1, 2)), "could ever end"),
        (SamplingRule(banned_tokens=tuple(range(50))), "every token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_rules_are_refused_in_one_sentence(rule, words):
    with pytest.raises(ValueError, match=words):
        rule.check(50)
