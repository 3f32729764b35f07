"""The one training step: a pure function, jitted once for each bucket of shapes, its state donated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from omniopd_jax.algo.divergences import teacher_divergence
from omniopd_jax.algo.entropy import token_logprob
from omniopd_jax.algo.fused import fused_terms
from omniopd_jax.algo.losses import TOKEN_FIELDS, k3_kl, token_loss, tree_loss
from omniopd_jax.models import Model, decoder
from omniopd_jax.models.listing import listing
from omniopd_jax.train.optimizer import Optimizer
from omniopd_jax.train.sharding import axes_shardings, batch_sharding, replicated, spread_tree, trainable_axes
from omniopd_jax.types import Array, PyTree, TokenTree, TrainState

Metrics = dict[str, Array]  # scalars
Sums = tuple[PyTree, Metrics]  # gradients and terms, float32, over some of a step's micro-batches

# What a step checks, in the order in which a fault would spread; a main names the first.
TERMS = (
    "loss/trunk",
    "loss/branch",
    "loss/anchor",
    "loss/divergence",
    "loss/ratio",
    "optimizer/grad_norm",
)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What is fixed when the step is compiled."""

    has_trunk: bool = True  # some arm puts weight on response tokens; False skips their log-probabilities
    has_anchor: bool = True  # β > 0; False skips the reference altogether
    anchor_estimator: str = "exact"  # or "k3"
    divergence: str = "reverse_kl"  # of a tree that asks for one; see `teacher_divergence`
    divergence_beta: float = 0.5
    top_k: int = 0
    clip: float = 0.2  # ε of a tree that asks for the ratio
    updates: int = 1  # μ, on one batch
    remat: decoder.Remat = "none"
    block_tokens: int = 512


def trainable(model: Model) -> PyTree:
    """What the optimizer changes: the adapters where there are any, else every parameter."""
    return model.params if model.adapters is None else model.adapters


def without_trainable(model: Model) -> Model:
    """The model less what the optimizer changes: the rest, which a step reads and never writes."""
    return replace(model, params=None) if model.adapters is None else replace(model, adapters={})


def with_trainable(frozen: Model, params: PyTree) -> Model:
    """The model again, from `without_trainable` and a state's `params`."""
    return replace(frozen, params=params) if frozen.adapters is None else replace(frozen, adapters=params)


def state_shardings(mesh: Mesh, model: Model, optimizer: Optimizer) -> TrainState:
    """One sharding a leaf of the state; the optimizer's moments lie where their parameters lie."""
    params = trainable(model)
    of_params = axes_shardings(mesh, params, trainable_axes(model))
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        of_params,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(step=replicated(mesh), params=of_params, opt_state=opt_state)


def init_state(model: Model, optimizer: Optimizer, shardings: TrainState) -> TrainState:
    """The state before the first step. A copy: states are donated, `model` stays as it is."""

    def start(params: PyTree) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return jax.jit(start, out_shardings=shardings)(spread_tree(trainable(model), shardings.params))


