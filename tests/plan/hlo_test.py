"""Turns of loops, read from programs in which they are known."""

import re

import jax
import jax.numpy as jnp
import pytest

from omniopd_jax.plan import hlo
from omniopd_jax.plan.cost import cost

ROWS, WIDTH, SHARD, SHARDS = 4, 64, 16, 8

# As a TPU's compiler multiplies x with a matrix that lies in eight shards on eight chips: two shards a turn, the next
# ones on their way meanwhile. STEP stands for how the counter goes up.
_BY_SHARDS = """HloModule by_shards, is_scheduled=true

%up (p.0: u32[], p.1: u32[]) -> u32[] {
  %p.1 = u32[] parameter(1)
  %p.0 = u32[] parameter(0)
  ROOT %sum = u32[] add(%p.0, %p.1)
}

%body (carried: (f32[4,64], f32[16,64], f32[4,16], u32[], u32[])) -> (f32[4,64], f32[16,64], f32[4,16], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %one = u32[]{:T(128)} constant(1)
  %carried = (f32[4,64]{1,0}, f32[16,64]{1,0}, f32[4,16]{1,0}, u32[], u32[]) parameter(0)
  %sums = f32[4,64]{1,0} get-tuple-element(%carried), index=0
  %shard = f32[16,64]{1,0} get-tuple-element(%carried), index=1
  %part = f32[4,16]{1,0} get-tuple-element(%carried), index=2
  %counter = u32[]{:T(128)} get-tuple-element(%carried), index=3
  %held = u32[]{:T(128)} get-tuple-element(%carried), index=4
  %data = u32[]{:T(128)} custom-call(%sums), custom_call_target="count"
  %first = f32[4,64]{1,0} dot(%part, %shard), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %second = f32[4,64]{1,0} dot(%part, %shard), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[4,64]{1,0} add(%first, %second)
  STEP
  KEPT
  ROOT %next = (f32[4,64]{1,0}, f32[16,64]{1,0}, f32[4,16]{1,0}, u32[], u32[]) tuple(%sum, %shard, %part, %up, %kept)
}

%condition (carried: (f32[4,64], f32[16,64], f32[4,16], u32[], u32[])) -> pred[] {
  %shards = u32[]{:T(128)} constant(8)
  %carried = (f32[4,64]{1,0}, f32[16,64]{1,0}, f32[4,16]{1,0}, u32[], u32[]) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%carried), index=3
  ROOT %is_below = pred[]{:T(512)} compare(%counter, %shards), direction=LT
}

ENTRY %main (x: f32[4,64], w: f32[16,64], p: f32[4,16]) -> f32[4,64] {
  %x = f32[4,64]{1,0} parameter(0)
  %w = f32[16,64]{1,0} parameter(1)
  %p = f32[4,16]{1,0} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %two.of_entry = u32[]{:T(128)} constant(2)
  %held = (f32[4,64]{1,0}, f32[16,64]{1,0}, f32[4,16]{1,0}, u32[], u32[]) tuple(%x, %w, %p, %zero, %two.of_entry)
  %loop = (f32[4,64]{1,0}, f32[16,64]{1,0}, f32[4,16]{1,0}, u32[], u32[]) while(%held), condition=%condition, body=%body
  ROOT %out = f32[4,64]{1,0} get-tuple-element(%loop), index=0
}
"""


def by_shards(step, kept="%kept = u32[] copy(%held)"):
    return _BY_SHARDS.replace("STEP", step).replace("KEPT", kept)


@pytest.mark.parametrize(
    "step",
    [
        "%up = u32[]{:T(128)} add(%counter, %two)",
        "%up = u32[]{:T(128)} add(%held, %counter)",
        "%copied = u32[] copy(%counter)\n  %up = u32[]{:T(128)} fusion(%copied, %two), kind=kLoop, calls=%up",
        "%half = u32[] add(%counter, %one)\n  %up = u32[]{:T(128)} add(%half, %one)",
    ],
)
def test_a_product_that_is_computed_shard_by_shard_costs_what_it_costs_at_once(step):
    """Two rounds a turn: a loop up to eight that goes up by two turns four times."""
    program = hlo.parse(by_shards(step))
    assert cost(program).flops == 2 * ROWS * WIDTH * SHARD * SHARDS


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("%up = u32[]{:T(128)} add(%counter, %data)", "%kept = u32[] copy(%held)"),
        ("%up = u32[]{:T(128)} add(%counter, %held)", "%kept = u32[] add(%held, %two)"),
    ],
)
def test_turns_of_a_loop_whose_step_depends_on_data_are_given(step, kept):
    program = hlo.parse(by_shards(step, kept))
    assert cost(program, unknown_trips=3).flops == 3 * 2 * (2 * ROWS * WIDTH * SHARD)


@pytest.mark.parametrize(("end", "step"), [(8, 1), (8, 2), (7, 2), (22, 5)])
def test_turns_are_those_that_xla_notes(end, step):
    def count(x):
        return jax.lax.while_loop(lambda s: s[0] < end, lambda s: (s[0] + step, jnp.sin(s[1])), (0, x))[1]

    text = jax.jit(count).lower(jnp.ones(())).compile().as_text()
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert without != text
    assert _turns(without) == _turns(text) == len(range(0, end, step))


def _turns(text: str) -> int | None:
    program = hlo.parse(text)
    (found,) = [
        program.trips(computation, one)
        for computation in program.computations.values()
        for one in computation.instructions.values()
        if one.opcode == "while"
    ]
    return found
