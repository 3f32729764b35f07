"""Every arm, two steps from prompts to an exported model."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from omniopd_jax.config import ConfigError
from omniopd_jax.data import load_tokenizer
from omniopd_jax.eval.evaluate import Judge
from omniopd_jax.eval.verdict import Verdict
from omniopd_jax.teacher.local import LocalTeacher
from omniopd_jax.teacher.scripted import scripted_teacher
from omniopd_jax.train import experiment, loop
from omniopd_jax.train.metrics import meaning
from omniopd_jax.train.teachers import initial_student
from tests.tiny_tokenizers import save_byte_level
from tests.train.conftest import read_lines, tiny_model

GRPO = {"rollout.samples_per_prompt": 4, "objective.normalise": "response", "train.updates_per_batch": 2}
RUNS = {
    "imitate": {"objective.confidence_power": 0.5},
    "sft": {"objective.anchor_weight": 0.0},
    "opd": {},
    "grpo": GRPO | {"objective.anchor_estimator": "k3"},
    "anchor": {},
    "mixture": {
        "objective.weights.branch": 0.5,
        "objective.weights.imitate": 0.5,
        "objective.weights.sft": 0.1,
        "objective.num_branches": 2,
        "train.micro_batch_size": 4,
    },
    "sampled": {"objective.arm": "opd", "objective.divergence": "sampled", "objective.anchor_weight": 0.0},
    "self": {"teacher.kind": "self", "audit.control": "shuffled", "audit.positions": "lowest"},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def run(make_config, model, tokenizer, prompts, compiled, tmp_path_factory):
    def run(name, teacher="local", prompts=prompts, **changes):
        arm = {"objective.arm": name} if name in tiny.ARMS else {}
        settings = {"train.compilation_cache": compiled, "train.steps": 2, "rollout.max_new_tokens": 16}
        config = make_config(**settings | arm | RUNS.get(name, {}) | changes)
        workdir = tmp_path_factory.mktemp(name)
        if teacher == "local":
            teacher = LocalTeacher(tiny_model(tokenizer.vocab_size, seed=7), tokenizer)
        result = loop.run(config, workdir, student=model, tokenizer=tokenizer, teacher=teacher, prompts=prompts)
        return result, read_lines(workdir / "metrics.jsonl")

    return run


def by_length(response, answer):
    return Verdict(len(response) % 2 == 0, "by length")


@pytest.mark.parametrize("name", [name for name in RUNS if name != "self"])
def test_two_steps(run, name, monkeypatch):
    # a student of random weights is never right: half of its responses shall be
    monkeypatch.setattr(experiment, "judge_of", lambda *_: Judge(by_length))
    result, lines = run(name)
    assert len(lines) == 2
    assert all(meaning(key) for line in lines for key in line if key != "step")
    for line in lines:
        assert line["optimizer/update_norm"] > 0 or name == "anchor"
    last = lines[-1]
    is_taught = name in ("imitate", "sft", "mixture")
    assert (result.teacher_tokens > 0) == is_taught
    assert ("teacher/total_tokens" in last) == is_taught
    assert ("rollout/tokens" in last) == (name != "sft")
    assert ("time/sample_s" in last) == (name != "sft")
    assert ("opd/divergence" in last) == (name in ("opd", "sampled"))
    assert ("reward/mean" in last) == (name == "grpo")
    assert ("sft/answer_tokens" in last) == (name in ("sft", "mixture"))
    if name == "grpo":
        assert result.updates == 4
        assert 0 <= last["update/clip_fraction"] <= 1
    if name == "anchor":
        assert lines[0]["optimizer/grad_norm"] < 1e-6


def test_the_control_whose_teacher_is_the_student(run):
    result, lines = run("self", teacher=None)
    assert result.teacher_tokens > 0
    assert lines[-1]["audit/target"] > 0


def test_the_student_as_teacher_shares_no_array_with_it(make_config, model, tokenizer):
    teacher = initial_student(make_config(), model, tokenizer)
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.params)}
    assert not own & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(teacher.model.params)}
    jax.tree.map(np.testing.assert_array_equal, teacher.model.params, model.params)
    teacher.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


def test_what_an_arm_cannot_be_given_is_said_before_anything_is_loaded(run, prompts, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"Arm 'opd' reads the teacher's logits, but scripted.* only writes text"):
        run("opd", teacher=scripted_teacher("noise"))
    other = load_tokenizer(save_byte_level(tmp_path))
    with pytest.raises(ConfigError, match="the teacher's tokenizer differs from the student's"):
        run("opd", teacher=LocalTeacher(tiny_model(other.vocab_size), other))
    unanswered = [dataclasses.replace(prompt, answer="") for prompt in prompts]
    with pytest.raises(ConfigError, match=r"prompt 'p0' has none: name their column in config\.data\.answer_field"):
        run("grpo", prompts=unanswered)
