"""FLOPs and bytes of a compiled program on one chip, loops counted as often as they run.

FLOPs are those of matrix products (dots and convolutions, which is what a TPU makes of them), two a multiply-add: all
else is small beside them. Bytes are what instructions read from and write to main memory: operands and results of
everything outside a fusion, of a slice only what it touches, nothing of what lies in on-chip memory. An exchange that
a TPU spreads over other work moves its bytes where it begins, and nothing where it is carried on and ended.
"""

from __future__ import annotations

import dataclasses
import re

from omniopd_jax.plan.hlo import Computation, Instruction, Program, Shape

# No bytes of their own: names for what is there, control flow (its bodies are counted), ends of asynchronous pairs.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "iota", "opt-barrier", "add-dependency",
    }
)  # fmt: skip
# What a fusion may hand on in an operand's own buffer: the operand, or an exchange that goes on beside its work.
_HANDED_ON = frozenset({"parameter", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"})
_ALIAS = re.compile(r"\{(\d+)\}: \(\d+, \{\}\)")  # of output_to_operand_aliasing={{1}: (0, {}), …}
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a program, on one chip."""

    flops: float
    bytes: float  # to and from main memory


def cost(program: Program, *, unknown_trips: int = 1) -> Cost:
    """The whole program's cost; `unknown_trips` are the turns of a loop whose end depends on data."""
    flops = moved = 0.0
    for visit in program.visits(unknown_trips=unknown_trips):
        for one in visit.computation.instructions.values():
            flops += visit.times * product_flops(visit.computation, one)
            if not visit.is_fused:
                moved += visit.times * traffic(program, visit.computation, one)
    return Cost(flops, moved)


def product_flops(computation: Computation, one: Instruction) -> float:
    """Two for each multiply-add of a dot or a convolution; 0 for everything else."""
    if one.opcode == "dot":
        left = computation.instructions[one.operands[0]].shapes[0]
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        inner = 1
        for axis in found[1].split(",") if found and found[1] else ():
            inner *= left.dims[int(axis)]
        return 2.0 * one.shapes[0].size * inner
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    return 0.0


def _convolution_flops(computation: Computation, one: Instruction) -> float:
    """Only taps that meet a real element count: a batched product is written as a dilated convolution."""
    left, right = (computation.instructions[name].shapes[0] for name in one.operands[:2])
    labels = _LABELS.search(one.attributes)
    assert labels is not None
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(one.attributes)
    taps = 1
    spatial = sorted(label for label in out_labels if label.isdigit())
    for number, label in enumerate(spatial):
        taps *= _taps(
            window,
            number,
            outputs=one.shapes[0].dims[out_labels.index(label)],
            inputs=left.dims[left_labels.index(label)],
            kernel=right.dims[right_labels.index(label)],
        )
    batch = one.shapes[0].dims[out_labels.index("b")]
    features = one.shapes[0].dims[out_labels.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    return 2.0 * batch * features * right.dims[right_labels.index("i")] * taps / (int(groups[1]) if groups else 1)


def _window(attributes: str) -> dict[str, list[str]]:
    found = _WINDOW.search(attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    return {name: value.split("x") for name, value in fields.items()}


def _taps(window: dict[str, list[str]], axis: int, *, outputs: int, inputs: int, kernel: int) -> int:
    """Pairs (output position, kernel position) of one spatial axis that read a real element."""

    def field(name: str, default: str) -> str:
        return window[name][axis] if name in window else default

    stride, left_dilate, right_dilate = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(field("pad", "0_0").split("_")[0])
    if stride == left_dilate == right_dilate == 1 and low == 0 and inputs - kernel + 1 == outputs:
        return outputs * kernel
    last = (inputs - 1) * left_dilate
    count = 0
    for out in range(outputs):
        for tap in range(kernel):
            at = out * stride + tap * right_dilate - low
            count += 0 <= at <= last and at % left_dilate == 0
    return count


def traffic(program: Program, computation: Computation, one: Instruction) -> float:
    """Bytes that one instruction outside a fusion reads from and writes to main memory."""
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")) or one.opcode in ("async-start",):
        return 0.0
    if one.target == "AllocateBuffer":
        return 0.0
    operands = [computation.instructions[name].shapes for name in one.operands]
    if one.opcode in ("copy-start", "slice-start"):  # (destination, source, …) and ((source), result, …)
        made = one.shapes[0] if one.opcode == "copy-start" else one.shapes[1]
        return float(made.main_bytes + min(made.bytes, sum(shape.main_bytes for shape in operands[0])))
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return float(one.shapes[0].main_bytes + min(one.shapes[0].bytes, operands[0][0].main_bytes))
    if one.opcode == "dynamic-update-slice":
        update = operands[1][0]
        return float(update.main_bytes + (0 if one.shapes[0].is_on_chip else update.bytes))
    if one.opcode == "fusion":
        return _fusion_traffic(program, one, operands)
    results = one.shapes
    if one.opcode in ("collective-permute-start", "all-gather-start"):  # (the operands again, results, …)
        results = results[sum(len(shapes) for shapes in operands) :]
    return float(_main_bytes(results, *operands))


def _main_bytes(*values: tuple[Shape, ...]) -> int:
    return sum(shape.main_bytes for shapes in values for shape in shapes)


def _fusion_traffic(program: Program, one: Instruction, operands: list[tuple[Shape, ...]]) -> float:
    inner = program.computations[str(one.called("calls"))]
    if inner.root.target == "AsyncCollectiveStart":
        return float(_main_bytes(inner.instructions[inner.root.operands[0]].shapes, *operands))
    if inner.root.target == "AsyncCollectiveDone":
        return 0.0
    total = 0.0
    handed_on = _handed_on(inner, one)
    for parameter, shapes in zip(inner.parameters, operands, strict=True):
        read = _read_bytes(program, inner, parameter, handed_on)
        total += sum(min(shape.bytes, read) for shape in shapes if not shape.is_on_chip)
    roots = [inner.instructions[name] for name in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
    for root, shape in zip(roots, one.shapes, strict=False):
        source = inner.behind(root.name, ("bitcast",))
        if source.opcode == "dynamic-update-slice":
            written = inner.instructions[source.operands[1]].shapes[0].bytes
        else:
            written = 0 if root.name in handed_on else shape.bytes
        total += 0 if shape.is_on_chip else written
    return total


def _handed_on(inner: Computation, one: Instruction) -> frozenset[str]:
    """Results of a fusion that it neither reads nor writes.

    A TPU fuses work with an exchange that goes on meanwhile: the exchange's buffers come in and go out again as they
    are, and its bytes were counted where it began.
    """
    if inner.root.opcode != "tuple":
        return frozenset()
    names = [inner.root.operands[int(place)] for place in _ALIAS.findall(one.attributes)]
    return frozenset(name for name in names if inner.instructions[name].opcode in _HANDED_ON)


def _read_bytes(
    program: Program, inner: Computation, value: Instruction, handed_on: frozenset[str] = frozenset()
) -> float:
    """Bytes of a fusion's operand that are touched: of slices their results, of an updated buffer nothing."""
    if value.is_root:  # of a fusion inside the fusion, which reads it as another shape
        return float(value.bytes)
    total = 0.0
    for user in inner.instructions.values():
        for place, name in enumerate(user.operands):
            if name != value.name or user.name in handed_on or (user.is_root and name in handed_on):
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += user.shapes[0].bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue
            elif user.opcode == "bitcast":
                total += _read_bytes(program, inner, user)
            elif user.opcode == "fusion":
                nested = program.computations[str(user.called("calls"))]
                total += _read_bytes(program, nested, nested.parameters[place])
            else:
                return float(value.bytes)
    return total
