"""A plan as text: what a person wants to know before paying."""

from __future__ import annotations

import json
from pathlib import Path

from omniopd_jax.config import Config
from omniopd_jax.plan.planner import Plan
from omniopd_jax.plan.programs import Compiled
from omniopd_jax.train.pipeline import parts_audited, parts_learnt, rows_decoded, rows_sampled
from omniopd_jax.types import InputError

_GIB = 2**30


def render(plan: Plan) -> str:
    """The whole report, one paragraph a question."""
    return "\n\n".join(
        part for part in (_head(plan), _memory(plan), _programs(plan), _time(plan), plan.teacher) if part
    )


def _head(plan: Plan) -> str:
    config = plan.config
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    audit = config.audit
    at_a_time = rows_decoded(config)
    slots = f", {at_a_time} decoded at a time" if at_a_time < max(rows_sampled(config)) else ""
    lines = [
        f"{plan.student} on {plan.topology.name}: {len(plan.topology.devices)} chips, mesh {mesh}",
        f"{config.rollout.batch_size} responses a step of up to {config.rollout.max_new_tokens} tokens{slots}; prompts "
        f"of up to {config.data.max_prompt_tokens}; M={audit.num_chunks}, C={audit.chunk_tokens}, "
        f"N={audit.num_continuations}; {_parts(config)}micro-batches of {plan.micro_batch}",
    ]
    if plan.tried:
        tried = ", ".join(f"{size} {'fits' if does else 'does not fit'}" for size, does in plan.tried.items())
        fitting = [size for size, does in plan.tried.items() if does]
        lines.append(f"largest micro-batch that fits: {max(fitting) if fitting else 'none'} (tried: {tried})")
    return "\n".join(lines)


def _parts(config: Config) -> str:
    if parts_audited(config) == 1:
        return ""
    sampled = " + ".join(map(str, rows_sampled(config)))
    return (
        f"{parts_audited(config)} parts, {sampled} responses sampled together, learnt from in {parts_learnt(config)}; "
    )


def _memory(plan: Plan) -> str:
    lines = ["GiB a chip"]
    lines += [f"  {name:<36}{_figure(size / _GIB):>10}" for name, size in plan.held.items()]
    for one in plan.programs:
        lines.append(f"  {'temporaries, ' + one.name:<36}{_number(one.temporaries / _GIB, one):>10}")
    worst = max(plan.programs, key=plan.peak)
    lines.append(f"  {'peak':<36}{_figure(plan.peak(worst) / _GIB):>10}  ({worst.name})")
    if plan.capacity is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"  {'usable':<36}{_figure(plan.capacity / _GIB):>10}  → {verdict}")
    return "\n".join(lines)


def _programs(plan: Plan) -> str:
    lines = [f"{'a chip, a step':<28}{'TFLOP':>10}{'GB moved':>10}  {'GB sent by axis':>40}{'compiled in':>13}"]
    for one in plan.programs:
        sent = ", ".join(f"{axis} {_figure(size * one.runs / 1e9)}" for axis, size in one.sent.items()) or "–"
        lines.append(
            f"  {one.name:<26}{_number(one.cost.flops * one.runs / 1e12, one):>10}"
            f"{_number(one.cost.bytes * one.runs / 1e9, one):>10}  {sent:>40}{one.seconds:>11.0f} s"
        )
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    chip, seconds = plan.topology.chip, plan.step_seconds
    if chip is None:
        return "No roofline: nothing is known of this CPU."
    if seconds is None:
        return "No time is estimated for a run that does not fit."
    lines = [f"{'seconds':<28}{'compute':>10}{'memory':>10}{'network':>10}{'bound by':>12}"]
    for one in plan.programs:
        time = plan.roofline(one)
        assert time is not None
        lines.append(
            f"  {one.name:<26}{time.compute:>10.2f}{time.memory:>10.2f}{time.network:>10.2f}{time.bound_by:>12}"
        )
    steps = plan.config.train.steps
    lines.append(
        f"a step: {seconds[0]:.1f} s where all overlaps, {seconds[1]:.1f} s where nothing does; {steps} steps: "
        f"{seconds[0] * steps / 3600:.1f} to {seconds[1] * steps / 3600:.1f} hours, without the teacher and the host"
    )
    lines.append(
        f"{chip.name}: {chip.peak_flops / 1e12:g} TFLOP/s bfloat16, {chip.memory_bandwidth / 1e9:g} GB/s memory, "
        f"{chip.link_bandwidth / 1e9:g} GB/s along one dimension of the torus ({chip.source}). Assumed: every response "
        "is of full length, each step of the decoding loop reads its widest cache, products run at peak."
    )
    return "\n".join(lines)


def _number(value: float, one: Compiled) -> str:
    return "?" if one.too_large else _figure(value)


def _figure(value: float) -> str:
    """Two decimals, fewer of large and as many as it takes of small numbers."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def _table_row(found: dict) -> str:
    """One line of the table in docs/scale.md from a plan's JSON."""
    held, programs = found["held_bytes"], {one["name"]: one for one in found["programs"]}
    step, decode = programs.get("step") or programs["gradients"], programs.get("decode", {})
    peak = max(one["peak_bytes"] for one in found["programs"])
    kinds = [held[name] / _GIB for name in ("parameters", "optimizer", "reference", "cache")]
    seconds = found["step_seconds"]
    sent = sum(size * one["runs_a_step"] for one in found["programs"] for size in one["sent_bytes"].values())
    cells = [
        found["student"].rstrip("/").split("/")[-1],
        found["topology"],
        "×".join(str(size) for size in found["mesh"].values()),
        f"{found['responses_a_step']} / {found['micro_batch']}",
        " + ".join(f"{kind:.2f}" for kind in kinds),
        f"{step['temporary_bytes'] / _GIB:.1f} / {decode.get('temporary_bytes', 0) / _GIB:.1f}",
        f"{peak / _GIB:.1f} of {found['usable_bytes'] / _GIB:.1f}" if found["usable_bytes"] else f"{peak / _GIB:.1f}",
        {True: "yes", False: "**no**", None: "–"}[found["fits"]],
        f"{sum(one['flops'] * one['runs_a_step'] for one in found['programs']) / 1e12:,.0f}",
        f"{sent / 1e9:.1f}",
        f"{seconds['at_best']:.0f}–{seconds['at_worst']:.0f}" if seconds else "–",
    ]
    return "| " + " | ".join(cells) + " |"


_TABLE_HEAD = (
    "| student | slice | data×fsdp×tensor | responses / micro-batch | parameters + optimizer + reference + cache, GiB "
    "| temporaries of step / decoding, GiB | peak, GiB | fits | TFLOP | GB sent | seconds |\n" + "|---" * 11 + "|"
)


def table(folder: Path) -> str:
    """The plans of a folder in JSON (`planner.to_json`), one row each, by file name.

    Raises:
      InputError: none there, or a file that is no plan.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows.append(_table_row(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--table: {path} is no plan that --json wrote ({error!r}).") from error
    if not rows:
        raise InputError(f"--table={folder} holds no *.json files of plans.")
    return "\n".join([_TABLE_HEAD, *rows])
