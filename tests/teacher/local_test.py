"""A JAX model as a black box: laws, and a naive teacher that reads every prefix again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.data import load_tokenizer
from omniopd_jax.teacher.local import LocalTeacher, _share_trunks, load_teacher
from omniopd_jax.teacher.protocol import ContinuationRequest, TeacherStopped
from omniopd_jax.types import InputError, Message, Prompt
from tests.tiny_tokenizers import save_byte_level

SIZES = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer"), vocab_size=300))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = models.decoder_config(SIZES | {"vocab_size": tokenizer.vocab_size + 7})
    model = models.init_model(config, jax.random.key(0), jnp.float32)
    rng = np.random.default_rng(0)
    # Sharp weights: a wrong mask or position shows in the tokens.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.15 * rng.normal(size=leaf.shape), leaf.dtype), model.params)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def teacher(model, tokenizer):
    return LocalTeacher(model, tokenizer, template_args={"enable_thinking": False})


TEXT = "So 12 + 34 = 46, and the quick brown fox jumps over the lazy dog."


def _request(prefix, *, question="2 + 2 ?", **changes):
    settings = dict(n=2, max_tokens=6, temperature=1.0, top_p=1.0, seed=11)
    return ContinuationRequest((Message("user", question),), prefix, **(settings | changes))


@pytest.fixture(scope="module")
def requests():
    """Nested prefixes of two answers, one of them cut inside words, and a question asked from the start."""
    cuts = (0, 3, 14, 21, 30)
    nested = [_request(TEXT[:cut], seed=100 + cut) for cut in cuts]
    other = [_request(TEXT[20:][:cut], question="and 3 ?", seed=200 + cut) for cut in (4, 8)]
    return [*nested, *other]


def _tokens(teacher, request):
    prompt = teacher.tokenizer.encode_prompt(Prompt("", request.messages), {"enable_thinking": False})
    return prompt + teacher.tokenizer.encode(request.prefix)


def test_greedy_continuations_are_those_of_a_naive_teacher(teacher, model, tokenizer, requests):
    """The reference reads prompt and prefix again for every token and takes the likeliest one."""
    read = jax.jit(models.logits)
    banned = list(tokenizer.banned_tokens(model.config.vocab_size))
    greedy = [dataclasses.replace(request, temperature=0.0, n=2) for request in requests]
    for request, result in zip(greedy, teacher.continue_texts(greedy), strict=True):
        ids = _tokens(teacher, request)
        start = len(ids)
        finish = "length"
        for _ in range(request.max_tokens):
            padded = np.zeros((1, 96), np.int32)
            padded[0, : len(ids)] = ids
            logits_V = np.array(read(model, padded, np.arange(96)[None] < len(ids))[0, len(ids) - 1])
            logits_V[banned] = -np.inf
            token = int(logits_V.argmax())
            if token in tokenizer.stop_tokens:
                finish = "stop"
                break
            ids.append(token)
        text = tokenizer.decode_after(tokenizer.encode(request.prefix), ids[start:])
        text = text if finish == "stop" else text.rstrip("\ufffd")
        assert [c.text for c in result.continuations] == [text] * (2 if text or finish == "stop" else 0)
        assert {c.finish_reason for c in result.continuations} <= {finish}


def test_a_request_is_answered_alike_in_any_company(teacher, requests):
    together = teacher.continue_texts(requests)
    backwards = teacher.continue_texts(requests[::-1])[::-1]
    assert [r.continuations for r in backwards] == [r.continuations for r in together]
    # Alone, and asked for more and longer samples: the first ones are the same.
    longer = dataclasses.replace(requests[3], max_tokens=12, n=3)
    more, short = teacher.continue_texts([longer, dataclasses.replace(longer, max_tokens=6, seed=5)])
    assert short.continuations != more.continuations
    for a, b in zip(together[3].continuations, more.continuations, strict=False):
        assert b.text.startswith(a.text)
    assert all(r.usage.completion_tokens <= 3 * limit for r, limit in ((more, 12), (short, 6)))


def test_nested_prefixes_are_read_once(teacher, requests):
    expected, alone = 0, 0
    for question in {request.messages for request in requests}:
        asked = [_tokens(teacher, request) for request in requests if request.messages == question]
        longest = max(asked, key=len)
        own_rows = [ids for ids in asked if longest[: len(ids)] != ids]  # cut where the longer text merges two tokens
        expected += len(longest) + sum(map(len, own_rows))
        alone += len(own_rows)
    assert alone == 1
    results = teacher.continue_texts(requests)
    assert sum(result.usage.prompt_tokens for result in results) == expected


def test_usage_and_finish_add_up(teacher, tokenizer):
    requests = [_request(TEXT[:12], n=8, max_tokens=12, seed=seed) for seed in range(6)]
    results = teacher.continue_texts(requests)
    stops = 0
    for result in results:
        assert len(result.continuations) + result.num_missing == 8
        assert result.usage.calls == 1
        assert 8 <= result.usage.completion_tokens <= 8 * 12
        assert result.model == teacher.name
        assert result.latency_s > 0
        for continuation in result.continuations:
            assert continuation.text or continuation.finish_reason == "stop"
            assert not any(tokenizer.hf.convert_ids_to_tokens(i) in continuation.text for i in tokenizer.special_tokens)
            stops += continuation.finish_reason == "stop"
    texts = [{c.text for c in result.continuations} for result in results]
    assert min(map(len, texts)) > 4  # samples differ by their number, requests by their seed
    assert len(set.union(*texts)) > 3 * max(map(len, texts))
    assert sum(result.usage.completion_tokens for result in results) < 6 * 8 * 12 or not stops


def test_small_batches_answer_as_one_does(model, tokenizer, teacher, requests):
    small = LocalTeacher(model, tokenizer, template_args={"enable_thinking": False}, max_batch_tokens=200)
    trunks = _share_trunks(range(len(requests)), requests, [_tokens(small, request) for request in requests])
    assert len(small._batches(trunks, requests)) == 2
    assert [r.continuations for r in small.continue_texts(requests)] == [
        r.continuations for r in teacher.continue_texts(requests)
    ]


def test_a_folder_becomes_a_teacher(model, tokenizer, teacher, requests, tmp_path):
    models.save_model(tmp_path, model, tokenizer.hf)
    loaded = load_teacher(tmp_path, template_args={"enable_thinking": False})
    assert "local model of" in loaded.probe()
    assert "<|im_end|>" in loaded.probe()
    found = loaded.continue_texts(requests)
    assert [r.continuations for r in found] == [r.continuations for r in teacher.continue_texts(requests)]
    loaded.close()
    assert not jax.tree.leaves(loaded.model.params)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert load_teacher(tmp_path).tokenizer.stop_tokens == (1, 2)


def test_broken_teachers_are_named(model, tokenizer, requests, tmp_path):
    nan = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))
    with pytest.raises(TeacherStopped, match="computes NaN"):
        LocalTeacher(nan, tokenizer, template_args={"enable_thinking": False}).continue_texts(requests)
    small = dataclasses.replace(model, config=models.decoder_config(SIZES | {"vocab_size": 40}))
    with pytest.raises(InputError, match="vocabulary of 40; they do not belong together"):
        LocalTeacher(small, tokenizer)
    with pytest.raises(InputError, match=r"teacher\.path is empty"):
        load_teacher("")
    with pytest.raises(InputError, match="No folder"):
        load_teacher(tmp_path / "nowhere")
