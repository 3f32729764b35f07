"""Laws of the rollout: what is drawn, what is returned, and what must not matter."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from omniopd_jax import models, prng
from omniopd_jax.rollout import columns, decoding, refill, sampling
from omniopd_jax.rollout.sampler import sample
from omniopd_jax.rollout.sampling import SamplingRule
from tests.rollout.conftest import VOCAB

P, T = 7, 12
STOP, BANNED = (5, 9), (0, 1)
PROMPTS = [[3, 14, 15], [9, 2, 6, 5, 3, 5, 8], [11], [20, 21, 22, 23], [], *([token] * 2 for token in range(30, 46))]
EMPTY = 4


def _pack(prompts, width=P):
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def _keys(indices, seed=0):
    return prng.row_keys(prng.named_key(seed, 0, "rollout"), np.asarray(indices, np.int32))


def _responses(rollout):
    return [
        np.asarray(tokens)[np.asarray(mask)].tolist()
        for tokens, mask in zip(rollout.tokens_BxT, rollout.mask_BxT, strict=True)
    ]


def _sample(model, prompts=PROMPTS, indices=None, *, seed=0, width=P, **options):
    options = dict(max_new_tokens=T, stop_tokens=STOP, banned_tokens=BANNED) | options
    keys = _keys(range(len(prompts)) if indices is None else indices, seed)
    return sample(model, *_pack(prompts, width), keys, **options)


@pytest.fixture(scope="module")
def forward():
    return jax.jit(models.logits)


@pytest.fixture(scope="module")
def rollout(model):
    return _sample(model)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("which", ["model", "windowed_model"])
def test_log_probability_and_entropy_are_those_of_a_full_forward_pass(which, forward, request):
    model = request.getfixturevalue(which)
    rollout = _sample(model)
    logits = forward(model, *rollout.sequence())[:, P - 1 : -1]
    logprob = _log_softmax(logits)
    mask = np.asarray(rollout.mask_BxT)
    expected = np.take_along_axis(logprob, np.asarray(rollout.tokens_BxT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(rollout.logprob_BxT)[mask], expected[mask], atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(rollout.entropy_BxT)[mask], -(np.exp(logprob) * logprob).sum(-1)[mask], atol=1e-4
    )
    assert mask.sum() > 2 * T, "too little was drawn to compare"
    assert rollout.entropy_BxT[mask].mean() > 0.3, "too little was left to chance"
    for padding in (rollout.tokens_BxT, rollout.logprob_BxT, rollout.entropy_BxT):
        np.testing.assert_array_equal(np.asarray(padding)[~mask], 0)


def test_each_token_is_the_draw_of_its_own_key_and_step(model, rollout, forward):
    """The whole sampler against its definition: one full forward pass, one uniform a step."""
    logits = np.asarray(forward(model, *rollout.sequence())[:, P - 1 : -1], np.float64)
    logits[..., list(BANNED)] = -np.inf
    cumulative = np.exp(_log_softmax(logits)).cumsum(-1)
    keys = _keys(range(len(PROMPTS)))
    for row, response in enumerate(_responses(rollout)):
        for step, token in enumerate(response):
            uniform = float(jax.random.uniform(jax.random.fold_in(keys[row], step)))
            assert token == np.searchsorted(cumulative[row, step], uniform, side="right")


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(rollout):
    ended = 0
    for row, response in enumerate(_responses(rollout)):
        stops = [step for step, token in enumerate(response) if token in STOP]
        assert bool(rollout.is_finished_B[row]) == bool(stops)
        assert len(response) == (stops[0] + 1 if stops else T if PROMPTS[row] else 0)
        np.testing.assert_array_equal(rollout.mask_BxT[row], np.arange(T) < len(response))
        ended += bool(stops)
    assert 2 < ended < len(PROMPTS) - 2, "the case should hold both kinds"


def test_neighbours_place_and_padding_do_not_matter(model, rollout):
    expected = _responses(rollout)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    permuted = _sample(model, [PROMPTS[row] for row in order], order)
    assert _responses(permuted) == [expected[row] for row in order]
    np.testing.assert_allclose(permuted.logprob_BxT, rollout.logprob_BxT[order], atol=1e-5)

    company = [[30, 31, 32], PROMPTS[3], [40], PROMPTS[0]]
    elsewhere = _responses(_sample(model, company, [7, 3, 8, 0], width=P + 4))
    assert [elsewhere[1], elsewhere[3]] == [expected[3], expected[0]]


def test_refilled_slots_give_the_same_responses(model, rollout):
    refilled = _sample(model, slots=16)  # two admitted at a time, the last of them alone; then in 8, 4 and 2 slots
    assert _responses(refilled) == _responses(rollout)
    np.testing.assert_array_equal(refilled.is_finished_B, rollout.is_finished_B)
    np.testing.assert_allclose(refilled.logprob_BxT, rollout.logprob_BxT, atol=1e-5)
    np.testing.assert_allclose(refilled.entropy_BxT, rollout.entropy_BxT, atol=1e-5)
    np.testing.assert_array_equal(refilled.prompt_tokens_BxP, rollout.prompt_tokens_BxP)


@pytest.mark.parametrize("slots", [2, 16])
def test_refilled_slots_in_a_cache_that_grows_and_shrinks_give_the_same_responses(model, monkeypatch, slots):
    prompts = [(P * prompt)[:P] or P * [7] for prompt in PROMPTS]  # no padding: every column of the ring is needed
    rollout = _sample(model, prompts)
    resized = []

    def resize(cache, size):
        resized.append(size - cache.mask_BxS.shape[1])
        return columns.resized(cache, size)

    monkeypatch.setattr(columns, "FIRST_SEGMENT", 3)  # 3, 6, then 12 tokens
    monkeypatch.setattr(refill, "resized", resize)
    refilled = _sample(model, prompts, slots=slots)
    assert max(resized) > 0
    assert slots > 2 or min(resized) < 0
    assert _responses(refilled) == _responses(rollout)
    np.testing.assert_allclose(refilled.logprob_BxT, rollout.logprob_BxT, atol=1e-5)
    np.testing.assert_allclose(refilled.entropy_BxT, rollout.entropy_BxT, atol=1e-5)


def test_a_ring_has_room_for_the_longest_response_and_shrinks_when_it_is_far_from_full():
    sizes = columns.cache_sizes(10, 1000)
    assert sizes == (10 + 255, 640, 1024), "of long ones a multiple of 128"
    for longest in range(1000):
        grown = refill.fitting_size(sizes, sizes[0], 10, longest)
        assert grown == min(size for size in sizes if size >= 10 + longest)
        shrunk = refill.fitting_size(sizes, sizes[-1], 10, longest)
        assert shrunk >= grown
        assert shrunk == sizes[-1] or 3 * (shrunk - 10) >= 4 * longest
    assert refill.fitting_size(sizes, sizes[-1], 10, 100) == sizes[0]


def test_one_token_a_response_needs_no_room(model):
    whole, refilled = _sample(model, max_new_tokens=1), _sample(model, max_new_tokens=1, slots=4)
    assert _responses(refilled) == _responses(whole)


def test_a_cache_that_grows_changes_nothing(model, rollout, monkeypatch):
    monkeypatch.setattr(columns, "FIRST_SEGMENT", 7)  # 7, then 12 tokens
    grown = _sample(model)
    assert _responses(grown) == _responses(rollout)
    np.testing.assert_array_equal(grown.is_finished_B, rollout.is_finished_B)
    np.testing.assert_allclose(grown.logprob_BxT, rollout.logprob_BxT, atol=1e-5)


def test_the_cache_grows_by_doubling_to_the_limit():
    assert columns.segments(1) == (1,)
    assert columns.segments(256) == (256,)
    assert columns.segments(257) == (256, 257)
    assert columns.segments(2000) == (256, 512, 1024, 2000)


def test_seeds_reproduce_and_differ(model, rollout):
    again, other = _sample(model), _sample(model, seed=1)
    np.testing.assert_array_equal(again.tokens_BxT, rollout.tokens_BxT)
    np.testing.assert_array_equal(again.logprob_BxT, rollout.logprob_BxT)
    assert _responses(other) != _responses(rollout)


def test_empty_prompts_give_empty_responses_and_do_no_harm(rollout):
    responses = _responses(rollout)
    assert [row for row, response in enumerate(responses) if not response] == [EMPTY]
    assert not rollout.is_finished_B[EMPTY]
    assert np.isfinite(rollout.logprob_BxT).all()
    assert np.isfinite(rollout.entropy_BxT).all()


def test_greedy_is_the_argmax_of_the_full_forward_pass(model, forward):
    rollout = _sample(model, temperature=0.0)
    logits = np.asarray(forward(model, *rollout.sequence())[:, P - 1 : -1]).copy()
    logits[..., list(BANNED)] = -np.inf
    mask = np.asarray(rollout.mask_BxT)
    np.testing.assert_array_equal(np.asarray(rollout.tokens_BxT)[mask], logits.argmax(-1)[mask])
    assert _responses(rollout) == _responses(_sample(model, temperature=0.0, seed=1))


def test_banned_tokens_never_come_and_drawn_ones_follow_the_model(model, rollout, forward):
    count = 4000
    tokens, mask = _pack([PROMPTS[0]] * count)
    first = sample(model, tokens, mask, _keys(range(count)), max_new_tokens=1, banned_tokens=BANNED)
    assert first.tokens_BxT[0, 0] == rollout.tokens_BxT[0, 0], "a shorter limit gives the same beginning"
    logits = np.asarray(forward(model, *rollout.sequence())[0, P - 1], np.float64)
    assert np.exp(_log_softmax(logits))[list(BANNED)].sum() > 1e-3, "the ban should have something to do"
    logits[list(BANNED)] = -np.inf
    expected = np.exp(_log_softmax(logits)) * count
    frequency = np.bincount(np.asarray(first.tokens_BxT[:, 0]), minlength=VOCAB)
    assert frequency[list(BANNED)].sum() == 0
    rare = expected < 5
    frequency = np.append(frequency[~rare], frequency[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(frequency, expected).pvalue > 1e-3


@pytest.mark.parametrize(("num_left", "reads"), [(0, 6), (1, 4), (2, 2), (3, 0)])
def test_the_loop_ends_when_enough_rows_have_stopped(num_left, reads):
    """Row r draws its stop token at step 2 r + 2 of a model that counts what it reads."""
    rule = SamplingRule(temperature=0.0, stop_tokens=(1,))

    def read_token(token_A, cache, is_active_A):
        return jnp.full((3, 1), cache + 1.0), cache + 1

    def draw(hidden_AxD, uniform_Ax1):
        is_stop_A = hidden_AxD[:, 0] >= 2 * jnp.arange(3) + 2
        return sampling.draw(jnp.stack([~is_stop_A, is_stop_A], axis=1) * 9.0, uniform_Ax1, rule)

    zero_A = jnp.zeros(3, jnp.int32)
    state = decoding.start(jnp.zeros((), jnp.int32), zero_A, zero_A, zero_A == 0, max_new_tokens=50)
    keys_A = jax.random.split(jax.random.key(0), 3)
    state = decoding.decode(state, read_token, draw, keys_A, rule, limit=50, until=50, num_left=num_left)
    assert int(state.cache) == int(state.step) == reads
    assert int(state.has_stopped_A.sum()) == 3 - num_left
    np.testing.assert_array_equal(state.mask_AxT.sum(axis=1), np.minimum([2, 4, 6], reads))


def test_new_parameters_prompts_and_keys_compile_nothing(model, rollout):
    del rollout  # compiled by now
    changed = model.replace(params=jax.tree.map(lambda leaf: leaf * 1.01, model.params))
    prompts = _pack([[8, 9]] * len(PROMPTS))
    keys = _keys(range(10, 10 + len(PROMPTS)), seed=5)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    sample(changed, *prompts, keys, max_new_tokens=T, stop_tokens=STOP, banned_tokens=BANNED)
    assert compiled == []
    jax.jit(lambda array: array + 41)(np.zeros(3))
    assert compiled, "a new program must be seen; if not, this test counts nothing"


def test_inputs_that_do_not_fit_are_refused_in_one_sentence(model):
    tokens, mask = _pack(PROMPTS)
    with pytest.raises(ValueError, match="21 prompts need as many keys"):
        sample(model, tokens, mask, _keys(range(4)), max_new_tokens=3)
    with pytest.raises(ValueError, match="P >= 1"):
        sample(model, tokens[:, :0], mask[:, :0], _keys(range(21)), max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        sample(model, tokens, mask, _keys(range(21)), max_new_tokens=0)
    with pytest.raises(ValueError, match="slots"):
        sample(model, tokens, mask, _keys(range(21)), max_new_tokens=3, slots=-1)
    with pytest.raises(ValueError, match="top_p"):
        sample(model, tokens, mask, _keys(range(21)), max_new_tokens=3, top_p=1.5)