def tree_terms(
    model: Model, reference: Model | None, tree: TokenTree, options: StepOptions, teacher: Model | None = None
) -> tuple[Array, dict[str, Array]]:
    """Loss of one (micro-)batch and its terms, all plain sums over the batch.

    Args:
      model: the student, differentiated.
      reference: the frozen initial student; None where no token carries the anchor.
      tree: weights that hold their denominators.
      options: what can be left out.
      teacher: a white-box teacher of the same vocabulary, frozen; only where the tree asks for a divergence from it.
    """
    blocks = {"block_tokens": options.block_tokens, "logit_softcap": model.config.final_logit_softcap}
    prompt_width = tree.prompt_tokens_BxP.shape[1]
    tokens_BxS = jnp.concatenate([tree.prompt_tokens_BxP, tree.tokens_BxT], axis=1)
    mask_BxS = jnp.concatenate([tree.prompt_mask_BxP, tree.mask_BxT], axis=1)
    column_BxR = prompt_width + tree.branch_start_BxR
    rows, slots, width = tree.branch_tokens_BxRxC.shape
    if slots and width > 1:
        # a branch's last token is predicted but never read
        hidden_BxSxD, branch_hidden_BxRxCxD = decoder.read_tree(
            model,
            tokens_BxS,
            mask_BxS,
            tree.branch_tokens_BxRxC[:, :, :-1],
            tree.branch_mask_BxRxC[:, :, :-1],
            column_BxR,
            remat=options.remat,
            place_UxJxW=tree.read_UxJxW,
        )
    else:
        hidden_BxSxD, _ = decoder.read(model, tokens_BxS, mask_BxS, remat=options.remat, place_UxJxW=tree.read_UxJxW)
        branch_hidden_BxRxCxD = jnp.zeros((rows, slots, 0, hidden_BxSxD.shape[-1]), hidden_BxSxD.dtype)
    unembed_DxV = decoder.unembedding(model)
    hidden_BxTxD = hidden_BxSxD[:, prompt_width - 1 : -1]  # column s predicts the token at s + 1
    carrier, logprob_BxT, kl_BxT = _trunk_terms(
        model, reference, tree, tokens_BxS, mask_BxS, hidden_BxTxD, options, blocks
    )
    branch_logprob_BxRxC = jnp.zeros((rows, slots, width), jnp.float32)
    if slots:
        first_BxRxD = jnp.take_along_axis(hidden_BxSxD, column_BxR[:, :, None] - 1, axis=1)
        hidden_BxRxCxD = jnp.concatenate([first_BxRxD[:, :, None], branch_hidden_BxRxCxD], axis=2)
        of_branches, branch_logprob_BxRxC = _branch_terms(tree, hidden_BxRxCxD, unembed_DxV, options, blocks)
        carrier += of_branches
    divergence_BxT = None
    if tree.divergence_weight_BxT is not None:
        assert teacher is not None
        divergence_BxT = _divergence(teacher, tokens_BxS, mask_BxS, hidden_BxTxD, unembed_DxV, options, blocks)
    loss, terms = tree_loss(
        logprob_BxT, branch_logprob_BxRxC, kl_BxT, tree, divergence_BxT=divergence_BxT, clip=options.clip
    )
    return loss + carrier, terms


def _branch_terms(
    tree: TokenTree, hidden_BxRxCxD: Array, unembed_DxV: Array, options: StepOptions, blocks: dict[str, Any]
) -> tuple[Array, Array]:
    """(carrier, logprob_BxRxC), see `fused_terms`; log-probabilities of tokens that the tree does not list are 0."""
    rows, slots, width = tree.branch_tokens_BxRxC.shape
    listed = None if tree.scored_UxJxW is None else listing(tree.scored_UxJxW, slots * width)

    def flat(array_BxRxC: Array) -> Array:
        array = array_BxRxC.reshape(rows, slots * width, *array_BxRxC.shape[3:])
        return array if listed is None else listed.in_list(array)

    weight = flat(tree.branch_weight_BxRxC)
    fields = {"weight_BxT": weight, "anchor_weight_BxT": jnp.zeros_like(weight)}
    if tree.branch_power_BxR is not None:
        fields["power_BxT"] = flat(jnp.repeat(tree.branch_power_BxR[:, :, None], width, axis=2))
    carrier, logprob, _ = fused_terms(
        token_loss(options.clip), flat(hidden_BxRxCxD), unembed_DxV, flat(tree.branch_tokens_BxRxC), fields, **blocks
    )
    logprob = logprob if listed is None else listed.in_rows(logprob)
    return carrier, logprob.reshape(rows, slots, width)


def _trunk_terms(
    model: Model,
    reference: Model | None,
    tree: TokenTree,
    tokens_BxS: Array,
    mask_BxS: Array,
    hidden_BxTxD: Array,
    options: StepOptions,
    blocks: dict[str, Any],
) -> tuple[Array, Array, Array]:
    """(carrier, logprob_BxT, kl_BxT), see `fused_terms`; zeros for what no token is weighted with."""
    nothing = jnp.zeros((), jnp.float32)
    nothing_BxT = jnp.zeros(tree.tokens_BxT.shape, jnp.float32)
    unembed_DxV = decoder.unembedding(model)
    has_trunk = options.has_trunk or tree.ratio_weight_BxT is not None
    if not options.has_anchor and not has_trunk:
        return nothing, nothing_BxT, nothing_BxT
    fields = {name: getattr(tree, name) for name in TOKEN_FIELDS if getattr(tree, name) is not None}
    student = (hidden_BxTxD, unembed_DxV, tree.tokens_BxT)
    if not options.has_anchor:
        return fused_terms(token_loss(options.clip), *student, fields, **blocks)
    assert reference is not None
    reference_hidden_BxSxD, _ = decoder.read(reference, tokens_BxS, mask_BxS)
    reference_hidden_BxTxD = reference_hidden_BxSxD[:, tree.prompt_tokens_BxP.shape[1] - 1 : -1]
    sides = (reference_hidden_BxTxD, decoder.unembedding(reference))
    if options.anchor_estimator == "k3":
        logprob_BxT = token_logprob(*student, **blocks)
        return nothing, logprob_BxT, k3_kl(token_logprob(*sides, tree.tokens_BxT, **blocks), logprob_BxT)
    return fused_terms(token_loss(options.clip), *student, fields, sides, **blocks)


