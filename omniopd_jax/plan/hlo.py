"""A compiled program's HLO text as data: its computations, what they call, and how often each is executed.

XLA's own cost analysis counts the body of a loop once; here every loop counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# Bytes of one element. Sub-byte types count as one byte.
_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_COPIES = ("copy", "bitcast", "copy-done", "copy-start")
_TARGET = re.compile(r'\bcustom_call_target="(\w+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array on one device."""

    dtype: str
    dims: tuple[int, ...]
    is_on_chip: bool  # in the chip's fast memory (a TPU's VMEM, memory space 1) and not in its main memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * _BYTES.get(self.dtype, 0)  # tokens and opaque values are nothing

    @property
    def main_bytes(self) -> int:
        """Bytes in the device's main memory."""
        return 0 if self.is_on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name = shapes opcode(operands), attributes."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # more than one where the result is a tuple
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses, for constants and parameters
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def target(self) -> str:
        """What a custom call calls; nothing for other instructions."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    def called(self, kind: str) -> str | None:
        """The computation that an attribute names (calls, to_apply, body, condition)."""
        for key, name in _CALLED.findall(self.attributes):
            if key == kind:
                return name
        return None

    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional."""
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        names = [self.called("true_computation"), self.called("false_computation")]
        return tuple(name for name in names if name)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in the order of execution."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.instructions.values()) if one.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order of the operands that they stand for."""
        return sorted((one for one in self.instructions.values() if one.opcode == "parameter"), key=_number)

    def behind(self, name: str, opcodes: tuple[str, ...]) -> Instruction:
        """The instruction whose value this is, seen through those of the given opcodes."""
        one = self.instructions[name]
        while one.opcode in opcodes:
            one = self.instructions[one.operands[0]]
        return one

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Shapes of the operands, tuples flattened."""
        return [shape for name in instruction.operands for shape in self.instructions[name].shapes]


@dataclasses.dataclass(frozen=True)
class Visit:
    """A computation as it is executed from one place."""

    computation: Computation
    times: float  # executions of the computation in one run of the program
    region: str  # the loop body (or the entry) that it belongs to
    is_fused: bool  # part of a fusion: what lies between its instructions never reaches main memory


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled module by name, and the entry's."""

    computations: dict[str, Computation]
    entry: str

    def visits(self, *, unknown_trips: int = 1) -> Iterator[Visit]:
        """Every computation that is executed, once for each place that executes it.

        Args:
          unknown_trips: turns of a loop whose end depends on data (the decoding loop).
        """
        yield from self._visit(self.entry, 1.0, self.entry, False, unknown_trips)

    def _visit(self, name: str, times: float, region: str, is_fused: bool, unknown_trips: int) -> Iterator[Visit]:
        computation = self.computations[name]
        yield Visit(computation, times, region, is_fused)
        for one in computation.instructions.values():
            if one.opcode == "while":
                turns = self.trips(computation, one)
                body = one.called("body")
                assert body is not None
                inside = times * (unknown_trips if turns is None else turns)
                yield from self._visit(body, inside, body, False, unknown_trips)
            elif one.opcode == "conditional":
                for branch in one.branches():
                    yield from self._visit(branch, times, region, is_fused, unknown_trips)
            elif one.opcode == "call" and one.called("to_apply"):
                yield from self._visit(str(one.called("to_apply")), times, region, is_fused, unknown_trips)
            elif one.called("calls"):  # fusions, and what an async-start wraps
                fused = is_fused or one.opcode == "fusion"
                yield from self._visit(str(one.called("calls")), times, region, fused, unknown_trips)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Turns of a while loop; None where they depend on data.

        Known where XLA has noted them, and where the loop counts up to a constant in equal steps. A step is not always
        one: a TPU's compiler may multiply with a gathered matrix shard by shard, as the shards arrive from its
        neighbours, and then takes two rounds of them a turn.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[str(loop.called("condition"))]
        root = condition.root
        if root.opcode == "fusion":  # the comparison alone, wrapped
            inner = self.computations[str(root.called("calls"))].root
            if inner.opcode != "compare" or len(root.operands) != 2:
                return None
            attributes = inner.attributes
        else:
            attributes = root.attributes
            if root.opcode != "compare":
                return None
        if "direction=LT" not in attributes:
            return None
        start, end = (self._value(computation, loop, condition, name) for name in root.operands)
        step = self._step(computation, loop, condition, root.operands[0])
        return -(-(end - (start or 0)) // step) if end is not None and step else None

    def _value(self, outer: Computation, loop: Instruction, inside: Computation, name: str) -> int | None:
        """An integer that the loop's condition or body reads: a constant, or one that the loop's tuple starts with."""
        place = _place(inside, name)
        if place is None:
            return self._integer(inside, name, {})
        carried = outer.instructions[loop.operands[0]]
        return self._integer(outer, carried.operands[place], {}) if carried.opcode == "tuple" else None

    def _step(self, outer: Computation, loop: Instruction, condition: Computation, name: str) -> int | None:
        """What each turn adds to the counter that the loop's condition calls `name`."""
        place, body = _place(condition, name), self.computations[str(loop.called("body"))]
        if place is None or body.root.opcode != "tuple":
            return None
        given: dict[str, int | None] = {}
        for other in body.instructions:
            at = _place(body, other)
            if at == place:
                given[other] = 0
            elif at is not None:  # known where each turn hands it on as it was
                is_kept = _place(body, body.behind(body.root.operands[at], _COPIES).name) == at
                given[other] = self._value(outer, loop, body, other) if is_kept else None
        return self._integer(body, body.root.operands[place], given)

    def _integer(self, computation: Computation, name: str, given: Mapping[str, int | None]) -> int | None:
        """What an instruction computes from constants and the `given` instructions; None where that is not known."""
        if name in given:
            return given[name]
        one = computation.instructions[name]
        if one.opcode == "constant":
            return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
        if one.opcode in _COPIES:
            return self._integer(computation, one.operands[0], given)
        if one.opcode not in ("add", "fusion") or math.prod(shape.size for shape in one.shapes) != 1:
            return None
        values = [self._integer(computation, operand, given) for operand in one.operands]
        if one.opcode == "fusion":
            inner = self.computations[str(one.called("calls"))]
            names = [parameter.name for parameter in inner.parameters]
            return self._integer(inner, inner.root.name, dict(zip(names, values, strict=True)))
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None


def _number(parameter: Instruction) -> int:
    return int(parameter.literal)


def _place(inside: Computation, name: str) -> int | None:
    """Which element of a loop's tuple an instruction of its condition or body stands for; None: none of them."""
    one = inside.instructions[name]
    found = re.search(r"index=(\d+)", one.attributes)
    if one.opcode != "get-tuple-element" or found is None:
        return None
    return int(found[1]) if inside.instructions[one.operands[0]].opcode == "parameter" else None


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, instructions = "", "", {}
    for line in text.splitlines():
        if line.startswith("}"):
            computations[current] = Computation(current, instructions)
            current = ""
        elif current:
            one = _instruction(line)
            if one is not None:
                instructions[one.name] = one
        else:
            header = _HEADER.match(line)
            if header:
                current, instructions = header[2], {}
                entry = current if header[1] else entry
    return Program(computations, entry)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Every array that a type names: `f32[2,3]{1,0:T(8,128)S(1)}`, or a tuple of such."""
    return tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), "S(1)" in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    return Instruction(
        name=start[2],
        opcode=line[end:opening].strip(),
        shapes=shapes_of(line[at:end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=line[closing + 1 :],
        is_root=bool(start[1]),
    )


def _closing(line: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis: {line[:80]}")
