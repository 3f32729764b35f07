"""Collectives, FLOPs and loops read from compiled programs whose contents are known.

python tests/plan/collectives_test.py      prints one JSON object; it wants eight devices
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd_jax.plan.collectives import first_group

ROOT = Path(__file__).resolve().parents[2]
TURNS, ROWS, WIDTH = 3, 16, 128
WHOLE = ROWS * WIDTH * 4  # bytes of the array that each device holds


# An exchange as a TPU's compiler spreads it over a loop: begun before, a piece sent each turn, and ended after.
_SPREAD = """HloModule spread, is_scheduled=true

%begin (p.0: f32[16,128]) -> (f32[16,128], f32[32,128]) {
  %p.0 = f32[16,128]{1,0} parameter(0)
  %gather.0 = f32[32,128]{1,0} all-gather(%p.0), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %begun = (f32[16,128]{1,0}, f32[32,128]{1,0}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%carry_on (p.1: f32[16,128]) -> f32[32,128] {
  %p.1 = f32[16,128]{1,0} parameter(0)
  ROOT %gather.1 = f32[32,128]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
}

%body (s.0: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %s.0 = (s32[], f32[16,128]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%s.0), index=0
  %shard = f32[16,128]{1,0} get-tuple-element(%s.0), index=1
  %piece = f32[32,128]{1,0} fusion(%shard), kind=kLoop, calls=%carry_on
  %own = f32[16,128]{1,0} collective-permute(%shard), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], f32[16,128]{1,0}) tuple(%turn, %own)
}

