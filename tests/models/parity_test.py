"""Every family computes what transformers computes, reads its files and writes them back bit for bit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from omniopd_jax import models
from omniopd_jax.models.families import FAMILIES
from tests.models import parity

pytest.importorskip("torch")

TOKENS, MASK = parity.tokens_and_mask()


@pytest.fixture(scope="module", params=parity.CASES, ids=lambda case: case.name)
def reference(request, tmp_path_factory):
    """(case, folder as transformers wrote it, transformers' log-probabilities)."""
    folder = tmp_path_factory.mktemp("reference")
    theirs = parity.write_reference(request.param, folder)
    return request.param, folder, parity.reference_logprobs(theirs, TOKENS, MASK)


def test_every_family_has_a_case():
    assert {case.model_type for case in parity.CASES} == {family.model_type for family in FAMILIES.values()}


def test_float32_logprobs_equal_transformers(reference):
    _, folder, truth = reference
    ours = parity.our_logprobs(models.load_model(folder), TOKENS, MASK)
    assert np.ptp(truth[MASK]) > 8, "the weights are too tame for the check to mean anything"
    assert parity.errors(ours, truth, MASK).max() < 1e-4


def test_cached_decode_equals_the_full_pass(reference):
    _, folder, _ = reference
    model = models.load_model(folder)
    full, _ = parity.quick_jit(models.read)(model, TOKENS, MASK)
    decoded = parity.decoded_hidden(model, TOKENS, MASK)
    assert parity.errors(decoded, full[:, parity.PROMPT :], MASK[:, parity.PROMPT :]).max() < 1e-4


def test_bf16_logprobs_stay_close(reference):
    """Sharp weights: bf16 costs 0.01 to 0.02 nats on average (transformers' own bf16: as much), 0.3 at worst."""
    _, folder, truth = reference
    ours = parity.our_logprobs(models.load_model(folder, dtype=jnp.bfloat16), TOKENS, MASK)
    assert ours.dtype == jnp.float32
    error = parity.errors(ours, truth, MASK)
    assert error.mean() < 0.03
    assert error.max() < 0.5


def test_files_survive_a_round_trip_bit_for_bit(reference, tmp_path):
    from transformers import AutoModelForCausalLM

    _, folder, truth = reference
    models.save_model(tmp_path / "out", models.load_model(folder), source=folder)
    before, after = (_tensors(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert np.array_equal(parity.reference_logprobs(opened, TOKENS, MASK), truth)


def _tensors(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3", dict(rope_theta=10_000.0)),
        ("Mistral", dict(sliding_window=None)),
        ("Llama 3 / 3.1 / 3.2", dict(rope_scaling=None)),
        ("Gemma 2", dict(query_pre_attn_scalar=4)),
        ("SmolLM3", dict(no_rope_layers=[1, 1])),
    ],
)
def test_a_wrong_constant_would_show(name, changes):
    """What the comparison above can see: each of these silent mistakes costs more than a nat somewhere."""
    right = parity.tiny_model(name)
    wrong_config = parity.tiny_model(name, **changes).config
    wrong = dataclasses.replace(right, config=wrong_config, module=right.module.clone(config=wrong_config))
    truth = parity.our_logprobs(right, TOKENS, MASK)
    assert parity.errors(parity.our_logprobs(wrong, TOKENS, MASK), truth, MASK).max() > 1.0
