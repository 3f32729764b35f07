"""One decoder for every family: token ids → hidden states, with or without a cache, with or without branches.

The layers are one linen module under `nn.scan` (parameters stacked along a leading layer axis), so a model compiles
in the time of one layer; decoding walks the layers one by one, because there each has its own cache to write to.
Hidden states come back after the final norm, ready for `unembedding`; logits over a whole batch are never built here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from omniopd_jax.models import tiles
from omniopd_jax.models.contexts import BranchStepContext, CausalContext, Keys, StepContext, TreeContext
from omniopd_jax.models.families import DecoderConfig
from omniopd_jax.models.kernels import Kernel
from omniopd_jax.models.kv_cache import BranchCache, KVCache
from omniopd_jax.models.layers import DECLARED, TILES, Layer, LayerTraits, RMSNorm
from omniopd_jax.models.layout import Layout, by_key_head, by_sequence, gathered_layer
from omniopd_jax.models.listing import ListedContext, listing
from omniopd_jax.models.parameters import initial_params, leaf, nest, parameter_table
from omniopd_jax.models.rope import rotation
from omniopd_jax.types import Array, PyTree

Remat = Literal["none", "full", "dots"]
_HEAD = "head"  # among the parameters of a model that is laid out for decoding: the output head in tiles


@struct.dataclass
class Model:
    """A decoder and its weights. A pytree: only `params` and `adapters` hold arrays."""

    config: DecoderConfig = struct.field(pytree_node=False)
    module: Decoder = struct.field(pytree_node=False)
    params: PyTree
    adapters: PyTree | None = None  # LoRA weights; None: the base model


class Decoder(nn.Module):
    """Embedding, layers, final norm (and the head's kernel, which only `unembedding` reads)."""

    config: DecoderConfig
    compute_dtype: Any = jnp.float32
    adapter_scale: float = 1.0  # alpha / rank of the adapters
    layout: Layout | None = None  # of the activations on a mesh; None: the compiler's choice
    kernel: Kernel = Kernel()  # which attention reads whole sequences

    @nn.compact
    def __call__(
        self, tokens_BxN: Array, position_BxN: Array, context: Any, remat: Remat = "none"
    ) -> tuple[Array, Any]:
        """Returns (hidden_BxNxD after the final norm, what each layer's attention kept, stacked over layers)."""
        c = self.config
        embedding = self.param("embedding", DECLARED, (c.vocab_size, c.hidden_size))
        if not c.is_tied:
            self.param("lm_head", DECLARED, (c.hidden_size, c.vocab_size))
        x = embed(self, embedding, tokens_BxN)
        traits = LayerTraits(
            window=jnp.asarray([window or 2**30 for window in c.window_L], jnp.int32),
            rope_index=jnp.asarray(c.rope_index_L, jnp.int32),
        )
        ropes = tuple(rotation(rope, c.head_dim, position_BxN) for rope in c.ropes)
        scanned = nn.scan(
            _rematerialised(Layer, remat),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),  # flax annotates an int
            length=c.num_layers,
        )
        x, kept = scanned(c, self.adapter_scale, self.layout, name="layers")(x, traits, ropes, context)
        return RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")(x), kept


def _rematerialised(layer: Any, remat: Remat) -> Any:
    """The layer whose activations are kept ("none"), recomputed but for matrix products ("dots"), or all recomputed."""
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return nn.remat(layer, policy=policy, prevent_cse=False)


