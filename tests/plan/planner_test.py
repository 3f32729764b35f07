"""A plan end to end: shapes alone, the programs of a run, their memory, and what cannot be planned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base, tiny
from omniopd_jax.config import ConfigError, from_mapping
from omniopd_jax.models import parameters
from omniopd_jax.plan import planner, report, topology
from omniopd_jax.plan.students import PUBLISHED, find_student
from omniopd_jax.plan.topology import TopologyError
from omniopd_jax.types import InputError

ROOT = Path(__file__).resolve().parents[2]

TINY = (
    "--config=configs/tiny.py",
    "--topology=cpu:8",
    "--config.world.student_layers=1",
    "--config.world.student_width=48",
    "--config.data.max_prompt_tokens=16",
    "--config.mesh.tensor=2",
)


def _run(*flags: str, timeout: int = 900) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *flags],
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans") / "made" / "by it"
    done = _run(*TINY, f"--json={folder / 'tiny.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "tiny.json").read_text()), folder


def test_the_report_says_what_is_asked(planned):
    text, found, _ = planned
    assert text.startswith("arithmetic on cpu:8: 8 chips, mesh data 1 × fsdp 4 × tensor 2")
    for word in ("parameters", "optimizer", "reference", "cache", "peak", "TFLOP", "GB sent", "No roofline"):
        assert word in text
    assert [one["name"] for one in found["programs"]] == ["prefill", "decode", "step"]
    assert found["fits"] is None


def test_a_batch_in_parts_is_planned_in_parts(planned, tmp_path):
    _, whole, _ = planned
    parts = ("--config.rollout.batch_size=16", "--config.pipeline.micro_batches=4")  # rollouts of 4, 4 and 8
    done = _run(*TINY, *parts, f"--json={tmp_path / 'parts.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "parts.json").read_text())
    runs = {one["name"]: one["runs_a_step"] for one in found["programs"]}
    assert runs == {
        "prefill": 1, "decode": 1, "prefill, 4 rows": 2, "decode, 4 rows": 2, "gradients": 4, "update": 1,
    }  # fmt: skip
    assert found["micro_batch"] == whole["micro_batch"] / 2
    held, programs = found["held_bytes"], {one["name"]: one for one in found["programs"]}
    assert held["gradients"] == held["parameters"], "float32, as the parameters"
    beside = {"gradients": held["optimizer"], "update": held["reference"]}
    for name, others in beside.items():
        one = programs[name]
        assert one["peak_bytes"] >= one["argument_bytes"] + one["temporary_bytes"] + others, name
    flops = [sum(one["flops"] * one["runs_a_step"] for one in plan["programs"]) for plan in (found, whole)]
    assert flops[0] == pytest.approx(2 * flops[1], rel=0.05), "the same arithmetic a response"
    assert programs["decode"]["argument_bytes"] > programs["decode, 4 rows"]["argument_bytes"]


def test_what_is_held_is_what_the_step_is_given(planned):
    """Bytes by kind against the compiler's own count of the step's arguments."""
    _, found, _ = planned
    held, step = found["held_bytes"], found["programs"][-1]
    config = from_mapping(tiny.get_config())
    rows, prompt, response = config.rollout.batch_size, 16, config.rollout.max_new_tokens
    tree = rows * (prompt * (4 + 1) + response * (4 + 1 + 4 + 4)) // 4  # a quarter of the rows a device
    given = held["parameters"] + held["optimizer"] + held["reference"] + tree
    # what the compiler found unused (the tokens' last column of nothing) is a few bytes
    assert step["argument_bytes"] == pytest.approx(given, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert held["reference"] == held["parameters"]
    assert step["peak_bytes"] > step["argument_bytes"]


def test_parameters_take_their_share_of_each_device(planned):
    _, found, _ = planned
    decoder = planner.model_config(48, 1, vocab_size=len(planner.get_world("arithmetic").vocabulary()))
    whole = sum(4 * _size(row.shape) for row in parameters.parameter_table(decoder))
    assert whole / 8 <= found["held_bytes"]["parameters"] < 1.4 * whole / 8


def _size(shape) -> int:
    size = 1
    for count in shape:
        size *= count
    return size


def test_sharded_work_is_sent_by_axis(planned):
    _, found, _ = planned
    assert set(found["programs"][-1]["sent_bytes"]) <= {"fsdp", "tensor", "fsdp+tensor"}
    assert found["programs"][-1]["sent_bytes"]["fsdp"] > 0
    assert found["programs"][-1]["flops"] > 0


def test_plans_as_a_table(planned):
    _, _, folder = planned
    head, _, row = report.table(folder).splitlines()
    assert head.count("|") == row.count("|")
    assert "| cpu:8 | 1×4×2 | 8 / 8 |" in row


def test_what_cannot_be_planned_is_said_in_one_sentence(tmp_path):
    done = _run("--config=configs/tiny.py", "--topology=v9:2x2")
    assert done.returncode == 2
    assert "TopologyError: --topology='v9:2x2' is not known; it is cpu:N" in done.stderr
    assert "Traceback" not in done.stderr
    for name in ("cpu:0", "cpu:65", "v5p:4x4", "v5e:2x2x2", "v5e", "tpu:8", ""):
        with pytest.raises(TopologyError, match="is not known"):
            topology.check_name(name)
    with pytest.raises(InputError, match=r"holds no \*\.json files"):
        report.table(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json is no plan"):
        report.table(tmp_path)


def test_a_slice_without_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'omniopd_jax\[plan\]'"):
        topology.topology("v5e:4x4")


def test_published_students():
    """Parameter counts as their model cards give them (non-embedding 1.4 and 3.6 billion)."""
    for name, billions in (("qwen3-1.7b", 1.4), ("qwen3-4b", 3.6)):
        decoder = find_student(name, "")
        table = [row for row in parameters.parameter_table(decoder) if row.path != ("embedding",)]
        assert sum(_size(row.shape) for row in table) / 1e9 == pytest.approx(billions, rel=0.03)
    assert find_student("", "somewhere/Qwen3-4B") == find_student("qwen3-4b", "")
    with pytest.raises(ConfigError, match=r"did you mean qwen3-1\.7b"):
        find_student("qwen3-1.6b", "")
    with pytest.raises(ConfigError, match="is no folder here; --student names"):
        find_student("", "/nowhere/at/all")
    assert set(PUBLISHED) == {name.lower() for name in PUBLISHED}


def test_the_search_takes_the_largest_that_fits():
    """Bisection over the divisors that the mesh divides; a stand-in for the compiler."""
    from types import SimpleNamespace

    values = base.get_config()
    values.rollout.batch_size = 48
    shapes = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 2, "fsdp": 2}), config=from_mapping(values))
    asked = []

    def plan_of(limit):
        def at(size):
            asked.append(size)
            step = planner.Compiled("step", 0, 0, 0, 0, size, 0, planner.programs.Cost(0, 0), {}, ())
            chip = topology.Chip("", 1, limit / planner.USABLE, 1, 1, "")
            found = topology.Topology("v5e:2x2", (), chip)
            held = {"parameters": 0, "optimizer": 0, "reference": 0, "cache": 0}
            return planner.Plan(found, {}, "", shapes.config, size, held, (), (step,), {}, "")

        return at

    assert planner.largest(shapes, plan_of(16.5)).micro_batch == 16
    assert planner.largest(shapes, plan_of(100)).micro_batch == 48
    nothing = planner.largest(shapes, plan_of(1))
    assert nothing.micro_batch == 4
    assert nothing.fits is False
    assert set(asked) <= {4, 8, 12, 16, 24, 48}


@pytest.mark.slow
def test_a_slice_that_is_not_there(tmp_path):
    """A tiny student on sixteen TPU chips: memory, a roofline and hours."""
    pytest.importorskip("libtpu")
    done = _run(
        "--config=configs/tiny.py",
        "--topology=v5e:4x4",
        "--config.rollout.batch_size=16",
        "--micro_batch=search",
        f"--json={tmp_path / 'plan.json'}",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["chips"] == 16
    assert found["fits"] is True
    assert found["micro_batch"] == 16
    assert 0 < found["step_seconds"]["at_best"] < found["step_seconds"]["at_worst"]
    assert "fits" in done.stdout
    assert "TPU v5e: 197 TFLOP/s" in done.stdout
