"""The programs of a run, lowered from shapes alone: nothing is allocated, loaded or executed.

They are the very functions that a run calls (`train.step.jit_step`, `rollout.sampler`, `rollout.refill`,
`train.score.make_student`), given the shapes that the config leads to at their widest: prompts of
`data.max_prompt_tokens`, responses of `rollout.max_new_tokens`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from omniopd_jax import models, prng
from omniopd_jax.config import Config, mixed_arms
from omniopd_jax.models import DecoderConfig, Model
from omniopd_jax.models.decoder import Decoder
from omniopd_jax.models.parameters import nest, parameter_table
from omniopd_jax.plan import collectives as collectives_lib
from omniopd_jax.plan import hlo
from omniopd_jax.plan.cost import Cost, cost
from omniopd_jax.rollout import refill, sampler
from omniopd_jax.rollout.columns import cache_sizes
from omniopd_jax.rollout.rescoring import rescore
from omniopd_jax.rollout.sampling import SamplingRule
from omniopd_jax.train import sharding
from omniopd_jax.train.experiment import step_options
from omniopd_jax.train.optimizer import Optimizer, make_optimizer
from omniopd_jax.train.pipeline import parts_learnt
from omniopd_jax.train.score import make_student
from omniopd_jax.train.step import (
    jit_add,
    jit_apply,
    jit_step,
    state_shardings,
    sum_shapes,
    trainable,
    without_trainable,
)
from omniopd_jax.types import Anchors, PyTree, Rollout, TokenTree, TrainState

# Of a TPU program that does not fit: what it would use, in either of the compiler's sentences.
_USED = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)", re.IGNORECASE
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, on one chip."""

    name: str
    seconds: float  # of compilation
    arguments: float  # bytes
    outputs: float
    aliased: float  # bytes of outputs that reuse an argument's memory
    temporaries: float
    code: float
    cost: Cost
    sent: dict[str, float]  # bytes to other chips, by axis of the mesh
    exchanges: tuple[collectives_lib.Collective, ...]
    result: Any = dataclasses.field(default=None, repr=False)  # shapes of the outputs, where the compiler put them
    runs: int = 1  # in one optimizer step; cost and sent are those of one run
    too_large: float = 0.0  # > 0: it does not fit, and would need so many bytes; the rest is 0 then

    @property
    def peak(self) -> float:
        """Bytes while it runs, its arguments included."""
        if self.too_large:
            return self.too_large
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything that a run holds on the devices, as shapes with shardings."""

    config: Config
    mesh: Mesh
    student: Model
    reference: Model | None
    state: TrainState
    shardings: TrainState


def run_shapes(config: Config, decoder: DecoderConfig, mesh: Mesh, compute_dtype: str) -> Shapes:
    """The student, the reference and the state of a run, as `train.experiment.prepare` would place them."""
    dtype = jnp.dtype(config.student.param_dtype)
    module = Decoder(decoder, jnp.dtype(compute_dtype))
    params = _placed(_params(decoder, dtype), sharding.config_shardings(mesh, decoder))
    student = sharding.laid_out(Model(config=decoder, module=module, params=params), mesh)
    kernel = models.kernel_of(config.student.attention, decoder, module.compute_dtype, mesh.devices.flat[0])
    student = models.with_kernel(student, models.Kernel(kernel))
    if config.lora.rank > 0:
        adapted = jax.eval_shape(
            lambda model, key: models.add_adapters(
                model, key, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets
            ),
            student,
            jax.random.key(0),
        )
        adapters = _placed(
            adapted.adapters, sharding.axes_shardings(mesh, adapted.adapters, sharding.trainable_axes(adapted))
        )
        student = dataclasses.replace(adapted, params=params, adapters=adapters)
    reference = None
    if config.objective.anchor_weight > 0:
        reference = dataclasses.replace(student, adapters=None)
        if config.lora.rank == 0 and config.reference.dtype != "same":
            kept = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, jnp.dtype(config.reference.dtype), sharding=leaf.sharding
                ),
                params,
            )
            reference = dataclasses.replace(reference, params=kept)
    optimizer = _optimizer(config)
    shardings = state_shardings(mesh, student, optimizer)
    trained = trainable(student)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=trained, opt_state=jax.eval_shape(optimizer.init, trained)
    )
    return Shapes(config, mesh, student, reference, _placed(state, shardings), shardings)


def a_part(shapes: Shapes, rows: int) -> Shapes:
    """The same run with batches of so many rows."""
    rollout = dataclasses.replace(shapes.config.rollout, batch_size=rows)
    return dataclasses.replace(shapes, config=dataclasses.replace(shapes.config, rollout=rollout))


def lower_step(shapes: Shapes, micro_batch: int) -> jax.stages.Lowered:
    """The training step over a whole batch in micro-batches of so many responses."""
    config, mesh, fixed = shapes.config, shapes.mesh, (without_trainable(shapes.student), shapes.reference)
    jitted = jit_step(*fixed, _optimizer(config), mesh, shapes.shardings, step_options(config, mesh))
    return jitted.lower(shapes.state, *fixed, _trees(shapes, micro_batch), None)


def compile_gradients(shapes: Shapes, micro_batch: int) -> Compiled:
    """The training step; where a batch is learnt from in parts, the gradients of one."""
    config, mesh, parts = shapes.config, shapes.mesh, parts_learnt(shapes.config)
    if parts == 1:
        return compiled("step", lower_step(shapes, micro_batch), mesh)
    frozen, options = without_trainable(shapes.student), step_options(config, mesh)
    given = (
        frozen,
        shapes.state.params,
        shapes.reference,
        _trees(a_part(shapes, shapes.config.rollout.batch_size // parts), micro_batch),
    )
    jitted = jit_add(frozen, shapes.reference, mesh, shapes.shardings, options)
    lowered = jitted.lower(part_sums(shapes), *given, None)
    return dataclasses.replace(compiled("gradients", lowered, mesh), runs=parts)


def compile_apply(shapes: Shapes) -> list[Compiled]:
    """The optimizer's update from the parts' gradients; none where the step has it."""
    config, mesh = shapes.config, shapes.mesh
    if parts_learnt(config) == 1:
        return []
    lowered = jit_apply(_optimizer(config), mesh, shapes.shardings).lower(shapes.state, part_sums(shapes))
    return [compiled("update", lowered, mesh)]


def part_sums(shapes: Shapes) -> tuple[PyTree, PyTree]:
    """(gradients, terms) of a part that is learnt from, as shapes with shardings; the same for every micro-batch."""
    part = a_part(shapes, shapes.config.rollout.batch_size // parts_learnt(shapes.config))
    frozen, options = without_trainable(shapes.student), step_options(shapes.config, shapes.mesh)
    trees = _trees(part, part.config.rollout.batch_size)
    sums = sum_shapes(frozen, shapes.state.params, shapes.reference, trees, options)
    whole = sharding.replicated(shapes.mesh)
    return _placed(sums, (shapes.shardings.params, jax.tree.map(lambda _: whole, sums[1])))


def _optimizer(config: Config) -> Optimizer:
    return make_optimizer(config.optimizer, config.train.steps)


def _trees(shapes: Shapes, micro_batch: int) -> TokenTree:
    """A batch of weights in micro-batches. Every token counts: the lists of large updates are left out."""
    config, mesh = shapes.config, shapes.mesh
    count = config.rollout.batch_size // micro_batch
    prompt, response, width = config.data.max_prompt_tokens, config.rollout.max_new_tokens, config.audit.chunk_tokens
    slots = branch_slots(config)

    def array(*rest: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, micro_batch, *rest), dtype, sharding=sharding.batch_sharding(mesh, axis=1))

    return TokenTree(
        prompt_tokens_BxP=array(prompt, dtype=jnp.int32),
        prompt_mask_BxP=array(prompt, dtype=bool),
        tokens_BxT=array(response, dtype=jnp.int32),
        mask_BxT=array(response, dtype=bool),
        weight_BxT=array(response),
        anchor_weight_BxT=array(response),
        branch_tokens_BxRxC=array(slots, width, dtype=jnp.int32),
        branch_mask_BxRxC=array(slots, width, dtype=bool),
        branch_weight_BxRxC=array(slots, width),
        branch_start_BxR=array(slots, dtype=jnp.int32),
    )


def branch_slots(config: Config) -> int:
    """Branches a response that the arm may hand to the step, before equal ones are merged."""
    chunks, objective = config.audit.num_chunks, config.objective
    return chunks * (
        objective.num_branches * has_arm(config, "branch") + config.audit.num_continuations * has_arm(config, "imitate")
    )


def has_arm(config: Config, name: str) -> bool:
    """Whether an arm is trained, alone or in a mixture."""
    return name in mixed_arms(config.objective.arm, config.objective.weights)


def is_refilled(config: Config) -> bool:
    """Whether fewer responses are decoded side by side than a step has."""
    return 0 < config.rollout.slots < config.rollout.batch_size


def compile_sampling(shapes: Shapes) -> list[Compiled]:
    """What samples the responses: prefill, and the decoding loop at its widest.

    The loop takes the shardings that the compiler gave the outputs of what runs before it, as in a run; where that
    does not fit already, the loop is left out.
    """
    return _refilled(shapes) if is_refilled(shapes.config) else _side_by_side(shapes)


def _side_by_side(shapes: Shapes) -> list[Compiled]:
    config, mesh, model, rule = shapes.config, shapes.mesh, shapes.student, _rule(shapes)
    tokens_BxP, mask_BxP, keys_B = _prompts(shapes, config.rollout.batch_size)
    longest = config.rollout.max_new_tokens
    columns = cache_sizes(config.data.max_prompt_tokens, longest)[-1]
    lowered = sampler.read_prompts.lower(model, tokens_BxP, mask_BxP, keys_B, max_new_tokens=longest, rule=rule)
    prefill = compiled("prefill", lowered, mesh)
    if prefill.too_large:
        return [prefill]
    state = prefill.result
    wide = jax.eval_shape(lambda cache: sampler.widen_cache(cache, columns=columns), state.cache)
    state = dataclasses.replace(state, cache=_placed(wide, jax.tree.map(lambda leaf: leaf.sharding, state.cache)))
    lowered = sampler.decode_segment.lower(model, state, keys_B, until=longest, rule=rule)
    return [prefill, compiled("decode", lowered, mesh, turns=longest - 1)]


def _refilled(shapes: Shapes) -> list[Compiled]:
    config, mesh, model, rule = shapes.config, shapes.mesh, shapes.student, _rule(shapes)
    rollout, whole = config.rollout, sharding.replicated(shapes.mesh)
    tokens_WxP, mask_WxP, keys_W = _prompts(shapes, rollout.batch_size)
    longest = rollout.max_new_tokens
    columns = cache_sizes(config.data.max_prompt_tokens, longest)[-1]
    lowered = refill.empty_slots.lower(model, tokens_WxP, slots=rollout.slots, max_new_tokens=longest, columns=columns)
    empty = compiled("empty slots", lowered, mesh)
    if empty.too_large:
        return [empty]
    group = refill.group_of(rollout.slots, model.module.layout)
    row_F = jax.ShapeDtypeStruct((group,), jnp.int32, sharding=whole)
    lowered = refill.admit.lower(model, empty.result, tokens_WxP, mask_WxP, keys_W, row_F, row_F, rule=rule)
    admit = compiled("prefill", lowered, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    lowered = refill.decode_round.lower(model, empty.result, keys_W, number, number, rule=rule)
    # At the worst every response is of full length: so many rounds, one after the other.
    turns = longest * -(-rollout.batch_size // rollout.slots)
    admissions = -(-rollout.batch_size // group)
    return [dataclasses.replace(admit, runs=admissions), compiled("decode", lowered, mesh, turns=turns)]


def compile_scoring(shapes: Shapes) -> list[Compiled]:
    """What reads the responses again before the teacher is asked: their entropies, and the branches off them.

    Arms on the trunk need neither where `audit.entropy_source` is the decoding loop, which yields both by itself.
    """
    config, mesh = shapes.config, shapes.mesh
    rows, chunks = config.rollout.batch_size, config.audit.num_chunks
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens

    def array(*rest: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *rest), dtype, sharding=sharding.batch_sharding(mesh))

    rollout = Rollout(
        prompt_tokens_BxP=array(prompt, dtype=jnp.int32),
        prompt_mask_BxP=array(prompt, dtype=bool),
        tokens_BxT=array(response, dtype=jnp.int32),
        mask_BxT=array(response, dtype=bool),
        logprob_BxT=array(response),
        is_finished_B=array(dtype=bool),
        entropy_BxT=array(response),
    )
    found = []
    if config.audit.entropy_source == "rescore":
        lowered = rescore.lower(shapes.student, rollout, block_tokens=sharding.block_tokens(config, mesh))
        found.append(compiled("score", lowered, mesh))
    if has_arm(config, "branch"):
        anchors = Anchors(start_BxM=array(chunks, dtype=jnp.int32), is_valid_BxM=array(chunks, dtype=bool))
        made = make_student(config, mesh, stop_tokens=_stops(shapes.student.config), banned_tokens=())
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
        branch: Any = made.branch  # declared as a plain callable, in fact jitted
        lowered = branch.lower(shapes.student, rollout, anchors, array(dtype=jnp.int32), step)
        found.append(compiled("score and branch", lowered, mesh, turns=config.audit.chunk_tokens - 1))
    return found


def compiled(name: str, lowered: jax.stages.Lowered, mesh: Mesh, *, turns: int = 1) -> Compiled:
    """Compiles and reads what the compiler says.

    Args:
      turns: of a loop whose end depends on data.
    """
    began = time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _USED.search(str(error))
        if found is None:
            raise
        used = float(found[1]) * _UNITS[found[2].upper()]
        seconds = time.perf_counter() - began
        return Compiled(name, seconds, 0, 0, 0, 0, 0, Cost(0, 0), {}, (), too_large=used)
    seconds = time.perf_counter() - began
    memory, text = executable.memory_analysis(), executable.as_text()
    assert memory is not None  # the backends that we plan for answer
    assert text is not None
    program = hlo.parse(text)
    exchanges = collectives_lib.collectives(program, mesh, unknown_trips=turns)
    return Compiled(
        name=name,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        cost=cost(program, unknown_trips=turns),
        sent=collectives_lib.bytes_by_axis(exchanges),
        exchanges=tuple(exchanges),
        result=_placed(lowered.out_info, executable.output_shardings),
    )


def bytes_a_chip(tree: PyTree) -> int:
    """Bytes that one chip holds of a tree of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def cache_bytes(shapes: Shapes) -> int:
    """Bytes of the key/value cache that one chip holds while responses are decoded, at their longest."""
    config, decoder, mesh = shapes.config, shapes.student.config, shapes.mesh
    rows = config.rollout.slots if is_refilled(config) else config.rollout.batch_size
    shares = sharding.batch_shares(mesh)
    heads = decoder.num_kv_heads
    heads = heads // mesh.shape["tensor"] if heads % mesh.shape["tensor"] == 0 else heads
    columns = cache_sizes(config.data.max_prompt_tokens, config.rollout.max_new_tokens)[-1]
    rows = rows // shares if rows % shares == 0 else rows
    width = jnp.dtype(shapes.student.module.compute_dtype).itemsize
    return 2 * decoder.num_layers * rows * heads * decoder.head_dim * columns * width


def _params(decoder: DecoderConfig, dtype: Any) -> PyTree:
    return nest({row.path: jax.ShapeDtypeStruct(row.shape, dtype) for row in parameter_table(decoder)})


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def _prompts(shapes: Shapes, rows: int) -> tuple[Any, Any, Any]:
    width, at = shapes.config.data.max_prompt_tokens, sharding.batch_sharding(shapes.mesh)
    keys = jax.eval_shape(lambda index_B: prng.row_keys(prng.named_key(0, 0, "rollout"), index_B), jnp.arange(rows))
    return (
        jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=at),
        jax.ShapeDtypeStruct((rows, width), bool, sharding=at),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=NamedSharding(shapes.mesh, Spec(sharding.BATCH_AXES))),
    )


def _rule(shapes: Shapes) -> SamplingRule:
    rollout = shapes.config.rollout
    return SamplingRule(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        stop_tokens=_stops(shapes.student.config),
    )


def _stops(decoder: DecoderConfig) -> tuple[int, ...]:
    return decoder.eos_token_ids or (decoder.vocab_size - 1,)