%condition (s.1: (s32[], f32[16,128])) -> pred[] {
  %s.1 = (s32[], f32[16,128]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %started = (f32[16,128]{1,0}, f32[32,128]{1,0}) fusion(%x), kind=kLoop, calls=%begin
  %state = (s32[], f32[16,128]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[16,128]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[16,128]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "kind", "axis", "members", "sent"),
    [
        ("psum", "all-reduce", "data", 2, 2 * WHOLE * 1 / 2),
        ("psum over two", "all-reduce", "data+tensor", 4, 2 * WHOLE * 3 / 4),
        ("all_gather", "all-gather", "fsdp", 2, 2 * WHOLE * 1 / 2),
        ("psum_scatter", "reduce-scatter", "tensor", 2, WHOLE * 1 / 2),
        ("all_to_all", "all-to-all", "data", 2, WHOLE * 1 / 2),
        ("ppermute", "collective-permute", "fsdp", 2, WHOLE),
    ],
)
def test_each_collective_has_its_kind_axis_and_bytes(found, name, kind, axis, members, sent):
    """Ring algorithms: what one chip sends, in a loop of three turns."""
    (only,) = [one for one in found[name] if one["bytes"]]
    assert (only["kind"], only["axis"], only["members"]) == (kind, axis, members)
    assert only["bytes"] == sent
    assert only["times"] == TURNS


def test_an_exchange_that_a_loop_carries_on_is_sent_once(found):
    """And one of the loop's own in every turn."""
    assert {one["kind"]: one["times"] for one in found["spread"]} == {"all-gather": 1, "collective-permute": TURNS}


def test_flops_count_every_turn_of_nested_loops(found):
    """Two a multiply-add; XLA's own analysis counts a loop's body once."""
    assert found["products"]["flops"] == 2 * 8 * 32 * 16 * TURNS * 5
    assert found["products"]["xla"] < found["products"]["flops"]


def test_turns_that_depend_on_data_are_given(found):
    assert found["until"]["flops"] == 2 * 8 * 8 * 8 * 7


def test_a_product_whose_width_is_split_is_summed_over_that_axis_alone(found):
    """What the compiler inserts by itself: x[data, fsdp] · w[fsdp, tensor] is a partial sum on each device."""
    assert found["implicit"] == {"fsdp": 2 * (8 // 2) * (32 // 2) * 4 * 1 / 2}


def test_activations_lie_by_sequences(found):
    """Under FSDP weights are gathered. Left to itself the compiler splits the activations' width as it finds the
    weights split, and sums them over all chips after every product."""
    assert found["laid out"] < found["left alone"] / 10


@pytest.mark.parametrize(
    ("spelling", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", (0, 1)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", (0, 1, 4, 5)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}, x", (0, 1, 4, 5)),
        ("replica_groups={}, x", tuple(range(8))),
    ],
)
def test_the_spellings_of_replica_groups(spelling, group):
    assert first_group(spelling, 8) == group


def main() -> None:
    import dataclasses
    import functools

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as Spec

    from configs import base
    from omniopd_jax import models
    from omniopd_jax.config import MeshConfig, from_mapping
    from omniopd_jax.plan import hlo
    from omniopd_jax.plan.collectives import bytes_by_axis, collectives
    from omniopd_jax.plan.cost import cost
    from omniopd_jax.plan.programs import run_shapes
    from omniopd_jax.train import sharding

    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    swap = [(0, 1), (1, 0)]

    def gather(x):
        return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)[:ROWS]

    def scatter(x):
        part = jax.lax.psum_scatter(x, "tensor", scatter_dimension=0, tiled=True)
        return jnp.concatenate([part, part])

    bodies = {
        "psum": lambda x: jax.lax.psum(x, "data"),
        "psum over two": lambda x: jax.lax.psum(x, ("data", "tensor")),
        "all_gather": gather,
        "psum_scatter": scatter,
        "all_to_all": lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
        "ppermute": lambda x: jax.lax.ppermute(x, "fsdp", swap),
    }
    found = {}
    shape = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=sharding.replicated(mesh))
    for name, body in bodies.items():

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=Spec(), out_specs=Spec(), check_vma=False)
        def loop(x, body=body):
            return jax.lax.fori_loop(0, TURNS, lambda _, y: jnp.sin(body(y)), x)

        text = jax.jit(loop).lower(shape).compile().as_text()
        found[name] = [dataclasses.asdict(one) for one in collectives(hlo.parse(text), mesh)]

    spread = collectives(hlo.parse(_SPREAD), mesh, unknown_trips=TURNS)
    found["spread"] = [dataclasses.asdict(one) for one in spread]

    def products(x, w):
        def outer(y, _):
            return jax.lax.scan(lambda z, _: (jnp.tanh(z @ w)[:, :16] + z, None), y, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=TURNS)[0]

    compiled = jax.jit(products).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (16, 32)))).compile()
    found["products"] = {
        "flops": cost(hlo.parse(compiled.as_text())).flops,
        "xla": compiled.cost_analysis()["flops"],
    }

    def until(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 100, lambda y: jnp.abs(y @ y) + 1, x)

    text = jax.jit(until).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    found["until"] = {"flops": cost(hlo.parse(text), unknown_trips=7).flops}

    def split(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, Spec(*axes)))

    where = NamedSharding(mesh, Spec("data", "tensor"))
    x, w = split((8, 64), "data", "fsdp"), split((64, 32), "fsdp", "tensor")
    text = jax.jit(jnp.matmul, out_shardings=where).lower(x, w).compile().as_text()
    found["implicit"] = bytes_by_axis(collectives(hlo.parse(text), mesh))

    decoder = models.decoder_config(
        dict(
            architectures=["Qwen3ForCausalLM"], vocab_size=64, hidden_size=64, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, tie_word_embeddings=True,
        )
    )  # fmt: skip
    fsdp = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    values = from_mapping(base.get_config())
    laid_out = run_shapes(values, decoder, fsdp, "float32").student
    left_alone = laid_out.replace(module=laid_out.module.clone(layout=None))
    rows = sharding.batch_sharding(fsdp, axis=1)  # micro-batches one after the other, as a step has them
    tokens = jax.ShapeDtypeStruct((2, 16, 64), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((2, 16, 64), bool, sharding=rows)
    for name, model in (("laid out", laid_out), ("left alone", left_alone)):

        @jax.jit
        def read(model, tokens, mask):
            return jax.lax.map(lambda prompts: jnp.sum(models.read(model, *prompts)[0]), (tokens, mask))

        inside = collectives(hlo.parse(read.lower(model, tokens, mask).compile().as_text()), fsdp)
        found[name] = bytes_by_axis(inside)["fsdp"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
