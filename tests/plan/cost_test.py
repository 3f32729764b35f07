"""Bytes of programs as a TPU's compiler writes them, against the same work written plainly."""

import pytest

from omniopd_jax.plan import hlo
from omniopd_jax.plan.cost import cost

SHARD, WHOLE = 16 * 128 * 4, 32 * 128 * 4  # bytes

# A loop whose every turn does WORK on x, and an all-gather that goes on meanwhile: begun before the loop, its buffers
# handed from turn to turn beside the work, and ended after.
_SPREAD = """HloModule spread, is_scheduled=true

%begin () -> () {
  %p.0 = SHARD parameter(0)
  %gather.0 = WHOLE all-gather(%p.0), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %begun = (SHARD, WHOLE, FLAG) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%on () -> () {
  %x = SHARD parameter(3)
  %shard = SHARD parameter(0)
  %work = SHARD WORK
  %p.2 = WHOLE parameter(1)
  %gather.1 = WHOLE all-gather(%shard), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
  %p.3 = FLAG parameter(2)
  ROOT %all = (SHARD, SHARD, WHOLE, WHOLE, FLAG) tuple(%work, %shard, %p.2, %gather.1, %p.3)
}

%end () -> () {
  %p.5 = SHARD parameter(0)
  %p.6 = WHOLE parameter(1)
  %gather.2 = WHOLE all-gather(%p.5), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
  %p.7 = FLAG parameter(2)
  ROOT %ended = WHOLE custom-call(%p.5, %p.6, %gather.2, %p.7), custom_call_target="AsyncCollectiveDone"
}

%body () -> () {
  %s.0 = (SHARD, SHARD, WHOLE, FLAG) parameter(0)
  %x.0 = SHARD get-tuple-element(%s.0), index=0
  %shard.0 = SHARD get-tuple-element(%s.0), index=1
  %whole.0 = WHOLE get-tuple-element(%s.0), index=2
  %flag.0 = FLAG get-tuple-element(%s.0), index=3
  %all.0 = (SHARD, SHARD, WHOLE, WHOLE, FLAG) fusion(%shard.0, %whole.0, %flag.0, %x.0), kind=kLoop, ALIAS, calls=%on
  %x.1 = SHARD get-tuple-element(%all.0), index=0
  %shard.1 = SHARD get-tuple-element(%all.0), index=1
  %whole.1 = WHOLE get-tuple-element(%all.0), index=3
  %flag.1 = FLAG get-tuple-element(%all.0), index=4
  ROOT %next = (SHARD, SHARD, WHOLE, FLAG) tuple(%x.1, %shard.1, %whole.1, %flag.1)
}

%condition () -> () {
  %s.1 = (SHARD, SHARD, WHOLE, FLAG) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main () -> () {
  %x.2 = SHARD parameter(0)
  %w = SHARD parameter(1)
  %start = (SHARD, WHOLE, FLAG) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %shard.2 = SHARD get-tuple-element(%start), index=0
  %whole.2 = WHOLE get-tuple-element(%start), index=1
  %flag.2 = FLAG get-tuple-element(%start), index=2
  %state = (SHARD, SHARD, WHOLE, FLAG) tuple(%x.2, %shard.2, %whole.2, %flag.2)
  %loop = (SHARD, SHARD, WHOLE, FLAG) while(%state), condition=%condition, body=%body
  %shard.3 = SHARD get-tuple-element(%loop), index=1
  %whole.3 = WHOLE get-tuple-element(%loop), index=2
  %flag.3 = FLAG get-tuple-element(%loop), index=3
  ROOT %out = WHOLE fusion(%shard.3, %whole.3, %flag.3), kind=kCustom, calls=%end
}
"""

# The same exchange at once, and the same work alone.
_AT_ONCE = """HloModule at_once, is_scheduled=true

%body () -> () {
  %s.0 = (SHARD, SHARD) parameter(0)
  %x = SHARD get-tuple-element(%s.0), index=0
  %shard = SHARD get-tuple-element(%s.0), index=1
  %work = SHARD WORK
  ROOT %next = (SHARD, SHARD) tuple(%work, %shard)
}

%condition () -> () {
  %s.1 = (SHARD, SHARD) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main () -> () {
  %x.2 = SHARD parameter(0)
  %w = SHARD parameter(1)
  %whole = WHOLE all-gather(%w), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
  %state = (SHARD, SHARD) tuple(%x.2, %w)
  %loop = (SHARD, SHARD) while(%state), condition=%condition, body=%body
  ROOT %out = WHOLE copy-done(%whole)
}
"""

