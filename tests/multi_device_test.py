"""Sharded equals whole: eight simulated devices in a process of their own, several meshes, against one device.

python tests/multi_device_test.py      prints one JSON object a mesh
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
VOCABULARY = 1016  # no other size of the program is this, or half of it


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["mesh"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_a_sharded_step_equals_that_of_one_device(found, mesh):
    one, many = found["one"], found[mesh]
    assert many["devices"] == 8
    for name, value in one["metrics"].items():
        assert many["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    for name, value in one["gradients"].items():
        assert many["gradients"][name] == pytest.approx(value, rel=1e-5, abs=1e-5 * one["scale"]), name


@pytest.mark.parametrize(("mesh", "shares"), [("fsdp", 8), ("all", 4)])
def test_parameters_and_moments_take_their_share_of_each_device(found, mesh, shares):
    """Norms and key/value heads that do not divide stay whole, hence a little more than the share."""
    share = found[mesh]["bytes_a_device"] / found["one"]["bytes_a_device"]
    assert 1 / shares <= share + 1e-9
    assert share < 1.35 / shares or shares == 1


@pytest.mark.parametrize("mesh", ["all"])
def test_responses_do_not_depend_on_the_mesh(found, mesh):
    assert found[mesh]["tokens"] == found["one"]["tokens"]
    assert found[mesh]["starts"] == found["one"]["starts"]
    assert found[mesh]["branches"] == found["one"]["branches"]


def test_a_checkpoint_of_eight_devices_is_read_on_two_and_on_one(found):
    assert found["all"]["restored_on"] == {"1": True, "2": True}


def test_listed_tokens_stay_with_their_rows(found):
    """Each share of the batch has a list of its own: queries, keys and values find their rows without leaving it.

    The one device that all are compared with computes without lists.
    """
    assert not found["one"]["listed_of"]
    listed, positions = found["all"]["listed_of"]
    assert listed < positions
    gathered = found["all"]["gathered"]
    assert [shape for shape in gathered if listed in shape], "embeddings are gathered, of what is listed"
    assert not [shape for shape in gathered if positions in shape]


def test_the_vocabulary_stays_split_on_a_tensor_axis(found):
    """Widths are gathered, the vocabulary is not: neither the head [D, V] nor the logits of a block [n, V]."""
    gathered = found["all"]["gathered"]
    half = [shape for shape in gathered if VOCABULARY // 2 in shape]
    assert half, "the head's own half is gathered along its width"
    assert not [shape for shape in gathered if VOCABULARY in shape]
    assert found["all"]["reduced_maxima"], "the largest logit is found by all devices together"


def test_an_evaluation_is_split_over_the_devices_however_many_problems_there_are(found):
    """Ten problems on four shares: of ten rows each device would hold them all."""
    one, many = found["one"]["evaluated"], found["all"]["evaluated"]
    assert one["rows"] == [10, 10]
    assert many["rows"] == [12, 3], "rows in all, rows of one device"
    assert many["responses"] == one["responses"]


def test_refilled_slots_stay_split_whatever_the_size_of_their_cache(found):
    one, many = found["one"]["refilled"], found["all"]["refilled"]
    assert many["tokens"] == one["tokens"]
    assert {size for size, _ in one["sizes"]} == {size for size, _ in many["sizes"]}
    sizes = [size for size, _ in many["sizes"]]
    assert sizes != sorted(sizes), "it shrinks as well"
    assert {rows for _, rows in many["sizes"]} == {1}, "of four slots on four shares"


def test_splash_reads_rows_and_keys_that_the_mesh_does_not_divide(found):
    assert found["all"]["splash"] < 1e-5


def main() -> None:
    import tempfile

    import jax
    import jax.numpy as jnp
    import numpy as np

    from configs import base
    from omniopd_jax import models
    from omniopd_jax.config import MeshConfig, from_mapping
    from omniopd_jax.train import batching, sharding
    from omniopd_jax.train.checkpoint import Checkpoints
    from omniopd_jax.train.optimizer import make_optimizer
    from omniopd_jax.train.score import make_student
    from omniopd_jax.train.step import StepOptions, init_state, jit_step, state_shardings, without_trainable
    from omniopd_jax.types import TokenTree

    decoder = models.decoder_config(
        dict(
            architectures=["Qwen3ForCausalLM"], vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=64, rms_norm_eps=1e-6,
            tie_word_embeddings=True, max_position_embeddings=128,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    model = models.init_model(decoder, jax.random.key(0))
    model = model.replace(
        params=jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), model.params)
    )
    reference = model.replace(params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    rows, prompt, width, slots, chunk = 8, 4, 12, 4, 3
    mask = np.arange(width) < rng.integers(6, width + 1, (rows, 1))
    has_branch = np.arange(slots) < np.array([4, 1, 4, 1, 3, 2, 4, 0])[:, None]
    tree = TokenTree(
        prompt_tokens_BxP=rng.integers(0, 64, (rows, prompt)).astype(np.int32),
        prompt_mask_BxP=np.arange(prompt) >= rng.integers(0, prompt, (rows, 1)),
        tokens_BxT=rng.integers(0, 64, (rows, width)).astype(np.int32),
        mask_BxT=mask,
        weight_BxT=np.where(mask, rng.normal(0, 0.01, (rows, width)), 0).astype(np.float32),
        anchor_weight_BxT=np.where(mask, np.float32(0.01), np.float32(0)),
        branch_tokens_BxRxC=rng.integers(0, 64, (rows, slots, chunk)).astype(np.int32),
        branch_mask_BxRxC=np.ones((rows, slots, chunk), bool),
        branch_weight_BxRxC=(rng.normal(0, 0.01, (rows, slots, chunk)) * has_branch[..., None]).astype(np.float32),
        branch_start_BxR=rng.integers(0, 5, (rows, slots)).astype(np.int32),
    )
    values = base.get_config()
    values.rollout.update(batch_size=rows, max_new_tokens=10)
    values.audit.update(num_chunks=2, chunk_tokens=chunk)
    values.objective.update(num_branches=3)
    # SGD in Adam's clothes: with b1 = b2 = 0 and a large eps a parameter changes by g / (|g| + 1), about its gradient
    values.optimizer.update(learning_rate=1.0, warmup_steps=0, b1=0.0, b2=0.0, eps=1.0, clip_norm=0.0)
    config = from_mapping(values)
    optimizer = make_optimizer(config.optimizer, 10)

    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        shardings = state_shardings(mesh, model, optimizer)
        state = init_state(model, optimizer, shardings)
        here = sharding.placed(model, mesh)
        fixed = (without_trainable(here), sharding.placed(reference, mesh))
        jitted = jit_step(
            *fixed,
            optimizer,
            mesh,
            shardings,
            StepOptions(block_tokens=32),
        )
        bytes_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        groups = sharding.batch_shares(mesh)
        packed = tree if name == "one" else batching.pack(tree, groups=groups, list_from=1)
        # tokens that are read, of those a row has
        positions = prompt + packed.tokens_BxT.shape[1] + packed.branch_start_BxR.shape[1] * (chunk - 1)
        listed_of = None if packed.read_UxJxW is None else (packed.read_UxJxW.shape[2], positions)
        trees = batching.to_devices(batching.micro_batches(packed, 1), mesh, axis=1)
        compiled = jitted.lower(state, *fixed, trees, None).compile()
        state, metrics = compiled(state, *fixed, trees, None)
        change = jax.tree.map(
            lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64),
            state.params,
            model.params,
        )
        line = {
            "mesh": name,
            "devices": mesh.size,
            "listed_of": listed_of,
            "bytes_a_device": bytes_a_device,
            "metrics": {key: float(value) for key, value in batching.to_host(metrics).items()},
            # two fixed projections of each parameter's change
            "gradients": {
                f"{jax.tree_util.keystr(path)} {seed}": float(
                    (leaf * np.random.default_rng(seed).normal(size=leaf.shape)).sum() / leaf.size**0.5
                )
                for path, leaf in jax.tree_util.tree_leaves_with_path(change)
                for seed in (0, 1)
            },
            "scale": max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(change)),
        }
        if name in ("one", "all"):
            student = make_student(config, mesh, stop_tokens=(1,), banned_tokens=(0,))
            given = (tree.prompt_tokens_BxP, tree.prompt_mask_BxP, np.arange(rows, dtype=np.int32))
            tokens, mask, index = batching.to_devices(given, mesh)
            at = jnp.int32(0)
            rollout = student.respond(here, tokens, mask, index, at)
            anchors = student.choose(rollout, index, at)
            branches = student.branch(here, rollout, anchors, index, at)
            rollout, anchors, branches = batching.to_host((rollout, anchors, branches))
            line |= {
                "tokens": rollout.tokens_BxT.tolist(),
                "starts": anchors.start_BxM.tolist(),
                "branches": branches.tokens_BxMxGxC.tolist(),
            }
            line["evaluated"] = evaluated(mesh)
            line["refilled"] = refilled(mesh)
        if name == "all":
            line["splash"] = splash_error(mesh)
            program = compiled.as_text().splitlines()
            line["gathered"] = [
                [int(size) for size in re.findall(r"\d+", shape)]
                for instruction in program
                if " all-gather" in instruction
                for shape in re.findall(r"\[([\d,]*)\]", instruction.split(" all-gather")[0])
            ]
            line["reduced_maxima"] = sum(" all-reduce" in row and "reduce_max" in row for row in program)
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = Checkpoints(Path(folder), config, keep=1)
                checkpoints.save(state, {})
                checkpoints.wait()
                line["restored_on"] = {}
                for count in (1, 2):
                    few = sharding.make_mesh(MeshConfig(1, count, 1), jax.devices()[:count])
                    like = init_state(model, optimizer, state_shardings(few, model, optimizer))
                    restored, _ = checkpoints.restore(like)
                    line["restored_on"][count] = all(
                        len(a.sharding.device_set) == count and np.array_equal(a, b)
                        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
                    )
                checkpoints.close()
        print(json.dumps(line), flush=True)


def evaluated(mesh) -> dict:
    """Responses to ten problems, and how many rows were decoded, in all and by one device."""
    import tempfile

    import jax
    import numpy as np

    from omniopd_jax import models
    from omniopd_jax.data import load_tokenizer
    from omniopd_jax.eval import evaluate as evaluation
    from omniopd_jax.train import sharding
    from omniopd_jax.train.small_world import model_config
    from omniopd_jax.worlds import arithmetic

    with tempfile.TemporaryDirectory() as folder:
        arithmetic.save_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    prompts = [problem.prompt(str(i)) for i, problem in enumerate(arithmetic.problems(np.random.default_rng(0), 10, 1))]
    model = models.init_model(model_config(32, 1, vocab_size=tokenizer.vocab_size), jax.random.key(0))
    rows = []

    def sample(*arguments, **settings):
        rollout = sampled(*arguments, **settings)
        rows[:] = [len(rollout.tokens_BxT), len(rollout.entropy_BxT.addressable_shards[0].data)]
        return rollout

    sampled, evaluation.sampler.sample = evaluation.sampler.sample, sample
    done = evaluation.evaluate(
        sharding.placed(model, mesh), tokenizer, prompts, lambda *_: True, temperature=1.0, max_new_tokens=4,
        batch_size=512,
    )  # fmt: skip
    evaluation.sampler.sample = sampled
    return {"rows": rows, "responses": list(done.responses)}


def refilled(mesh) -> dict:
    """Responses from four slots, and (columns, rows of one device) of the caches that they had."""
    import jax
    import numpy as np

    from omniopd_jax import models, prng
    from omniopd_jax.rollout import columns, refill
    from omniopd_jax.rollout.sampler import sample
    from omniopd_jax.train import batching, sharding
    from omniopd_jax.train.small_world import model_config

    model = models.init_model(model_config(32, 1, vocab_size=64), jax.random.key(0))
    sizes = []

    def resized(cache, size):
        cache = columns.resized(cache, size)
        sizes.append((size, len(cache.k[0].addressable_shards[0].data)))
        return cache

    refill.resized, columns.FIRST_SEGMENT = resized, 2  # 2, 4, 8, then 12 tokens
    prompts = (np.full((16, 3), 5, np.int32), np.ones((16, 3), bool))
    keys = prng.row_keys(jax.random.key(1), np.arange(16))
    rollout = sample(
        sharding.placed(model, mesh), *batching.to_devices(prompts, mesh), keys, max_new_tokens=12,
        stop_tokens=tuple(range(2, 12)), slots=4,
    )  # fmt: skip
    refill.resized, columns.FIRST_SEGMENT = columns.resized, 256
    return {"sizes": sizes, "tokens": np.asarray(rollout.tokens_BxT).tolist()}


def splash_error(mesh) -> float:
    """Largest difference to one device, of 3 rows on 4 shares and of one key head on two devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from omniopd_jax.models.kernels import Kernel, kernel_attention
    from omniopd_jax.train import sharding

    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(20) >= np.array([[0], [5], [9]]))
    q, k, v = (jnp.asarray(rng.normal(size=(3, 20, heads, 128)), jnp.float32) for heads in (2, 1, 1))
    whole, split = (
        jax.jit(
            lambda *sides, layout=layout: kernel_attention(
                Kernel("splash", is_interpreted=True), *sides, scale=0.1, layout=layout
            )
        )(q, k, v, mask)
        for layout in (None, sharding.activation_layout(mesh))
    )
    return float(np.abs(np.where(mask[..., None, None], np.asarray(whole) - np.asarray(split), 0)).max())


if __name__ == "__main__":
    main()
