import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.models import tiles
from omniopd_jax.models.layers import TILES, Linear
from omniopd_jax.models.parameters import leaf, parameter_table
from tests.models import parity


@pytest.mark.parametrize(("columns", "groups"), [(64, 1), (64 * 70, 3), (100, 2), (24, 1)])
def test_tiles_give_the_product_of_the_whole_matrix(columns, groups):
    generator = np.random.default_rng(0)
    rows, matrix = generator.normal(size=(5, 16)), generator.normal(size=(16, columns))
    found = jax.jit(tiles.in_tiles)(jnp.asarray(matrix, jnp.float32))
    assert len(found.groups) == groups
    assert tiles.num_columns(found) == columns
    out = jax.jit(tiles.product)(jnp.asarray(rows, jnp.float32), found)
    np.testing.assert_allclose(out, rows @ matrix, rtol=1e-4, atol=1e-5)


def test_tiles_are_read_in_the_dtype_of_the_rows_and_summed_in_the_one_asked_for():
    generator = np.random.default_rng(1)
    rows = jnp.asarray(generator.normal(size=(3, 32)), jnp.bfloat16)
    matrix = jnp.asarray(generator.normal(size=(32, 130)), jnp.float32)
    for asked, given in ((jnp.float32, jnp.float32), (None, jnp.bfloat16)):
        whole, tiled = tiles.product(rows, matrix, asked), tiles.product(rows, tiles.in_tiles(matrix), asked)
        assert whole.dtype == tiled.dtype == given
        np.testing.assert_allclose(tiled.astype(jnp.float32), whole.astype(jnp.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [((48,), (2, 40)), ((3, 16), (200,)), ((2, 64), (2, 64)), ((8,), (24,))]
)
def test_a_linear_map_in_tiles_with_bias_and_adapter(inputs, outputs):
    """Against x · (W + scale · a · b) + bias in float64; most of these widths are no multiple of a tile's."""
    generator = np.random.default_rng(2)

    def draw(*shape):
        return generator.normal(size=shape)

    x, kernel, bias = draw(2, 3, *inputs), draw(*inputs, *outputs), draw(*outputs)
    a, b = draw(*inputs, 4), draw(4, *outputs)
    laid_out = tiles.in_tiles(jnp.asarray(kernel, jnp.float32).reshape(np.prod(inputs), -1))
    params = {TILES: laid_out, "bias": jnp.asarray(bias, jnp.float32)}
    lora = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), {"a": a, "b": b})
    linear = Linear(inputs, outputs, has_bias=True, adapter_scale=0.5)
    found = linear.apply({"params": params, "lora": lora}, jnp.asarray(x, jnp.float32))
    num_in = len(inputs)
    want = np.tensordot(x, kernel + 0.5 * np.tensordot(a, b, 1), num_in) + bias
    assert found.shape == (2, 3, *outputs)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_every_linear_map_of_every_family_is_laid_out(case):
    """The kernels themselves are gone, so none of them can be read beside its tiles."""
    model = parity.tiny_model(case.name)
    laid_out = jax.eval_shape(lambda model: models.laid_out_for_decoding(model, has_few_rows=True), model)
    linear = [row.path for row in parameter_table(model.config) if row.path[-1] == "kernel"]
    for layer in laid_out.params["layers"]:
        owners = [leaf(layer, path[1:-1]) for path in linear]
        assert all(isinstance(owner[TILES], tiles.Tiles) and "kernel" not in owner for owner in owners)


@pytest.mark.parametrize(
    ("name", "has_few_rows"), [("Gemma 3 (text)", True), ("Qwen3-MoE", False), ("Qwen3-MoE", True)]
)
def test_a_model_laid_out_decodes_as_it_reads(name, has_few_rows):
    model = models.add_adapters(parity.tiny_model(name), jax.random.key(3), rank=2, alpha=4.0)
    model = model.replace(adapters=jax.tree.map(lambda leaf: leaf + 0.05, model.adapters))
    tokens, mask = parity.tokens_and_mask()
    whole, _ = parity.quick_jit(models.read)(model, tokens, mask)
    laid_out = models.laid_out_for_decoding(model, has_few_rows=has_few_rows)

    @parity.quick_jit
    def decoded(model, laid_out, tokens, mask):
        _, cache = models.read(model, tokens[:, :-4], mask[:, :-4], cache_length=tokens.shape[1])

        def step(cache, column):
            hidden, cache = models.decode(laid_out, column[0], cache, is_real_B=column[1])
            return cache, hidden

        return jax.lax.scan(step, cache, (tokens[:, -4:].T, mask[:, -4:].T))[1].swapaxes(0, 1)

    found = decoded(model, laid_out, tokens, mask)
    assert parity.errors(found, whole[:, -4:], mask[:, -4:]).max() < 1e-4
    assert laid_out.params["embedding"] is model.params["embedding"]  # not copied