_TYPES = {
    "SHARD": "f32[16,128]{1,0}",
    "WHOLE": "f32[32,128]{1,0}",
    "FLAG": "u32[]{:S(2)}",
    "ALIAS": "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}",
}


def _bytes(text: str, turns: int, **named: str) -> float:
    for name, meant in (_TYPES | named).items():
        text = text.replace(name, meant)
    return cost(hlo.parse(text), unknown_trips=turns).bytes


@pytest.mark.parametrize("turns", [1, 7])
@pytest.mark.parametrize("work", ["exponential(%x)", "add(%x, %shard)"])
def test_an_exchange_that_goes_on_beside_a_loop_moves_as_much_as_at_once(work, turns):
    """Its buffers, handed from turn to turn, move nothing; what the loop's own work reads of them counts."""
    operands = 2 if "shard" in work else 1
    expected = SHARD + WHOLE + turns * (operands + 1) * SHARD
    assert _bytes(_SPREAD, turns, WORK=work) == _bytes(_AT_ONCE, turns, WORK=work) == expected


def test_an_exchange_of_what_lies_on_chip_moves_nothing_in_main_memory():
    on_chip = _bytes(_SPREAD, 7, WORK="exponential(%x)", WHOLE="f32[32,128]{1,0:T(8,128)S(1)}")
    assert _bytes(_SPREAD, 7, WORK="exponential(%x)") - on_chip == WHOLE


# A layer's product with its matrix of a stack, as a fusion of fusions: READ is what the inner one makes of the stack.
_LAYER = """HloModule layer, is_scheduled=true

%read (p.0: f32[28,64,128], p.1: s32[]) -> f32[MATRIX] {
  %p.0 = f32[28,64,128]{2,1,0} parameter(0)
  %p.1 = s32[]{:T(128)S(1)} parameter(1)
  %zero = s32[] constant(0)
  READ
}

%product (p.2: f32[64], p.3: s32[], p.4: f32[28,64,128]) -> f32[128] {
  %p.2 = f32[4,64]{1,0} parameter(0)
  %p.3 = s32[]{:T(128)S(1)} parameter(1)
  %p.4 = f32[28,64,128]{2,1,0} parameter(2)
  %matrix = f32[MATRIX] fusion(%p.4, %p.3), kind=kLoop, calls=%read
  ROOT %dot = f32[4,128]{1,0} dot(%p.2, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[4,64], at: s32[], w: f32[28,64,128]) -> f32[4,128] {
  %x = f32[4,64]{1,0} parameter(0)
  %at = s32[]{:T(128)S(1)} parameter(1)
  %w = f32[28,64,128]{2,1,0} parameter(2)
  ROOT %y = f32[4,128]{1,0} fusion(%x, %at, %w), kind=kOutput, calls=%product
}
"""


@pytest.mark.parametrize(
    ("matrix", "read", "layers"),
    [
        (
            "64,128",
            "%piece = f32[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,128}\n"
            "  ROOT %matrix = f32[64,128]{1,0} bitcast(%piece)",
            1,
        ),
        ("1792,128", "ROOT %matrix = f32[1792,128]{1,0} bitcast(%p.0)", 28),
        ("28,64,128", "ROOT %matrix = f32[28,64,128]{2,1,0} negate(%p.0)", 28),
    ],
)
def test_a_fusion_within_a_fusion_reads_what_it_touches(matrix, read, layers):
    """A slice of a stack, or all of it under another shape."""
    program = hlo.parse(_LAYER.replace("MATRIX", matrix).replace("READ", read))
    x, y = 4 * 64 * 4, 4 * 128 * 4
    assert cost(program).bytes == x + layers * 64 * 128 * 4 + y


_SEND = """HloModule send, is_scheduled=true

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0} parameter(0)
  %room = f32[16,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  SEND
}
"""


@pytest.mark.parametrize(
    "send",
    [
        "ROOT %y = f32[16,128]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
        "%sent = (f32[16,128]{1,0}, f32[16,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)\n"
        "  ROOT %y = f32[16,128]{1,0} collective-permute-done(%sent)",
    ],
)
def test_what_is_sent_is_read_once_and_written_once(send):
    """Begun and ended apart, or at once; room that nobody has written to moves nothing."""
    program = hlo.parse(_SEND.replace("SEND", send))
    assert cost(program).bytes == pytest.approx(2 * SHARD, abs=16)  # and a flag or two