def _divergence(
    teacher: Model,
    tokens_BxS: Array,
    mask_BxS: Array,
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    options: StepOptions,
    blocks: dict[str, Any],
) -> Array:
    """divergence_BxT from the teacher, which reads the sequences here: its logits exist a block at a time.

    Models of one tokenizer may be padded to different vocabularies; rows beyond the shorter one stand for no token.
    """
    teacher_hidden_BxSxD, _ = decoder.read(teacher, tokens_BxS, mask_BxS)
    first = tokens_BxS.shape[1] - hidden_BxTxD.shape[1] - 1
    teacher_unembed_DxV = decoder.unembedding(teacher)
    width = min(unembed_DxV.shape[1], teacher_unembed_DxV.shape[1])
    return teacher_divergence(
        teacher_hidden_BxSxD[:, first:-1],
        teacher_unembed_DxV[:, :width],
        hidden_BxTxD,
        unembed_DxV[:, :width],
        kind=options.divergence,
        beta=options.divergence_beta,
        top_k=options.top_k,
        teacher_logit_softcap=teacher.config.final_logit_softcap,
        **blocks,
    )


def gradients(
    frozen: Model,
    params: PyTree,
    reference: Model | None,
    trees: TokenTree,
    options: StepOptions,
    teacher: Model | None = None,
    start: Sums | None = None,
) -> Sums:
    """(gradients, terms) summed over the micro-batches of `trees` (first axis), one after the other, and `start`.

    Sums of several are in float32, whatever the parameters' dtype: bfloat16 would lose the small parts.
    """

    def loss(params: PyTree, tree: TokenTree) -> tuple[Array, dict[str, Array]]:
        return tree_terms(with_trainable(frozen, params), reference, tree, options, teacher)

    def part(tree: TokenTree) -> Sums:
        return jax.grad(loss, has_aux=True)(params, tree)

    first = jax.tree.map(lambda array: array[0], trees)
    if start is None and trees.tokens_BxT.shape[0] == 1:
        return part(first)
    if start is None:
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), jax.eval_shape(part, first))

    def add(total: Any, tree: TokenTree) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(tree)), None

    return jax.lax.scan(add, start, trees)[0]


def sum_shapes(
    frozen: Model,
    params: PyTree,
    reference: Model | None,
    trees: TokenTree,
    options: StepOptions,
    teacher: Model | None = None,
) -> Sums:
    """What `gradients` takes as its start, as shapes."""
    of_trees = functools.partial(gradients, options=options)
    shapes = jax.eval_shape(of_trees, frozen, params, reference, trees, teacher=teacher)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)


class Step(NamedTuple):
    """The compiled step, whole or in parts. States passed in are donated, and sums that are added to.

    `trees` is a TokenTree of micro-batches, [A, B / A, …], on the devices. A step is `options.updates` updates of the
    optimizer on these trees; the metrics are those of the last. In parts it is one update on the sum of all that was
    added. A step in which anything is not finite changes nothing: the state that comes back is the one that went in,
    and metrics["is_finite"] is False.
    """

    whole: Callable[[TrainState, TokenTree], tuple[TrainState, Metrics]]
    add: Callable[[Sums | None, PyTree, TokenTree], Sums]  # sums so far, the state's params, trees
    apply: Callable[[TrainState, Sums], tuple[TrainState, Metrics]]


def make_step(
    frozen: Model,
    reference: Model | None,
    optimizer: Optimizer,
    mesh: Mesh,
    shardings: TrainState,
    options: StepOptions,
    teacher: Model | None = None,
) -> Step:
    """Compiles, at the first call of each and for each bucket of shapes."""
    whole = jit_step(frozen, reference, optimizer, mesh, shardings, options, teacher)
    add = jit_add(frozen, reference, mesh, shardings, options, teacher)
    apply = jit_apply(optimizer, mesh, shardings)

    zeros: Callable[[], Sums] | None = None  # the names of the terms depend on the fields of the first trees

    def add_to(sums: Sums | None, params: PyTree, trees: TokenTree) -> Sums:
        nonlocal zeros
        if zeros is None:
            shapes = sum_shapes(frozen, params, reference, trees, options, teacher)
            make = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            zeros = jax.jit(make, out_shardings=(shardings.params, replicated(mesh)))
        return add(zeros() if sums is None else sums, frozen, params, reference, trees, teacher)

    return Step(lambda state, trees: whole(state, frozen, reference, trees, teacher), add_to, apply)


