"""One run on one topology: what it holds, what it computes, how long a step takes at least, and whether it fits."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from omniopd_jax.config import Config, ConfigError
from omniopd_jax.models import DecoderConfig
from omniopd_jax.plan import programs
from omniopd_jax.plan.programs import Compiled, Shapes
from omniopd_jax.plan.roofline import Roofline, roofline
from omniopd_jax.plan.students import find_student
from omniopd_jax.plan.topology import Topology
from omniopd_jax.teacher.budget import API_KINDS, projected_cost
from omniopd_jax.train import sharding
from omniopd_jax.train.pipeline import micro_batch, micro_batches, parts_learnt, rows_sampled
from omniopd_jax.train.small_world import model_config
from omniopd_jax.types import InputError
from omniopd_jax.worlds import get_world

USABLE = 0.98  # of a chip's memory; the rest is the runtime's own (libtpu gives 15.75 of a v5e's 16 GiB)

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes and FLOPs are one chip's."""

    topology: Topology
    mesh: Mapping[str, int]
    student: str
    config: Config
    micro_batch: int  # responses that the step computes at a time
    # parameters, optimizer, reference: all the time; cache: while responses are sampled; gradients: of a batch in parts
    held: Mapping[str, int]
    others: tuple[Compiled, ...]  # sampling and scoring, of the largest rollouts first
    update: tuple[Compiled, ...]  # the step, or the gradients of its parts and the optimizer's update
    tried: Mapping[int, bool]  # micro-batch → fits, of a search
    teacher: str  # projected cost of a teacher behind an API

    @property
    def programs(self) -> tuple[Compiled, ...]:
        return (*self.others, *self.update)

    def peak(self, program: Compiled) -> float:
        """Bytes in use while a program runs: its own, and what lies beside it untouched."""
        held, has_adapters = self.held, self.config.lora.rank > 0
        # Adapters: base and reference are the same arrays, handed in twice where both are handed in.
        shared = held["parameters"] if has_adapters and held["reference"] else 0
        beside = {
            "step": -shared,
            "gradients": held["optimizer"] - shared,
            "update": held["parameters"] if has_adapters else held["reference"],
        }
        sampling = held["optimizer"] + (0 if has_adapters else held["reference"])
        return program.peak + beside.get(program.name, sampling)

    @property
    def capacity(self) -> float | None:
        """Usable bytes a chip; None on a CPU."""
        return None if self.topology.chip is None else self.topology.chip.memory_bytes * USABLE

    @property
    def fits(self) -> bool | None:
        """None where nothing is known of the memory."""
        if self.capacity is None:
            return None
        return all(not one.too_large and self.peak(one) <= self.capacity for one in self.programs)

    def roofline(self, program: Compiled) -> Roofline | None:
        """All runs of a program in one optimizer step; None on a CPU, or where the program does not fit."""
        if self.topology.chip is None or program.too_large:
            return None
        one = roofline(program.cost.flops, program.cost.bytes, program.sent, self.topology.chip)
        return Roofline(*(value * program.runs for value in dataclasses.astuple(one)))

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """(at best, at worst) of one optimizer step on the devices, without the teacher."""
        times = [self.roofline(one) for one in self.programs]
        if any(time is None for time in times):
            return None
        return sum(t.at_best for t in times if t), sum(t.at_worst for t in times if t)


def make_plan(
    config: Config,
    topology: Topology,
    *,
    student: str = "",
    search: bool = False,
    progress: Progress = lambda _: None,
) -> Plan:
    """Compiles a run's programs for a topology.

    Args:
      config: the run.
      topology: from `topology.topology`.
      student: a published model's name instead of `student.path`.
      search: find the largest micro-batch that fits and plan with it, instead of `train.micro_batch_size`.
      progress: told what is being compiled.

    Raises:
      InputError: the mesh, the batch or the student does not fit.
    """
    if programs.has_arm(config, "opd"):
        raise ConfigError(
            f"config.objective.arm={config.objective.arm!r} keeps a white-box teacher on the same chips, which is not "
            "planned: plan another arm and add the teacher's parameters and one forward pass of it."
        )
    decoder, name = _decoder(config, student)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    if search:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=0))
    sharding.check_batch(mesh, config)
    sharding.check_model(mesh, decoder)
    teacher = projected_cost(config) if config.teacher.kind in API_KINDS else ""
    dtype = config.student.compute_dtype
    shapes = programs.run_shapes(config, decoder, mesh, topology.compute_dtype if dtype == "auto" else dtype)
    held = {
        "parameters": programs.bytes_a_chip(shapes.student.params),
        "optimizer": programs.bytes_a_chip(shapes.state.opt_state),
        "reference": 0 if shapes.reference is None else programs.bytes_a_chip(shapes.reference.params),
        "cache": programs.cache_bytes(programs.a_part(shapes, max(rows_sampled(config)))),
    }
    if config.lora.rank > 0:
        held["adapters"] = programs.bytes_a_chip(shapes.state.params)
    if parts_learnt(config) > 1:
        held["gradients"] = programs.bytes_a_chip(programs.part_sums(shapes)[0])
    progress("sampling")
    others = _sampling(shapes)
    apply = programs.compile_apply(shapes)

    def at(size: int) -> Plan:
        progress(f"the step in micro-batches of {size}")
        update = (programs.compile_gradients(shapes, size), *apply)
        return Plan(topology, dict(mesh.shape), name, config, size, held, others, update, {}, teacher)

    if not search:
        return at(micro_batch(config, sharding.batch_shares(mesh)))
    if topology.chip is None:
        raise InputError("--micro_batch=search needs a TPU topology: a CPU's memory is not known.")
    return largest(shapes, at)


