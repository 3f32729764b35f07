"""White-box divergences: values and gradients are those of the dense definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo.divergences import teacher_divergence

B, T, D, E, V = 2, 5, 3, 4, 9
WEIGHT = np.cos(np.arange(B * T)).reshape(B, T)
SETTINGS = [
    dict(kind="reverse_kl"),
    dict(kind="forward_kl"),
    dict(kind="jensen_shannon", beta=0.5),
    dict(kind="jensen_shannon", beta=0.1),
    dict(kind="reverse_kl", top_k=3),
    dict(kind="forward_kl", top_k=3),
    dict(kind="jensen_shannon", beta=0.7, top_k=8),
    dict(kind="forward_kl", logit_softcap=2.0, teacher_logit_softcap=3.0),
]


def named(setting):
    return "-".join(map(str, setting.values()))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    shapes = (B, T, D), (D, V), (B, T, E), (E, V)
    return tuple((1.3 * rng.normal(size=shape)).astype(np.float32) for shape in shapes)


def gkd(p, q, kind, beta):
    """Equations 1 and 2 of arXiv 2306.13649 over the last axis, p the teacher, q the student."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def dense(inputs, kind, beta=0.5, top_k=0, teacher_logit_softcap=None, logit_softcap=None):
    """(values, gradients in the student's hidden states and unembedding) by torch, in float64."""
    torch = pytest.importorskip("torch")
    teacher_hidden, teacher_unembed, hidden, unembed = (torch.tensor(array, dtype=torch.float64) for array in inputs)
    hidden.requires_grad_()
    unembed.requires_grad_()

    def probabilities(hidden, unembed, cap):
        logits = hidden @ unembed
        return torch.softmax(logits if cap is None else cap * torch.tanh(logits / cap), dim=-1)

    p = probabilities(teacher_hidden, teacher_unembed, teacher_logit_softcap)
    q = probabilities(hidden, unembed, logit_softcap)
    if top_k:
        top = p.topk(top_k).indices
        p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    values = gkd(p, q, kind, beta)
    (torch.tensor(WEIGHT) * values).sum().backward()
    return values.detach().numpy(), hidden.grad.numpy(), unembed.grad.numpy()


@pytest.mark.parametrize("setting", SETTINGS, ids=named)
def test_values_and_gradients_are_those_of_the_dense_definition(inputs, setting):
    def loss(hidden, unembed):
        values = teacher_divergence(*inputs[:2], hidden, unembed, block_tokens=4, **setting)
        return jnp.sum(WEIGHT * values), values

    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*inputs[2:])
    expected, hidden_gradient, unembed_gradient = dense(inputs, **setting)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], hidden_gradient, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradients[1], unembed_gradient, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("setting", SETTINGS[:5], ids=named)
def test_a_student_that_is_the_teacher_is_at_no_distance(inputs, setting):
    hidden, unembed = inputs[2:]
    of = jax.jit(lambda h, w: teacher_divergence(hidden, unembed, h, w, block_tokens=16, **setting))
    values, pull = jax.vjp(of, hidden, unembed)
    np.testing.assert_allclose(values, 0, atol=3e-7)
    for gradient in pull(jnp.ones_like(values)):
        np.testing.assert_allclose(gradient, 0, atol=2e-6)


def test_no_gradient_reaches_the_teacher(inputs):
    gradients = jax.grad(lambda h, w: teacher_divergence(h, w, *inputs[2:], kind="reverse_kl").sum(), argnums=(0, 1))
    for gradient in gradients(*inputs[:2]):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("setting", SETTINGS[:5], ids=named)
def test_a_token_banned_on_both_sides_counts_for_nothing(inputs, setting):
    teacher_hidden, teacher_unembed, hidden, unembed = (np.abs(array) for array in inputs)

    def both(teacher_unembed, unembed):
        def loss(unembed):
            return teacher_divergence(teacher_hidden, teacher_unembed, hidden, unembed, block_tokens=7, **setting).sum()

        return jax.jit(jax.value_and_grad(loss))(unembed)

    def with_banned(unembed):
        return np.concatenate([unembed, np.full((len(unembed), 1), -1e30, np.float32)], axis=1)

    value, gradient = both(teacher_unembed, unembed)
    banned_value, banned_gradient = both(with_banned(teacher_unembed), with_banned(unembed))
    np.testing.assert_allclose(banned_value, value, rtol=1e-6)
    np.testing.assert_allclose(banned_gradient[:, :-1], gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(banned_gradient[:, -1], 0)


def test_nothing_is_as_large_as_tokens_by_vocabulary():
    """The largest array of values and gradients together is one block of logits, or an unembedding."""
    tokens, vocabulary, block = 64, 512, 8
    shapes = (1, tokens, D), (D, vocabulary), (1, tokens, E), (E, vocabulary)
    arguments = [jnp.zeros(shape) for shape in shapes]
    traced = jax.make_jaxpr(
        jax.grad(lambda *a: teacher_divergence(*a, kind="jensen_shannon", block_tokens=block).sum(), argnums=(2, 3))
    )(*arguments)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    assert max(sizes(traced.jaxpr)) == block * vocabulary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="kl"), "must be one of"),
        (dict(kind="jensen_shannon", beta=1.0), "between 0 and 1"),
        (dict(kind="forward_kl", top_k=V), "top_k must be 0"),
    ],
)
def test_what_cannot_be_is_said(inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        teacher_divergence(*inputs, **changes)


def test_vocabularies_must_be_one(inputs):
    with pytest.raises(ValueError, match="one vocabulary"):
        teacher_divergence(inputs[0], inputs[1][:, :-1], *inputs[2:], kind="forward_kl")