def jit_step(
    frozen: Model,
    reference: Model | None,
    optimizer: Optimizer,
    mesh: Mesh,
    shardings: TrainState,
    options: StepOptions,
    teacher: Model | None = None,
) -> Any:
    """The jitted function of (state, frozen, reference, trees, teacher) behind `Step.whole`.

    Of `frozen`, `reference` and `teacher` only shapes, dtypes and shardings are read here: a planner lowers it from
    those alone.
    """

    def step(
        state: TrainState, frozen: Model, reference: Model | None, trees: TokenTree, teacher: Model | None
    ) -> tuple[TrainState, Metrics]:
        def update(state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
            grads, terms = gradients(frozen, state.params, reference, trees, options, teacher)
            return _updated(state, grads, terms, number, optimizer, mesh)

        if options.updates == 1:
            return _counted(*update(state, state.step))
        numbers = state.step * options.updates + jnp.arange(options.updates)
        stepped, several = jax.lax.scan(update, state, numbers)
        is_finite = jnp.all(several["is_finite"])
        metrics = jax.tree.map(lambda values: values[-1], several) | {"is_finite": is_finite}
        return _counted(jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), stepped, state), metrics)

    of_frozen, of_reference, of_teacher = map(_shardings_of, (frozen, reference, teacher))
    return jax.jit(
        step,
        in_shardings=(shardings, of_frozen, of_reference, batch_sharding(mesh, axis=1), of_teacher),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_add(
    frozen: Model,
    reference: Model | None,
    mesh: Mesh,
    shardings: TrainState,
    options: StepOptions,
    teacher: Model | None = None,
) -> Any:
    """The jitted function of (sums, frozen, params, reference, trees, teacher) behind `Step.add`."""

    def add(
        sums: Sums, frozen: Model, params: PyTree, reference: Model | None, trees: TokenTree, teacher: Model | None
    ) -> Sums:
        return gradients(frozen, params, reference, trees, options, teacher, start=sums)

    of_sums = (shardings.params, replicated(mesh))
    of_frozen, of_reference, of_teacher = map(_shardings_of, (frozen, reference, teacher))
    return jax.jit(
        add,
        in_shardings=(of_sums, of_frozen, shardings.params, of_reference, batch_sharding(mesh, axis=1), of_teacher),
        out_shardings=of_sums,
        donate_argnums=0,
    )


def jit_apply(optimizer: Optimizer, mesh: Mesh, shardings: TrainState) -> Any:
    """The jitted function of (state, sums) behind `Step.apply`."""

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        return _counted(*_updated(state, *sums, state.step, optimizer, mesh))

    return jax.jit(
        apply,
        in_shardings=(shardings, (shardings.params, replicated(mesh))),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _updated(
    state: TrainState, grads: PyTree, terms: Metrics, number: Array, optimizer: Optimizer, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """Update `number` of the optimizer, with what is to be known about it. Where not all is finite, nothing changes."""
    grads = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), grads, state.params)
    norm = optax.global_norm(grads)
    metrics = terms | {
        "optimizer/grad_norm": norm,
        "optimizer/learning_rate": jnp.asarray(optimizer.schedule(number), jnp.float32),
    }
    # Where the gradients' squares have a finite sum, AdamW's moments and update are finite. To wait for the norm of
    # the update would keep both moments and the update of every parameter until the last is known.
    is_finite = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in TERMS if name in metrics])))
    params, opt_state, update_norm = optimizer.update(
        grads, state.opt_state, state.params, norm=norm, is_kept=is_finite, is_one_pass=_is_one_cpu(mesh)
    )
    metrics |= {"optimizer/update_norm": update_norm, "is_finite": is_finite}
    return dataclasses.replace(state, params=params, opt_state=opt_state), metrics


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _counted(stepped: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """A step that changed nothing does not count."""
    return dataclasses.replace(stepped, step=stepped.step + metrics["is_finite"]), metrics


def _shardings_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