def _sampling(shapes: Shapes) -> tuple[Compiled, ...]:
    """What samples and scores rollouts of each size; the largest come first, under the plain names."""
    rollouts = collections.Counter(rows_sampled(shapes.config))
    found = []
    for rows in sorted(rollouts, reverse=True):
        part, name = programs.a_part(shapes, rows), "{}, {} rows" if found else "{}"
        found += [
            dataclasses.replace(one, name=name.format(one.name, rows), runs=one.runs * rollouts[rows])
            for one in (*programs.compile_sampling(part), *programs.compile_scoring(part))
        ]
    return tuple(found)


def largest(shapes: Shapes, at: Callable[[int], Plan]) -> Plan:
    """The plan of the largest micro-batch whose step fits, by bisection; of the smallest where none does."""
    sizes = micro_batches(shapes.config, sharding.batch_shares(shapes.mesh))
    low, high, best = 0, len(sizes), None  # sizes below `low` fit, those from `high` on do not
    tried: dict[int, bool] = {}
    while low < high:
        middle = (low + high) // 2
        found = at(sizes[middle])
        capacity = found.capacity or 0.0
        tried[sizes[middle]] = all(not one.too_large and found.peak(one) <= capacity for one in found.update)
        if tried[sizes[middle]]:
            best, low = found, middle + 1
        else:
            high = middle
            best = best or (found if middle == 0 else None)
    assert best is not None
    return dataclasses.replace(best, tried=dict(sorted(tried.items())))


def _decoder(config: Config, student: str) -> tuple[DecoderConfig, str]:
    world = config.world
    if world.kind and not student and not config.student.path:
        vocabulary = get_world(world.kind).vocabulary()
        return model_config(world.student_width, world.student_layers, vocab_size=len(vocabulary)), world.kind
    if not student and not config.student.path:
        raise ConfigError("config.student.path is empty; name a folder there, or a published model with --student.")
    return find_student(student, config.student.path), student or config.student.path


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything that the report shows, as plain values."""
    chip = plan.topology.chip
    found = []
    for one in plan.programs:
        time = plan.roofline(one)
        found.append(
            {
                "name": one.name,
                "runs_a_step": one.runs,
                "fits": None if plan.capacity is None else not one.too_large and plan.peak(one) <= plan.capacity,
                "peak_bytes": plan.peak(one),
                "argument_bytes": one.arguments,
                "temporary_bytes": one.temporaries,
                "flops": one.cost.flops,
                "moved_bytes": one.cost.bytes,
                "sent_bytes": one.sent,
                "seconds": None if time is None else dataclasses.asdict(time) | {"bound_by": time.bound_by},
                "compile_seconds": round(one.seconds, 1),
            }
        )
    seconds = plan.step_seconds
    return {
        "topology": plan.topology.name,
        "chips": len(plan.topology.devices),
        "chip": None if chip is None else dataclasses.asdict(chip),
        "mesh": dict(plan.mesh),
        "student": plan.student,
        "responses_a_step": plan.config.rollout.batch_size,
        "slots": plan.config.rollout.slots,
        "response_tokens": plan.config.rollout.max_new_tokens,
        "prompt_tokens": plan.config.data.max_prompt_tokens,
        "micro_batch": plan.micro_batch,
        "micro_batches_tried": {str(size): does for size, does in plan.tried.items()},
        "fits": plan.fits,
        "usable_bytes": plan.capacity,
        "held_bytes": dict(plan.held),
        "programs": found,
        "step_seconds": None if seconds is None else {"at_best": seconds[0], "at_worst": seconds[1]},
        "steps": plan.config.train.steps,
        "hours": None if seconds is None else [value * plan.config.train.steps / 3600 for value in seconds],
        "teacher": plan.teacher,
    }
