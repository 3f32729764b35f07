import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.models import heads


@pytest.mark.parametrize(("vocabulary", "groups"), [(64, 1), (64 * 70, 3), (100, 0)])
def test_tiles_give_the_logits_of_the_whole_head(vocabulary, groups):
    generator = np.random.default_rng(0)
    hidden, head = generator.normal(size=(5, 16)), generator.normal(size=(16, vocabulary))
    tiles = jax.jit(heads.in_tiles)(jnp.asarray(head, jnp.float32))
    assert (len(tiles) if isinstance(tiles, tuple) else 0) == groups
    assert heads.vocabulary_size(tiles) == vocabulary
    found = jax.jit(heads.logits)(jnp.asarray(hidden, jnp.float32), tiles)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, hidden @ head, rtol=1e-4, atol=1e-5)


def test_tiles_are_read_in_the_dtype_of_the_hidden_states():
    generator = np.random.default_rng(1)
    hidden = jnp.asarray(generator.normal(size=(3, 32)), jnp.bfloat16)
    head = jnp.asarray(generator.normal(size=(32, 128)), jnp.float32)
    whole, tiled = heads.logits(hidden, head), heads.logits(hidden, heads.in_tiles(head))
    assert whole.dtype == tiled.dtype == jnp.float32
    np.testing.assert_allclose(tiled, whole, rtol=1e-2, atol=1e-2)
