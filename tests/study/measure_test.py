"""What is measured of a student, against numpy and by hand."""

import json

import jax
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.eval.evaluate import Evaluation, Item
from omniopd_jax.study import measure
from omniopd_jax.train.evaluation import MODES
from omniopd_jax.types import Rollout
from tests.train.conftest import make_config, model, prompts, tiny_model, tokenizer  # noqa: F401  (fixtures)


def test_a_string_of_verdicts():
    measured = {"eval": {"greedy": {"right": "0110"}}}
    assert measure.right(measured, "greedy").tolist() == [False, True, True, False]


def test_the_search_maximises_the_mean_of_both_modes_on_validation_problems():
    measured = {
        "validation": {"greedy": {"accuracy": 0.4}, "temperature_1": {"accuracy": 0.2}},
        "eval": {"greedy": {"accuracy": 1.0}, "temperature_1": {"accuracy": 1.0}},
    }
    assert measure.score(measured) == pytest.approx(0.3)
    assert measure.score({"failed": "not finite"}) < 0


def test_both_splits_are_measured_as_a_run_measures_and_variety_on_held_out_samples(make_config, tmp_path, monkeypatch):  # noqa: F811
    for split in measure.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "answer": "7"}) + "\n", encoding="utf-8")
    seen = []

    def measured(config, student, its_tokenizer, rows, judge):
        (prompt,) = rows
        seen.append((prompt.messages[0].content, judge("7", "7")))
        return {mode: evaluation_of(f"{prompt.messages[0].content} {mode}", mode == "greedy") for mode in MODES}

    class OtherTokenizer:
        def has_same_vocabulary(self, other):
            return False

    monkeypatch.setattr(measure.evaluation, "measure", measured)
    monkeypatch.setattr(measure, "load_tokenizer", lambda path: OtherTokenizer())
    monkeypatch.setattr(measure.wording, "phrasing_variety", lambda responses, marks: list(responses))
    config = make_config(**{"world.kind": "arithmetic"})
    found = measure.measure(config, tmp_path, None, None, kl_problems=1)
    assert [split for split, _ in seen] == ["validation", "eval"]
    assert found["eval"] == {
        "greedy": {"accuracy": 1.0, "right": "1"},
        "temperature_1": {"accuracy": 0.0, "right": "0"},
    }
    assert found["variety"] == ["eval temperature_1"]
    assert found["kl"] is None, "no common vocabulary"


def evaluation_of(response: str, is_correct: bool) -> Evaluation:
    item = Item("p", 0, response, is_correct, "", tokens=1, is_finished=True)
    return Evaluation(float(is_correct), 0.0, problems=1, samples=1, items=(item,))


def test_divergences(model, tokenizer, prompts, monkeypatch):  # noqa: F811
    """0 from itself; from another model the mean over the writer's tokens of the dense KL, in float64."""
    rng = np.random.default_rng(0)
    seen = {}

    def written(writer, tokens_BxP, mask_BxP, keys_B, *, max_new_tokens, **options):
        shape = (len(tokens_BxP), max_new_tokens)
        mask_BxT = np.arange(max_new_tokens) < rng.integers(1, max_new_tokens, (shape[0], 1))
        seen[id(writer)] = rollout = Rollout(
            prompt_tokens_BxP=tokens_BxP,
            prompt_mask_BxP=mask_BxP,
            tokens_BxT=np.where(mask_BxT, rng.integers(3, tokenizer.vocab_size, shape), 0),
            mask_BxT=mask_BxT,
            logprob_BxT=np.zeros(shape, np.float32),
            is_finished_B=np.ones(shape[0], bool),
        )
        return rollout

    monkeypatch.setattr(measure.sampler, "sample", written)
    other = tiny_model(tokenizer.vocab_size, seed=1)
    same = measure.divergences(model, model, tokenizer, prompts, max_new_tokens=8, seed=0)
    assert max(map(abs, same.values())) < 1e-6
    found = measure.divergences(model, other, tokenizer, prompts, max_new_tokens=8, seed=0)
    for name, writer, reader in (("reverse", model, other), ("forward", other, model)):
        rollout = seen[id(writer)]
        width = rollout.prompt_tokens_BxP.shape[1]
        logprobs = [
            jax.nn.log_softmax(models.logits(one, *rollout.sequence()), axis=-1)[:, width - 1 : -1]
            for one in (writer, reader)
        ]
        first, second = (np.asarray(one, np.float64) for one in logprobs)
        kl_BxT = (np.exp(first) * (first - second)).sum(axis=-1)
        assert found[name] == pytest.approx(kl_BxT[rollout.mask_BxT].mean(), rel=1e-4)
        assert found[name] > 0.01
