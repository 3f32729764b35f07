"""Every row of the paper's table builds, validates and says beforehand what its teacher costs."""

import importlib
import itertools
import re

import pytest

from configs import base, qwen3
from omniopd_jax.config import ConfigError, from_mapping
from omniopd_jax.teacher.budget import API_KINDS, projected_cost
from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.train.credit import needs_of

FILES = [f"{size}_{domain}" for size in qwen3.STUDENTS for domain in qwen3.DOMAINS]
ROWS = [
    (arm, teacher)
    for arm, teacher in itertools.product(qwen3.ARMS, qwen3.TEACHERS)
    if not (arm == "opd" and teacher in qwen3.PAID)
]
NO_KEYS = ("ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY")


@pytest.mark.parametrize("file", FILES)
def test_every_row_builds_validates_and_dry_runs(file):
    module = importlib.import_module(f"configs.qwen3_{file}")
    for arm, teacher in ROWS:
        values = module.get_config(f"{arm},{teacher}")
        values.teacher.dry_run = True
        config = from_mapping(values)
        needs = needs_of(config)
        assert (config.teacher.kind in API_KINDS) == needs.text, "who is paid is asked, and nobody else"
        if config.teacher.kind in API_KINDS:
            text = projected_cost(config)
            assert config.teacher.model in text
            assert ("$" in text) == (teacher in ("claude", "gemini"))
        assert (config.data.task, config.eval.task) == (("mbpp", "humaneval") if "code" in file else ("", "math"))


@pytest.mark.parametrize("teacher", qwen3.TEACHERS)
def test_a_dry_run_needs_no_key(teacher, tmp_path, monkeypatch):
    values = qwen3.get_config(f"4b,math,omniopd,{teacher}")
    pytest.importorskip({"openai": "openai", "anthropic": "anthropic", "gemini": "google.genai"}[values.teacher.kind])
    for name in NO_KEYS:
        monkeypatch.delenv(name, raising=False)
    values.teacher.update(dry_run=True, path="")  # a tokenizer's folder, not here
    make_teacher(from_mapping(values).teacher, workdir=tmp_path, run_seed=0).close()


def test_the_methods_rows_have_the_papers_settings():
    ours = base.get_config()
    for teacher in qwen3.TEACHERS:
        config = qwen3.get_config(f"4b,math,omniopd,{teacher}")
        assert config.objective.to_dict() == ours.objective.to_dict()
        audit = config.audit
        assert (audit.num_chunks, audit.chunk_tokens, audit.num_continuations, audit.similarity) == (10, 50, 10, "edit")
        assert config.rollout.max_new_tokens == 4096
    same = ("rollout", "optimizer", "train", "data", "teacher")
    published, branch = (qwen3.get_config(f"4b,math,{arm},claude") for arm in ("omniopd", "branch"))
    assert all(published[section] == branch[section] for section in same), "ours differs in the arm alone"


def test_rows_that_are_none_are_refused():
    for row in ("", "omniopd", "1p7b,math,omniopd", "8b,math,omniopd,claude", "4b,math,ppo,claude", "4b,math,sft,gpt"):
        with pytest.raises(ValueError, match=r"is no row: expected \{1p7b"):
            qwen3.get_config(row)
    for teacher in qwen3.PAID:
        with pytest.raises(ValueError, match=r"reads logits, which .* does not show"):
            qwen3.get_config(f"4b,code,opd,{teacher}")
    values = qwen3.get_config("4b,math,omniopd,claude")
    values.objective.arm = "opd"
    with pytest.raises(ConfigError, match="opd"):
        from_mapping(values)


@pytest.mark.parametrize("file", FILES)
def test_headers_say_what_the_estimate_says(file):
    text = importlib.import_module(f"configs.qwen3_{file}").__doc__
    for arm, teacher in (("omniopd", "claude"), ("omniopd", "gemini"), ("sft", "claude"), ("sft", "gemini")):
        size, domain = file.split("_")
        said = projected_cost(from_mapping(qwen3.get_config(f"{size},{domain},{arm},{teacher}")))
        step, whole = re.search(r"about \$([\d.]+) a step, \$([\d,.]+) in all", said).groups()
        assert re.search(rf"\${float(step):.2f}\b|\${float(step):.0f} ", text), (arm, teacher, step)
        assert f"${round(float(whole.replace(',', ''))):,}" in text


def test_the_students_that_stay_as_they_are_take_one_step_without_a_gradient():
    config = qwen3.get_config("4b,math,base,claude")
    assert (config.objective.arm, config.train.steps) == ("anchor", 1)
    assert config.eval.every > config.train.steps, "measured once, at step 0"
