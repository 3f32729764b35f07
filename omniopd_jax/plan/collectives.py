"""What a compiled program sends between chips, by axis of the mesh.

Bytes are those that one chip sends in the usual ring algorithms; for n members of a group and b bytes of the whole
array: all-gather and reduce-scatter b (n − 1) / n, all-reduce twice that, all-to-all b (n − 1) / n, permute b.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from omniopd_jax.plan.hlo import Computation, Instruction, Program, Visit

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_LISTED = re.compile(r"\breplica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"\breplica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?: ?\(([\d,\[\]<=T()]*)\))? ?\{([^}]*)\}")
_PAIRS = re.compile(r"\bsource_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in one place of the program."""

    kind: str
    axis: str  # of the mesh; "data+fsdp" where groups span both, "" where a chip talks to itself
    bytes: float  # that one chip sends, each time
    times: float  # executions in one run of the program
    members: int  # chips in a group


def collectives(program: Program, mesh: Mesh, *, unknown_trips: int = 1) -> list[Collective]:
    """Every collective of a program.

    A compiler that overlaps one with other work may write it several times under one channel; it counts once a loop,
    and in a loop that only carries it on, not at all: there each turn sends a piece of what was begun before the loop.
    """
    found: dict[tuple[str, str], Collective] = {}
    visits = list(program.visits(unknown_trips=unknown_trips))
    begun = _begun(visits)
    for visit in visits:
        for one in visit.computation.instructions.values():
            kind = next((kind for kind in _KINDS if one.opcode in (kind, f"{kind}-start")), None)
            if kind is None:
                continue
            channel = _CHANNEL.search(one.attributes)
            key = (visit.region, channel[1] if channel else f"{visit.computation.name}/{one.name}")
            if channel and visit.region not in begun.get(channel[1], {visit.region}):
                continue
            members, axis = _group(one, mesh)
            if kind == "all-reduce" and "all-reduce-scatter" in visit.computation.name:
                kind = "reduce-scatter"  # a TPU's fusion of an all-reduce with the slice that is kept
            sent = _sent(kind, visit.computation, one, members)
            found[key] = Collective(kind, axis, sent, visit.times, members)
    return list(found.values())


def _begun(visits: list[Visit]) -> dict[str, set[str]]:
    """Channel → the regions in which a TPU begins an exchange that later instructions carry on."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for visit in visits:
        for one in visit.computation.instructions.values():
            if one.target == "AsyncCollectiveStart":
                channel = _CHANNEL.search(visit.computation.instructions[one.operands[0]].attributes)
                if channel:
                    found[channel[1]].add(visit.region)
    return found


def bytes_by_axis(found: list[Collective]) -> dict[str, float]:
    """Bytes that one chip sends in one run, by axis, the largest first."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        if one.bytes:
            total[one.axis] += one.bytes * one.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _sent(kind: str, computation: Computation, one: Instruction, members: int) -> float:
    if members <= 1:
        return 0.0
    operands = sum(shape.bytes for shape in computation.operand_shapes(one))
    share = (members - 1) / members
    if kind == "all-gather":
        return operands * members * share  # the operand is this chip's part
    if kind == "all-reduce":
        return 2 * operands * share
    if kind == "collective-permute":
        return float(operands)
    return operands * share


def _group(one: Instruction, mesh: Mesh) -> tuple[int, str]:
    """(members of a group, the axes along which they differ)."""
    pairs = _PAIRS.search(one.attributes)
    if pairs:
        sources = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        axes = {name for pair in sources for name in _axes(pair, mesh)}
        return 2, "+".join(name for name in mesh.axis_names if name in axes)
    ids = first_group(one.attributes, mesh.size)
    return len(ids), "+".join(_axes(ids, mesh))


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The positions in the mesh of the first group of `replica_groups`, in any of XLA's three spellings."""
    listed = _LISTED.search(attributes)
    if listed:
        first = re.findall(r"\{([\d,]+)\}", listed[1])[0]
        return tuple(int(number) for number in first.split(","))
    iota = _IOTA.search(attributes)
    if iota:
        ids = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(int(number) for number in ids[0])
    named = _NAMED.search(attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = np.arange(math.prod(sizes.values()))
        if named[2]:
            order = re.fullmatch(r"\[?[\d,]*\]?<=\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2])
            ids = _iota(order[1], order[2]).reshape(-1) if order else np.array([int(n) for n in named[2].split(",")])
        ids = ids.reshape(tuple(sizes.values()))
        kept = set(re.findall(r"'([^']+)'", named[3]))
        return tuple(int(n) for n in ids[tuple(slice(None) if name in kept else 0 for name in sizes)].reshape(-1))
    return tuple(range(devices))  # no groups: all devices


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(int(size) for size in dims.split(","))).reshape([int(size) for size in dims.split(",")])
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _axes(ids: tuple[int, ...], mesh: Mesh) -> list[str]:
    places = np.unravel_index(np.asarray(ids), tuple(mesh.shape.values()))
    return [name for name, where in zip(mesh.axis_names, places, strict=True) if len(set(where.tolist())) > 1]