def embed(module: Decoder, embedding_VxD: Array, tokens: Array) -> Array:
    """Rows of the embedding in the compute dtype, scaled where the family does; an id outside the vocabulary: NaN."""
    x = jnp.take(embedding_VxD, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(module.compute_dtype)
    if module.config.embedding_scale != 1.0:
        x = x * jnp.asarray(module.config.embedding_scale, module.compute_dtype)
    return by_sequence(module.layout, x)


def init_model(config: DecoderConfig, key: Array, dtype: Any = jnp.float32, *, compute_dtype: Any = None) -> Model:
    """A model with random weights, see `initial_params`.

    Args:
      dtype: of the parameters.
      compute_dtype: of activations and matrix products; None: `dtype`.
    """
    module = Decoder(config, jnp.dtype(compute_dtype or dtype))
    params = jax.jit(initial_params, static_argnums=(0, 2))(config, key, jnp.dtype(dtype))
    return Model(config=config, module=module, params=params)


def with_kernel(model: Model, kernel: Kernel) -> Model:
    """The same model, its whole sequences read by another kernel. Weights are shared."""
    return dataclasses.replace(model, module=model.module.clone(kernel=kernel))


def logical_axes(model: Model) -> PyTree:
    """A tree like `model.params` whose leaves are tuples of logical axis names, one an axis of the parameter.

    The names are those of `parameters.AXES`. To jax.tree functions pass `is_leaf=lambda x: isinstance(x, tuple)`.
    """
    return nest({row.path: row.axes for row in parameter_table(model.config)})


def _layer_axes(config: DecoderConfig) -> dict[tuple[str, ...], object]:
    """Path inside one layer → logical names of its axes."""
    return {row.path[1:]: row.axes[1:] for row in parameter_table(config) if row.path[0] == "layers"}


def is_windowed(config: DecoderConfig) -> bool:
    return any(config.window_L)


def positions(mask_BxS: Array) -> Array:
    """Real tokens before each column, int32: the position of a real token. Padding gets 0 or a neighbour's."""
    return jnp.maximum(jnp.cumsum(mask_BxS.astype(jnp.int32), axis=1) - 1, 0)


def _apply(
    model: Model, tokens_BxN: Array, position_BxN: Array, context: Any, remat: Remat, place_UxJxW: Array | None = None
) -> tuple[Array, Any]:
    """With places: of the N tokens a row those that are listed, see `Listing`; hidden states of the others are 0."""
    variables = {"params": model.params}
    if model.adapters is not None:
        variables["lora"] = model.adapters
    if place_UxJxW is None:
        return cast(tuple[Array, Any], model.module.apply(variables, tokens_BxN, position_BxN, context, remat))
    listed = listing(place_UxJxW, tokens_BxN.shape[1])
    tokens_BxW, position_BxW = listed.in_list(tokens_BxN), listed.in_list(position_BxN)
    context = ListedContext(context, listed)
    hidden, kept = cast(tuple[Array, Any], model.module.apply(variables, tokens_BxW, position_BxW, context, remat))
    return listed.in_rows(hidden), kept


def read(
    model: Model,
    tokens_BxS: Array,
    mask_BxS: Array,
    *,
    cache_length: int | None = None,
    remat: Remat = "none",
    place_UxJxW: Array | None = None,
) -> tuple[Array, KVCache | None]:
    """One causal pass over whole sequences.

    Args:
      tokens_BxS: int ids; what stands on padding is ignored.
      mask_BxS: bool, True on real tokens; padding may stand left, right or between.
      cache_length: columns of the cache to return (≥ S); None: no cache.
      remat: what the backward pass recomputes, see `train.remat`.
      place_UxJxW: the tokens to read, as `models.listing.listing` takes them, with each all that it sees; None: all.

    Returns:
      (hidden_BxSxD after the final norm in the compute dtype, KVCache with columns [0, S) filled, or None). Hidden
      states at padding are finite and mean nothing.

    Raises:
      ValueError: cache_length < S.
    """
    mask_BxS = mask_BxS.astype(bool)
    position_BxS = positions(mask_BxS)
    keys = Keys(mask_BxS, position_BxS, is_windowed(model.config))
    context = CausalContext(keys, cache_length is not None, model.module.kernel, model.module.layout)
    hidden, kept = _apply(model, tokens_BxS, position_BxS, context, remat, place_UxJxW)
    if cache_length is None:
        return hidden, None
    k, v = kept  # stacked over layers
    spare = cache_length - tokens_BxS.shape[1]
    if spare < 0:
        raise ValueError(f"cache_length={cache_length} is shorter than the {tokens_BxS.shape[1]} tokens read.")
    layout = model.module.layout
    cache = KVCache(
        k=tuple(by_key_head(layout, jnp.pad(layer, ((0, 0), (0, 0), (0, 0), (0, spare)))) for layer in k),
        v=tuple(by_key_head(layout, jnp.pad(layer, ((0, 0), (0, 0), (0, spare), (0, 0)))) for layer in v),
        mask_BxS=jnp.pad(mask_BxS, ((0, 0), (0, spare))),
        position_BxS=jnp.pad(position_BxS, ((0, 0), (0, spare))),
        num_real_B=jnp.sum(mask_BxS, axis=1, dtype=jnp.int32),
        length=jnp.asarray(tokens_BxS.shape[1], jnp.int32),
    )
    return hidden, cache


def for_decoding(model: Model) -> Model:
    """The same model with its layers' weights apart and in the compute dtype: what a decoding loop wants.

    To be called once, outside the loop: otherwise each step slices (and casts) every stacked weight again, which on a
    CPU costs as much as the step itself, and under FSDP gathers it again. Only `decode` and `decode_branches` take
    such a model.
    """

    def convert(path: Any, leaf: Array) -> Array:
        # norms compute in float32, in both forms of the model
        return leaf if path[-1].key == "scale" else leaf.astype(model.module.compute_dtype)

    def apart(tree: PyTree) -> tuple[PyTree, ...]:
        tree = jax.tree_util.tree_map_with_path(convert, tree)
        return tuple(jax.tree.map(lambda a, i=layer: a[i], tree) for layer in range(model.config.num_layers))

    if isinstance(model.params["layers"], tuple):
        return model
    layout, axes = model.module.layout, nest(_layer_axes(model.config))
    params = dict(
        model.params, layers=tuple(gathered_layer(layout, layer, axes) for layer in apart(model.params["layers"]))
    )
    adapters = None if model.adapters is None else dict(model.adapters, layers=apart(model.adapters["layers"]))
    return dataclasses.replace(model, params=params, adapters=adapters)


def laid_out_for_decoding(model: Model, *, has_few_rows: bool) -> Model:
    """`for_decoding` as a program of its own, for loops on a CPU that are entered often: with matrices in tiles.

    Args:
      has_few_rows: few rows are decoded side by side: the layers' kernels are in tiles too, not the head alone.
    """
    layers, adapters, head = _laid_out(model, has_few_rows=has_few_rows)
    # what stays as it is must not pass through a program, which would copy it
    return dataclasses.replace(model, params=dict(model.params, layers=layers, **{_HEAD: head}), adapters=adapters)


@functools.partial(jax.jit, static_argnames="has_few_rows")
def _laid_out(model: Model, *, has_few_rows: bool) -> tuple[tuple[PyTree, ...], PyTree | None, tiles.Tiles]:
    """(parameters of each layer, adapters, head) of a model that is laid out for decoding."""
    head = tiles.in_tiles(unembedding(model))
    model = for_decoding(model)
    layers = model.params["layers"]
    if has_few_rows:
        layers = tuple(_layer_in_tiles(model.config, layer) for layer in layers)
    return layers, model.adapters, head


def _layer_in_tiles(config: DecoderConfig, layer: PyTree) -> PyTree:
    """One layer's parameters, the kernels of its linear maps in tiles."""
    leaves: dict[tuple[str, ...], Any] = {}
    for row in parameter_table(config):
        if row.path[0] != "layers":
            continue
        path, parameter = row.path[1:], leaf(layer, row.path[1:])
        if path[-1] == "kernel":
            inputs = math.prod(parameter.shape[: row.num_in])
            leaves[(*path[:-1], TILES)] = tiles.in_tiles(parameter.reshape(inputs, -1))
        else:
            leaves[path] = parameter
    return nest(leaves)


def decoding_head(model: Model) -> tiles.Matrix:
    """The head that a decoding loop multiplies with: the tiles where the model has them, else `unembedding`."""
    return model.params[_HEAD] if _HEAD in model.params else unembedding(model)


def _walk(model: Model, tokens_BxN: Array, position_BxN: Array, context_of: Any) -> tuple[Array, list[Any]]:
    """The layers one by one, each with its own context. Returns (hidden_BxNxD, what each layer's attention kept)."""
    model = for_decoding(model)
    config, module, params = model.config, model.module, model.params
    x = embed(module, params["embedding"], tokens_BxN)
    ropes = tuple(rotation(rope, config.head_dim, position_BxN) for rope in config.ropes)
    layer_module = Layer(config, module.adapter_scale, module.layout)
    kept = []
    for layer in range(config.num_layers):
        variables = {"params": params["layers"][layer]}
        if model.adapters is not None:
            variables["lora"] = model.adapters["layers"][layer]
        traits = LayerTraits(window=config.window_L[layer], rope_index=config.rope_index_L[layer])
        x, kept_here = cast(tuple[Array, Any], layer_module.apply(variables, x, traits, ropes, context_of(layer)))
        kept.append(kept_here)
    norm = RMSNorm(config.norm_eps, config.norm_offset)
    return cast(Array, norm.apply({"params": params["final_norm"]}, x)), kept


def decode(model: Model, token_B: Array, cache: KVCache, *, is_real_B: Array | None = None) -> tuple[Array, KVCache]:
    """One more token a row, written at column `cache.length`, which must be below the cache's width.

    Args:
      token_B: int ids.
      is_real_B: bool; False where a row has ended and its token is padding. None: all real.

    Returns:
      (hidden_BxD after the final norm, the cache with one column more).
    """
    is_real = jnp.ones(token_B.shape, bool) if is_real_B is None else is_real_B.astype(bool)
    position, column = cache.num_real_B, cache.length
    mask = jax.lax.dynamic_update_slice(cache.mask_BxS, is_real[:, None], (0, column))
    position_BxS = jax.lax.dynamic_update_slice(cache.position_BxS, position[:, None], (0, column))

    def context_of(layer: int) -> StepContext:
        return StepContext(cache.k[layer], cache.v[layer], mask, position_BxS, position, column)

    hidden, kept = _walk(model, token_B[:, None], position[:, None], context_of)
    cache = KVCache(
        k=tuple(k for k, _ in kept),
        v=tuple(v for _, v in kept),
        mask_BxS=mask,
        position_BxS=position_BxS,
        num_real_B=position + is_real.astype(jnp.int32),
        length=column + 1,
    )
    return hidden[:, 0], cache


def read_tree(
    model: Model,
    tokens_BxS: Array,
    mask_BxS: Array,
    branch_tokens_BxRxC: Array,
    branch_mask_BxRxC: Array,
    branch_start_BxR: Array,
    *,
    remat: Remat = "none",
    place_UxJxW: Array | None = None,
) -> tuple[Array, Array]:
    """Trunks and their branches in one pass: what each branch would give as a sequence of its own.

    Args:
      tokens_BxS, mask_BxS: the trunk, as for `read`.
      branch_tokens_BxRxC, branch_mask_BxRxC: branches, right-padded; R may be 0.
      branch_start_BxR: int, a column of the trunk: the branch sees real columns [0, start) and its own earlier tokens.
        Its positions continue those of the trunk. Branches never see each other.
      place_UxJxW: as for `read`; a row is its trunk and then its branches, one after the other: X = S + R·C positions.

    Returns:
      (hidden_BxSxD, branch_hidden_BxRxCxD), both after the final norm.
    """
    b, r, c = branch_tokens_BxRxC.shape
    s = tokens_BxS.shape[1]
    if r * c == 0:
        hidden, _ = read(model, tokens_BxS, mask_BxS, remat=remat, place_UxJxW=place_UxJxW)
        return hidden, jnp.zeros((b, r, c, hidden.shape[-1]), hidden.dtype)
    mask_BxS, branch_mask = mask_BxS.astype(bool), branch_mask_BxRxC.astype(bool)
    position = positions(mask_BxS)
    branch_position = start_position(mask_BxS, branch_start_BxR)[..., None] + jnp.arange(c, dtype=jnp.int32)
    keys = Keys(mask_BxS, position, is_windowed(model.config))
    module = model.module
    context = TreeContext(keys, branch_mask, branch_position, branch_start_BxR, module.kernel, module.layout)
    tokens = jnp.concatenate([tokens_BxS, branch_tokens_BxRxC.reshape(b, r * c)], axis=1)
    all_positions = jnp.concatenate([position, branch_position.reshape(b, r * c)], axis=1)
    hidden, _ = _apply(model, tokens, all_positions, context, remat, place_UxJxW)
    return hidden[:, :s], hidden[:, s:].reshape(b, r, c, -1)


def start_position(mask_BxS: Array, start_BxR: Array) -> Array:
    """Real tokens in columns [0, start), int32 [B, R]."""
    is_before = jnp.arange(mask_BxS.shape[1]) < start_BxR[..., None]
    return jnp.sum(mask_BxS[:, None] & is_before, axis=-1, dtype=jnp.int32)


def open_branches(cache: KVCache, start_BxR: Array, length: int) -> BranchCache:
    """R branches a row off one trunk cache, each with room for `length` tokens of its own.

    Args:
      start_BxR: int, columns of the trunk, as in `read_tree`.
    """
    is_before = jnp.arange(cache.mask_BxS.shape[1]) < start_BxR[..., None]
    b, kv_heads, head_dim, _ = cache.k[0].shape
    empty = jnp.zeros((b, start_BxR.shape[1], kv_heads, head_dim, length), cache.k[0].dtype)
    return BranchCache(
        trunk=cache,
        sees_trunk_BxRxS=cache.mask_BxS[:, None] & is_before,
        start_position_BxR=start_position(cache.mask_BxS, start_BxR),
        k=(empty,) * len(cache.k),
        v=(empty.swapaxes(3, 4),) * len(cache.v),
        length=jnp.asarray(0, jnp.int32),
    )


def decode_branches(model: Model, token_BxR: Array, cache: BranchCache) -> tuple[Array, BranchCache]:
    """One more token on every branch. Returns (hidden_BxRxD after the final norm, the cache with one column more).

    Tokens fed after a branch has ended are harmless: nothing before them sees them.
    """
    position = cache.start_position_BxR + cache.length
    trunk = cache.trunk

    def context_of(layer: int) -> BranchStepContext:
        return BranchStepContext(
            trunk.k[layer],
            trunk.v[layer],
            cache.k[layer],
            cache.v[layer],
            cache.sees_trunk_BxRxS,
            trunk.position_BxS,
            position,
            cache.length,
        )

    hidden, kept = _walk(model, token_BxR, position, context_of)
    own_k, own_v = tuple(k for k, _ in kept), tuple(v for _, v in kept)
    return hidden, dataclasses.replace(cache, k=own_k, v=own_v, length=cache.length + 1)


def unembedding(model: Model) -> Array:
    """The output head DxV in the compute dtype; the embedding's transpose where the two are tied."""
    kernel = model.params["embedding"].T if model.config.is_tied else model.params["lm_head"]
    kernel = kernel.astype(model.module.compute_dtype)
    layout = model.module.layout
    return kernel if layout is None else layout.gathered(kernel, ("embed", "vocab"))


def logits(model: Model, tokens_BxS: Array, mask_BxS: Array) -> Array:
    """logits_BxSxV, float32. For checks and small inputs: training never builds this array."""
    hidden, _ = read(model, tokens_BxS, mask_BxS)
    out = jnp.einsum("bsd,dv->bsv", hidden, unembedding(model), preferred_element_type=jnp.float32)
    cap = model.config.final_logit_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)
